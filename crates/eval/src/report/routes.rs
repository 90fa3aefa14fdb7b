//! The page of a study of routers: do they find the nearest leaf, what does a miss cost, and are short prompts
//! routed as the whole text is?

use serde::Serialize;

use super::RecallRow;
use super::charts::{RecallChart, interval};
use super::format::{ABSENT, compact, count, decimal, escape, percent, sentence_list, spoken_percent};
use super::page::Frame;
use super::palette::look;
use super::sections::{figure, section};
use super::tables::{name, number, recall_table, table};
use crate::Rate;

/// All that a study of a run's routers measured.
///
/// Routers are named `exact`, `beam`, `greedy`, `hnsw`, `prototypes`, `random` and `oracle`: these have a colour
/// and a mark of their own.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RouteStudy {
    /// The run's name.
    pub run: String,
    /// The router that the run is configured with.
    pub own: String,
    /// Facts about the study, each a name and a value ready to print.
    pub summary: Vec<(String, String)>,
    /// What was measured of each router.
    pub routers: Vec<RouterStudy>,
}

/// What was measured of one router.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RouterStudy {
    /// Its name.
    pub router: String,
    /// Embeddings routed a second, on one thread.
    pub routes_per_s: f64,
    /// By kind of text, the same kinds in the same order for every router.
    pub texts: Vec<TextAgreement>,
    /// The loss under its paths; none without memory.
    pub loss: Option<MissLoss>,
}

/// Where a router sends texts of one kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TextAgreement {
    /// The kind: "held-out windows", "8 words".
    pub texts: String,
    /// Share sent to the cluster that the exact nearest leaf lies in, by level, coarse to fine: the last is the
    /// leaf itself. Empty where the router was not asked.
    pub exact: Vec<Rate>,
    /// Mean of what the squared distance to its leaf is above that to the nearest.
    pub excess_distance: Option<f64>,
    /// Of prompts: share sent to the cluster that the router sends the whole window to, by level. Else empty.
    pub whole: Vec<Rate>,
}

/// The loss on held-out windows under a router's paths, nats per token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MissLoss {
    /// On all windows.
    pub loss: Rate,
    /// The same less that under the paths of the exact nearest leaves, window by window.
    pub above_exact: Rate,
    /// Windows whose leaf is not the nearest.
    pub missed: usize,
    /// On these alone; none if there are none.
    pub of_missed: Option<MissedLoss>,
}

/// The loss on the windows that a router missed the nearest leaf of, nats per token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MissedLoss {
    /// Under the router's paths.
    pub loss: f64,
    /// Under those of the nearest leaves.
    pub exact: f64,
    /// Under random ones.
    pub random: f64,
    /// The first less the second, window by window: what a miss costs.
    pub cost: Rate,
}

/// The study as one HTML page that needs nothing else, in the manner of [`super::html`].
pub fn route_study_html(study: &RouteStudy) -> String {
    let sections: String =
        [agreement(study), loss(study), prompts(study), speed(study)].into_iter().flatten().collect();
    let frame = Frame { kind: "Route study", run: &study.run, summary: &study.summary };
    frame.page(&findings(study), &sections)
}

/// Sentences about the study, the most telling first; never empty.
fn findings(study: &RouteStudy) -> Vec<String> {
    let own = study.routers.iter().find(|router| router.router == study.own);
    let shares = own.into_iter().flat_map(|own| &own.texts).filter_map(|texts| {
        Some(format!("{} of {}", spoken_percent(texts.exact.last()?.mean), kind(&texts.texts)))
    });
    let shares: Vec<String> = shares.collect();
    let subject = look(&study.own).short;
    let mut found = vec![match shares.is_empty() {
        true => "Nothing was routed.".to_string(),
        false => format!("Routing by {subject} names the nearest leaf of {}.", sentence_list(&shares)),
    }];
    let whole = own.into_iter().flat_map(|own| &own.texts).filter_map(|texts| {
        Some(format!("{} by {}", spoken_percent(texts.whole.last()?.mean), kind(&texts.texts)))
    });
    let whole: Vec<String> = whole.collect();
    if !whole.is_empty() {
        let whole = sentence_list(&whole);
        found.push(format!("Of held-out windows, the leaf of the whole text is found for {whole}."));
    }
    for router in &study.routers {
        let Some(missed) = router.loss.as_ref().and_then(|loss| loss.of_missed.as_ref()) else { continue };
        if ["greedy", "random"].contains(&router.router.as_str()) {
            let cost = decimal(missed.cost.mean, 3);
            found
                .push(format!("A miss of {} routing costs {cost} nats a token.", look(&router.router).short));
        }
    }
    found
}

