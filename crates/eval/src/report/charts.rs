//! The charts: recall by bucket, loss by tokens, and sizes of clusters.

use super::axis::{Scale, drawable, extent, smooth, spread, thin};
use super::format::{compact, count, decimal, percent, plural, shorten};
use super::palette::{Look, look, rank};
use super::svg::{Point, Svg, px};
use super::{Curve, RecallRow};
use crate::Rate;

/// Width of a character of a label, about.
const CHARACTER: f64 = 7.2;
/// Height of a line of labels.
const LINE: f64 = 14.0;
/// Points of one curve in one panel, at most (about).
const CURVE_POINTS: usize = 360;
/// Points of the mean of a noisy curve.
const MEAN_POINTS: usize = 60;
/// Columns of a cluster panel, at most.
const COLUMNS: usize = 150;

/// Accuracy by frequency bucket: a dot with its interval for each memory, rarest bucket at the left.
pub(super) struct RecallChart<'a> {
    pub(super) rows: &'a [RecallRow],
    pub(super) buckets: &'a [String],
    /// What the buckets are and the rows: "frequency bucket, rarest first, for memory".
    pub(super) across: &'a str,
    /// What is measured: "exact match".
    pub(super) measure: &'a str,
}

impl RecallChart<'_> {
    /// The chart at a size in pixels.
    pub(super) fn draw(&self, width: f64, height: f64) -> String {
        let mut rows: Vec<&RecallRow> = self.rows.iter().collect();
        rows.sort_by_key(|row| rank(&row.memory));
        let (labels, axis) = bucket_labels(self.buckets, bucket_count(self.rows, self.buckets));
        let names = rows.iter().map(|row| look(&row.memory).short);
        let right = width - label_margin(names, width);
        let slot = (right - 30.0) / labels.len().max(1) as f64;
        let labels_wrapped: Vec<_> =
            labels.iter().map(|label| wrap(label, (slot / CHARACTER) as usize)).collect();
        let n_lines = labels_wrapped.iter().map(Vec::len).max().unwrap_or(0) + usize::from(!axis.is_empty());
        let frame = Frame { left: 30.0, right, top: 26.0, bottom: height - 8.0 - n_lines as f64 * LINE };
        let highest = extent(
            rows.iter().flat_map(|row| row.buckets.iter().flatten()).filter_map(known).map(|r| r.high),
        );
        let y = frame.y((0.0, highest.map_or(0.1, |(_, high)| high.max(0.1)))).rounded();
        let mut svg = Svg::new(width, height);
        frame.y_axis(&mut svg, &y, |tick| percent(tick, 0));
        svg.text("t", (0.0, 12.0), &format!("{}, %", self.measure));
        for (i, lines) in labels_wrapped.iter().enumerate() {
            let x = frame.left + (i as f64 + 0.5) * slot;
            for (line, text) in lines.iter().enumerate() {
                svg.text("t mid", (x, frame.bottom + 18.0 + line as f64 * LINE), text);
            }
        }
        svg.text("t mid", ((frame.left + frame.right) / 2.0, height - 4.0), &axis);
        let apart = (slot * 0.62 / rows.len().max(1) as f64).min(11.0);
        let mut ends = vec![];
        for (k, row) in rows.iter().enumerate() {
            let shift = (k as f64 - (rows.len() as f64 - 1.0) / 2.0) * apart;
            let x = |i: usize| frame.left + (i as f64 + 0.5) * slot + shift;
            let end = draw_recall(&mut svg, (row, &labels), |i, share| (x(i), y.at(share)));
            ends.extend(end.map(|at| (look(&row.memory), at)));
        }
        end_labels(&mut svg, &frame, &ends);
        svg.finish("chart", &self.describe(&rows))
    }

    fn describe(&self, rows: &[&RecallRow]) -> String {
        let names: Vec<&str> = rows.iter().map(|row| look(&row.memory).short).collect();
        format!("{} by {}: {}", self.measure, self.across, names.join(", "))
    }
}

/// One memory's line, intervals and marks; where it ends.
fn draw_recall(
    svg: &mut Svg,
    (row, labels): (&RecallRow, &[String]),
    at: impl Fn(usize, f64) -> Point,
) -> Option<Point> {
    let look = look(&row.memory);
    let rates: Vec<Option<&Rate>> = row.buckets.iter().map(|rate| rate.as_ref().and_then(known)).collect();
    svg.open_group(look.class);
    svg.polyline("thin", rates.iter().enumerate().map(|(i, rate)| rate.map(|rate| at(i, rate.mean))));
    let mut end = None;
    for (i, rate) in rates.iter().enumerate() {
        let Some(rate) = rate else { continue };
        svg.line("interval", at(i, rate.low), at(i, rate.high));
        let title = format!(
            "{}, {}: {} % ({}), n = {}",
            look.short,
            labels[i],
            percent(rate.mean, 1),
            interval(rate),
            rate.n
        );
        svg.mark(look.mark, at(i, rate.mean), Some(&title));
        end = Some(at(i, rate.mean));
    }
    svg.close_group();
    end
}

