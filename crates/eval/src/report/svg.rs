//! A picture as text: the few shapes that the charts are made of.
//!
//! Colours and strokes come from the page's style sheet by class. Coordinates are in CSS pixels, y downwards,
//! and must be finite.

use std::fmt::Write;

use super::format::escape;
use super::palette::{Look, Mark};

/// A place: (x, y).
pub(super) type Point = (f64, f64);

/// A picture being drawn.
pub(super) struct Svg {
    width: f64,
    height: f64,
    body: String,
}

impl Svg {
    pub(super) fn new(width: f64, height: f64) -> Self {
        Self { width, height, body: String::new() }
    }

    pub(super) fn width(&self) -> f64 {
        self.width
    }

    pub(super) fn open_group(&mut self, class: &str) {
        self.put(format_args!("<g class=\"{class}\">"));
    }

    pub(super) fn close_group(&mut self) {
        self.body.push_str("</g>");
    }

    pub(super) fn line(&mut self, class: &str, from: Point, to: Point) {
        let (x1, y1, x2, y2) = (px(from.0), px(from.1), px(to.0), px(to.1));
        self.put(format_args!("<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>"));
    }

    /// A line through `points`, broken where one is missing.
    pub(super) fn polyline(&mut self, class: &str, points: impl Iterator<Item = Option<Point>>) {
        let mut d = String::new();
        let mut pen_down = false;
        for point in points {
            if let Some((x, y)) = point {
                let command = if pen_down { 'L' } else { 'M' };
                // Writing to a String cannot fail.
                let _ = write!(d, "{command}{} {}", px(x), px(y));
            }
            pen_down = point.is_some();
        }
        self.path(class, &d);
    }

    pub(super) fn path(&mut self, class: &str, d: &str) {
        if !d.is_empty() {
            self.put(format_args!("<path class=\"{class}\" d=\"{d}\"/>"));
        }
    }

    pub(super) fn text(&mut self, class: &str, at: Point, text: &str) {
        let (x, y, text) = (px(at.0), px(at.1), escape(text));
        self.put(format_args!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{text}</text>"));
    }

    pub(super) fn dot(&mut self, at: Point, radius: f64) {
        let (x, y, r) = (px(at.0), px(at.1), px(radius));
        self.put(format_args!("<circle class=\"fill\" cx=\"{x}\" cy=\"{y}\" r=\"{r}\"/>"));
    }

    /// The mark of a memory in the colour of the group around it; a title shows when pointed at.
    pub(super) fn mark(&mut self, mark: Mark, (x, y): Point, title: Option<&str>) {
        let title = title.map_or(String::new(), |title| format!("<title>{}</title>", escape(title)));
        let path = match mark {
            Mark::Disc | Mark::Ring => {
                let class = if mark == Mark::Ring { "ring" } else { "fill" };
                let (x, y) = (px(x), px(y));
                let shape =
                    format_args!("<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"4\">{title}</circle>");
                return self.put(shape);
            }
            Mark::Square => "-3.6-3.6h7.2v7.2h-7.2z",
            Mark::Diamond => "0-5l5 5-5 5-5-5z",
            Mark::Triangle => "0-4.8l4.8 8.4h-9.6z",
            Mark::Cross => "-3.5-3.5l7 7m0-7l-7 7",
        };
        let class = if mark == Mark::Cross { "stroke" } else { "fill" };
        let (x, y) = (px(x), px(y));
        self.put(format_args!("<path class=\"{class}\" d=\"M{x} {y}m{path}\">{title}</path>"));
    }

    /// The finished picture; `label` says in words what it shows.
    pub(super) fn finish(self, class: &str, label: &str) -> String {
        let (width, height, label) = (px(self.width), px(self.height), escape(label));
        format!(
            "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
             role=\"img\" aria-label=\"{label}\"><title>{label}</title>{}</svg>",
            self.body
        )
    }

    fn put(&mut self, shape: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(shape);
    }
}

/// The mark of a memory alone, as a key in running text; its name stands beside it.
pub(super) fn key(look: Look<'_>) -> String {
    let mut svg = Svg::new(12.0, 12.0);
    svg.open_group(look.class);
    svg.mark(look.mark, (6.0, 6.0), None);
    svg.close_group();
    svg.finish("key", look.short)
}

/// A coordinate at a tenth of a pixel, as short as it goes.
pub(super) fn px(x: f64) -> String {
    let text = format!("{:.1}", x);
    match text.strip_suffix(".0") {
        Some("-0") => "0".into(),
        Some(whole) => whole.into(),
        None => text,
    }
}