/// A kind of text in a sentence.
fn kind(texts: &str) -> String {
    match texts.ends_with(" words") {
        true => format!("the first {texts}"),
        false => texts.to_string(),
    }
}

/// The shares of each router by kind of text, of kinds that `keep` admits.
fn rows(study: &RouteStudy, share: impl Fn(&TextAgreement) -> Option<Rate>) -> Vec<RecallRow> {
    let row = |router: &RouterStudy| RecallRow {
        memory: router.router.clone(),
        buckets: router.texts.iter().map(&share).collect(),
    };
    study.routers.iter().map(row).filter(|row| row.buckets.iter().any(Option::is_some)).collect()
}

/// The kinds of text, in the order of the rows.
fn kinds(study: &RouteStudy) -> Vec<String> {
    study.routers.first().map_or(vec![], |router| router.texts.iter().map(|t| t.texts.clone()).collect())
}

fn n_levels(study: &RouteStudy) -> usize {
    let texts = study.routers.iter().flat_map(|router| &router.texts);
    texts.map(|texts| texts.exact.len()).max().unwrap_or(0)
}

/// One chart a level above the leaves, `share` of its rows.
fn level_panels(n_levels: usize, draw: impl Fn(usize) -> String) -> String {
    let panel = |level: usize| {
        format!("<figure><figcaption>Level {}</figcaption>{}</figure>\n", level + 1, draw(level))
    };
    let panels: String = (0..n_levels.saturating_sub(1)).map(panel).collect();
    match panels.is_empty() {
        true => panels,
        false => format!("<div class=\"panels two\">\n{panels}</div>\n"),
    }
}

fn agreement(study: &RouteStudy) -> Option<String> {
    let (n, buckets) = (n_levels(study), kinds(study));
    // The judge agrees with itself.
    let judged = |level: usize| -> Vec<RecallRow> {
        let rows = rows(study, |texts| texts.exact.get(level).copied());
        rows.into_iter().filter(|row| row.memory != "exact").collect()
    };
    let leaf = judged(n.checked_sub(1)?);
    let draw = |rows: &[RecallRow], (width, height)| {
        let across = "kind of text, for router";
        let chart = RecallChart { rows, buckets: &buckets, across, measure: "same cluster as exact" };
        chart.draw(width, height)
    };
    let about = "The share of texts sent to the leaf whose centroid is nearest of all. Windows are what was \
                 clustered; words are the beginnings of held-out windows. Bars are 95\u{202f}% intervals. Above \
                 the leaves: the share sent to the cluster that the nearest leaf lies in.";
    let body = figure(|width, height| draw(&leaf, (width, height)))
        + &recall_table(&leaf, &buckets, ("nearest leaf found, %", "texts"))
        + &level_panels(n, |level| draw(&judged(level), (348.0, 250.0)));
    (!leaf.is_empty()).then(|| section("Agreement with the nearest leaf", about, &body))
}

fn loss(study: &RouteStudy) -> Option<String> {
    let row = |router: &RouterStudy| {
        let loss = router.loss.as_ref()?;
        let with_interval = |rate: &Rate| {
            let interval = format!("{}–{}", decimal(rate.low, 3), decimal(rate.high, 3));
            number(&format!("{}<small>{interval}</small>", decimal(rate.mean, 3)))
        };
        let of_missed = match &loss.of_missed {
            None => number(ABSENT).repeat(4),
            Some(missed) => {
                let means = [missed.loss, missed.exact, missed.random];
                means.map(|mean| number(&decimal(mean, 3))).concat() + &with_interval(&missed.cost)
            }
        };
        Some(format!(
            "<th scope=\"row\">{}</th>{}{}{}{of_missed}",
            name(&router.router),
            with_interval(&loss.loss),
            with_interval(&loss.above_exact),
            number(&format!("{} of {}", count(loss.missed as u64), count(loss.loss.n as u64))),
        ))
    };
    let rows: Vec<String> = study.routers.iter().filter_map(row).collect();
    let heads = [
        "all windows",
        "above exact",
        "missed",
        "on the missed",
        "exact on these",
        "random on these",
        "what a miss costs",
    ];
    let heads: String = heads.iter().map(|head| format!("<th class=\"n\">{head}</th>")).collect();
    let about = "Held-out windows read with the memory that each router names, nats per token. A miss costs what the \
                 loss on the missed windows is above that under their nearest leaf; with random leaves nearly every \
                 window is a miss.";
    let body = table("held-out loss by router", &format!("<th>router</th>{heads}"), &rows);
    (!rows.is_empty()).then(|| section("What a miss costs", about, &body))
}