/// A rate of which all can be drawn.
pub(super) fn known(rate: &Rate) -> Option<&Rate> {
    [rate.mean, rate.low, rate.high].into_iter().all(drawable).then_some(rate)
}

/// "37.0–45.4": a rate's interval in percent.
pub(super) fn interval(rate: &Rate) -> String {
    format!("{}–{}", percent(rate.low, 1), percent(rate.high, 1))
}

/// How many buckets there are.
pub(super) fn bucket_count(rows: &[RecallRow], buckets: &[String]) -> usize {
    rows.iter().map(|row| row.buckets.len()).chain([buckets.len()]).max().unwrap_or(0)
}

/// Labels of `n` buckets, and the name of their axis: the last word if all share it.
pub(super) fn bucket_labels(buckets: &[String], n: usize) -> (Vec<String>, String) {
    let mut labels = buckets.to_vec();
    labels.extend((labels.len()..n).map(|i| format!("bucket {}", i + 1)));
    let last_word = labels.first().and_then(|label| label.rsplit_once(' ')).map(|(_, word)| word.to_string());
    let suffix = last_word.filter(|word| n > 1 && !word.ends_with(|c: char| c.is_ascii_digit()));
    let Some(suffix) = suffix else { return (labels, String::new()) };
    let rests: Option<Vec<String>> = labels
        .iter()
        .map(|label| label.strip_suffix(suffix.as_str())?.strip_suffix(' ').map(String::from))
        .collect();
    match rests {
        Some(rests) => (rests, suffix),
        None => (labels, String::new()),
    }
}

/// `text` in two lines at most, each of `n` characters at most; a line may end after a space or an en dash.
fn wrap(text: &str, n: usize) -> Vec<String> {
    let n = n.max(3);
    let fits = |text: &str| text.trim_end().chars().count() <= n;
    let breaks = text.match_indices([' ', '–']).map(|(at, found)| at + found.len());
    match breaks.rev().find(|&at| fits(&text[..at])).filter(|_| !fits(text)) {
        Some(at) => vec![text[..at].trim_end().to_string(), shorten(&text[at..], n)],
        None => vec![shorten(text, n)],
    }
}

/// Loss by tokens seen, from `from` tokens on.
pub(super) fn loss_chart(curves: &[Curve], from: u64, (width, height): (f64, f64)) -> String {
    let late = |curve| in_order(curve).into_iter().filter(|point| point.0 >= from).collect();
    let series: Vec<(&Curve, Vec<(u64, f64)>)> = curves.iter().map(|curve| (curve, late(curve))).collect();
    let names = series.iter().map(|(curve, _)| look(&curve.name).short);
    let frame =
        Frame { left: 30.0, right: width - label_margin(names, width), top: 26.0, bottom: height - 36.0 };
    let seen = series.iter().flat_map(|(_, points)| points.iter().map(|point| point.0 as f64));
    let x = frame.x(extent(seen).unwrap_or((0.0, 1.0)));
    let losses = series.iter().flat_map(|(_, points)| points.iter().map(|point| point.1));
    let y = frame.y(extent(losses).unwrap_or((0.0, 1.0))).rounded();
    let mut svg = Svg::new(width, height);
    frame.y_axis(&mut svg, &y, |tick| decimal(tick, y.tick_digits()));
    svg.text("t", (0.0, 12.0), "nats per token");
    for tick in x.ticks() {
        svg.line("tick", (x.at(tick), frame.bottom), (x.at(tick), frame.bottom + 4.0));
        svg.text("t mid", (x.at(tick), frame.bottom + 17.0), &compact(tick));
    }
    svg.text("t mid", ((frame.left + frame.right) / 2.0, height - 4.0), "tokens seen");
    let mut ends = vec![];
    for (curve, points) in &series {
        let end = draw_curve(&mut svg, (curve, points), |(seen, loss)| (x.at(seen as f64), y.at(loss)));
        // A memory that is both trained and validated on is named once, at its validation curve.
        let named = |other: &Curve| other.validation && other.name == curve.name;
        if curve.validation || !curves.iter().any(named) {
            ends.extend(end.map(|at| (curve_look(&curve.name), at)));
        }
    }
    end_labels(&mut svg, &frame, &ends);
    svg.finish("chart", "loss by tokens seen")
}