fn prompts(study: &RouteStudy) -> Option<String> {
    let n = n_levels(study);
    let is_prompt: Vec<bool> = (0..kinds(study).len())
        .map(|i| study.routers.iter().any(|router| !router.texts[i].whole.is_empty()))
        .collect();
    let only = |values: Vec<RecallRow>| -> Vec<RecallRow> {
        let keep = |buckets: Vec<Option<Rate>>| {
            buckets.into_iter().zip(&is_prompt).filter(|(_, keep)| **keep).map(|(rate, _)| rate).collect()
        };
        values.into_iter().map(|row| RecallRow { buckets: keep(row.buckets), ..row }).collect()
    };
    let buckets: Vec<String> =
        kinds(study).into_iter().zip(&is_prompt).filter(|(_, keep)| **keep).map(|(kind, _)| kind).collect();
    let at = |level: usize| only(rows(study, |texts| texts.whole.get(level).copied()));
    let leaf = at(n.checked_sub(1)?);
    let draw = |rows: &[RecallRow], (width, height)| {
        let across = "words of the prompt, for router";
        let chart =
            RecallChart { rows, buckets: &buckets, across, measure: "same cluster as the whole window" };
        chart.draw(width, height)
    };
    let about = "Training routes whole windows; a prompt is shorter. The share of held-out windows whose first words \
                 are sent to the leaf (and, above, to the cluster) that the same router sends the whole window to.";
    let body = figure(|width, height| draw(&leaf, (width, height * 0.85)))
        + &recall_table(&leaf, &buckets, ("leaf of the whole window, %", "prompts"))
        + &level_panels(n, |level| draw(&at(level), (348.0, 250.0)));
    (!leaf.is_empty()).then(|| section("Short prompts", about, &body))
}

fn speed(study: &RouteStudy) -> Option<String> {
    let kinds = kinds(study);
    let heads: String = kinds.iter().map(|kind| format!("<th class=\"n\">{}</th>", escape(kind))).collect();
    let row = |router: &RouterStudy| {
        let excess = router.texts.iter().map(|texts| {
            number(&texts.excess_distance.map_or(ABSENT.to_string(), |excess| decimal(excess, 4)))
        });
        let excess: String = excess.collect();
        let speed = number(&compact(router.routes_per_s));
        format!("<th scope=\"row\">{}</th>{speed}{excess}", name(&router.router))
    };
    let rows: Vec<String> = study.routers.iter().map(row).collect();
    let about = "Embeddings routed a second on one thread, and how far a miss is: the mean of the squared distance \
                 to the leaf found, less that to the nearest, by kind of text.";
    let head = format!("<th>router</th><th class=\"n\">routes a second</th>{heads}");
    (!rows.is_empty())
        .then(|| section("Speed and distance", about, &table("speed and distance by router", &head, &rows)))
}