/// One curve: with dots for validation, thin for training; a long noisy one as its mean over a pale band. Where
/// it ends.
fn draw_curve(
    svg: &mut Svg,
    (curve, points): (&Curve, &[(u64, f64)]),
    at: impl Fn((u64, f64)) -> Point,
) -> Option<Point> {
    let place = |point: &(u64, f64)| drawable(point.1).then(|| at(*point));
    let is_noisy = !curve.validation && points.len() > 4 * MEAN_POINTS;
    let thinned = thin(points, CURVE_POINTS);
    svg.open_group(curve_look(&curve.name).class);
    let line = if is_noisy {
        svg.polyline("noise", thinned.iter().map(place));
        smooth(points, MEAN_POINTS)
    } else {
        thinned
    };
    svg.polyline(if curve.validation { "curve" } else { "thin" }, line.iter().map(place));
    if curve.validation && line.len() <= 40 {
        line.iter().filter_map(place).for_each(|place| svg.dot(place, 2.2));
    }
    let end = line.iter().filter_map(place).last();
    if let Some(end) = end {
        svg.dot(end, 2.2);
    }
    svg.close_group();
    end
}

/// A curve that is not a memory's is drawn in ink.
fn curve_look(name: &str) -> Look<'_> {
    let look = look(name);
    match look.class {
        "m-other" => Look { class: "m-ink", ..look },
        _ => look,
    }
}

/// The points of a curve by tokens seen: a resumed run may have logged some twice.
pub(super) fn in_order(curve: &Curve) -> Vec<(u64, f64)> {
    let mut points = curve.points.clone();
    points.sort_by_key(|point| point.0);
    points
}

/// Documents per cluster of one level, largest cluster at the left, the mean dashed.
pub(super) fn cluster_chart(sizes: &[u64], (width, height): (f64, f64)) -> String {
    let mut sorted = sizes.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let (n, largest) = (sorted.len(), sorted.first().copied().unwrap_or(0));
    let mean = sorted.iter().map(|&size| size as f64).sum::<f64>() / n.max(1) as f64;
    let frame = Frame { left: 0.0, right: width, top: 18.0, bottom: height - 2.0 };
    let y = frame.y((0.0, (largest as f64).max(1.0)));
    let columns = n.min(COLUMNS);
    // The first and the last column are the largest and the smallest cluster.
    let size = |column: usize| sorted[column * (n - 1) / (columns - 1).max(1)] as f64;
    let place = |column: usize| px(width * column as f64 / columns as f64);
    let steps: String =
        (0..columns).map(|column| format!("V{}H{}", px(y.at(size(column))), place(column + 1))).collect();
    let mut svg = Svg::new(width, height);
    svg.path("area", &format!("M0 {bottom}{steps}V{bottom}z", bottom = px(frame.bottom)));
    svg.line("axis", (0.0, frame.bottom), (width, frame.bottom));
    svg.line("mean", (0.0, y.at(mean)), (width, y.at(mean)));
    svg.text("t end", (width, y.at(mean) - 4.0), &format!("mean {}", compact(mean)));
    let label =
        format!("{}, largest {}, mean {}", plural(n as u64, "cluster"), count(largest), compact(mean));
    svg.finish("chart", &label)
}

/// The part of a picture that data fills.
struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Frame {
    fn x(&self, range: (f64, f64)) -> Scale {
        Scale::new(range, (self.left, self.right))
    }

    fn y(&self, range: (f64, f64)) -> Scale {
        Scale::new(range, (self.bottom, self.top))
    }

    fn y_axis(&self, svg: &mut Svg, y: &Scale, label: impl Fn(f64) -> String) {
        for tick in y.ticks() {
            svg.line("grid", (self.left, y.at(tick)), (self.right, y.at(tick)));
            svg.text("t end", (self.left - 6.0, y.at(tick) + 4.0), &label(tick));
        }
    }
}

/// Room for labels at the right of a picture.
fn label_margin<'a>(names: impl Iterator<Item = &'a str>, width: f64) -> f64 {
    let longest = names.map(|name| name.chars().count()).max().unwrap_or(0);
    (longest as f64 * CHARACTER + 14.0).min(width * 0.35)
}

/// Names at the right, each as near to where its line ends as the others allow.
fn end_labels(svg: &mut Svg, frame: &Frame, ends: &[(Look<'_>, Point)]) {
    let mut places: Vec<f64> = ends.iter().map(|(_, at)| at.1).collect();
    spread(&mut places, LINE, frame.bottom);
    for ((look, _), y) in ends.iter().zip(places) {
        svg.open_group(look.class);
        let room = (f64::max(svg.width() - frame.right - 10.0, 0.0) / CHARACTER) as usize;
        svg.text("t name", (frame.right + 9.0, y + 4.0), &shorten(look.short, room.max(4)));
        svg.close_group();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_break_where_they_may() {
        assert_eq!(wrap("4–9", 6), ["4–9"]);
        assert_eq!(wrap("100–299", 6), ["100–", "299"]);
        assert_eq!(wrap("more than 1000 times", 10), ["more than", "1000 times"]);
        assert_eq!(wrap("unbreakable", 6), ["unbre…"]);
        assert_eq!(wrap("", 6), [""]);
    }
}