/// The study as text: one line a router.
impl std::fmt::Display for RouteStudy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "nearest leaf found, % [95 % interval]")?;
        write!(f, "{:<12}{:>10}", "router", "routes/s")?;
        for kind in kinds(self) {
            write!(f, "  {kind:>22}")?;
        }
        writeln!(f)?;
        let share = |rates: &[Rate]| {
            let rate = |rate: &Rate| format!("{} [{}]", percent(rate.mean, 1), interval(rate));
            rates.last().map_or(ABSENT.into(), rate)
        };
        for router in &self.routers {
            write!(f, "{:<12}{:>10.0}", router.router, router.routes_per_s)?;
            for texts in &router.texts {
                write!(f, "  {:>22}", share(&texts.exact))?;
            }
            writeln!(f)?;
        }
        let asked = |router: &&RouterStudy| router.texts.iter().any(|texts| !texts.whole.is_empty());
        if self.routers.iter().any(|router| asked(&router)) {
            writeln!(f, "\nprompts sent to the leaf of their whole window, %")?;
        }
        for router in self.routers.iter().filter(asked) {
            write!(f, "{:<22}", router.router)?;
            for texts in &router.texts {
                write!(f, "  {:>22}", share(&texts.whole))?;
            }
            writeln!(f)?;
        }
        if self.routers.iter().any(|router| router.loss.is_some()) {
            writeln!(f, "\nheld-out loss, nats per token")?;
            writeln!(
                f,
                "{:<12}{:>10}{:>14}{:>14}{:>14}{:>14}{:>14}{:>14}",
                "router", "loss", "above exact", "missed", "on missed", "exact there", "random there", "cost"
            )?;
        }
        for router in &self.routers {
            let Some(loss) = &router.loss else { continue };
            write!(f, "{:<12}{:>10.4}{:>14.4}", router.router, loss.loss.mean, loss.above_exact.mean)?;
            write!(f, "{:>14}", format!("{} of {}", loss.missed, loss.loss.n))?;
            match &loss.of_missed {
                Some(m) => {
                    writeln!(f, "{:>14.4}{:>14.4}{:>14.4}{:>14.4}", m.loss, m.exact, m.random, m.cost.mean)?
                }
                None => writeln!(f, "{ABSENT:>14}{ABSENT:>14}{ABSENT:>14}{ABSENT:>14}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(mean: f64) -> Rate {
        Rate { mean, low: mean - 0.05, high: mean + 0.05, n: 200 }
    }

    /// Two routers on held-out windows and their first 8 words; greedy routing misses some.
    fn study() -> RouteStudy {
        let router = |name: &str, exact: [f64; 2], loss: f64| {
            let texts = |(kind, level_0, whole): (&str, f64, Vec<Rate>)| TextAgreement {
                texts: kind.into(),
                exact: vec![rate(level_0), rate(exact[usize::from(!whole.is_empty())])],
                excess_distance: Some(0.0125),
                whole,
            };
            let missed =
                MissedLoss { loss: 2.25, exact: 2.0, random: 3.5, cost: Rate { mean: 0.25, ..rate(0.25) } };
            let of_missed = (exact[0] < 1.0).then_some(missed);
            RouterStudy {
                router: name.into(),
                routes_per_s: 12_345.0,
                texts: [("held-out windows", 0.975, vec![]), ("8 words", 0.9, vec![rate(0.8), rate(0.7)])]
                    .map(texts)
                    .to_vec(),
                loss: Some(MissLoss {
                    loss: rate(loss),
                    above_exact: rate(loss - 2.0),
                    missed: 17,
                    of_missed,
                }),
            }
        };
        RouteStudy {
            run: "runs/<a>".into(),
            own: "greedy".into(),
            summary: vec![("beam".into(), "4".into())],
            routers: vec![router("exact", [1.0, 1.0], 2.0), router("greedy", [0.95, 0.85], 2.125)],
        }
    }

    #[test]
    fn the_page_tells_what_was_measured() {
        let page = route_study_html(&study());
        for part in [
            "Routing by greedy names the nearest leaf of 95\u{202f}% of held-out windows and 85\u{202f}% of the first 8",
            "the leaf of the whole text is found for 70\u{202f}% by the first 8 words.",
            "A miss of greedy routing costs 0.250 nats a token.",
            "runs/&lt;a&gt; · route study",
            "<h2>Agreement with the nearest leaf</h2>",
            "<h2>What a miss costs</h2>",
            "<h2>Short prompts</h2>",
            "<h2>Speed and distance</h2>",
            "<td class=\"n\">17 of 200</td>",
            "12.3\u{202f}k",
            "<figcaption>Level 1</figcaption>",
        ] {
            assert!(page.contains(part), "no {part} in {page}");
        }
        assert!(!page.contains("Level 2") && !page.contains("NaN"), "{page}");
    }

    #[test]
    fn the_table_has_a_line_a_router_and_no_loss_without_memory() {
        let mut study = study();
        let text = study.to_string();
        assert_eq!(text.lines().filter(|line| line.starts_with("greedy ")).count(), 3, "{text}");
        assert!(text.contains("95.0 [90.0–100.0]") && text.contains("17 of 200"), "{text}");
        study.routers.iter_mut().for_each(|router| router.loss = None);
        assert!(!study.to_string().contains("loss"));
        assert!(!route_study_html(&study).contains("What a miss costs"));
    }

    #[test]
    fn a_study_of_nothing_is_a_page_too() {
        let page = route_study_html(&RouteStudy::default());
        assert!(page.contains("Nothing was routed.") && !page.contains("<section>"), "{page}");
    }
}
