//! A cluster tree as one page that a person can browse: its clusters by size, what each is about, and
//! the texts at its middle and at its edge.
//!
//! [`html`] is a pure function of a [`TreePage`]. The page holds its style, its script and its data, and
//! asks the network for nothing.

use serde::Serialize;

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Characters of a text that the page shows, at most.
pub const SNIPPET_CHARS: usize = 80;

/// Clusters of a level, above which they are shown with their terms alone: the page stays of a size
/// that a browser opens.
pub const MAX_DETAILED: usize = 20_000;

/// Everything that a page shows. Levels go from coarse to fine.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TreePage {
    /// What the tree is called.
    pub name: String,
    /// Facts about it, each a name and a value ready to print.
    pub facts: Vec<(String, String)>,
    /// Children of a cluster per level.
    pub branching: Vec<usize>,
    /// Every word that is a term of some cluster.
    pub words: Vec<String>,
    /// Labels of documents; none if they have no labels.
    pub labels: Vec<String>,
    /// Sizes by level.
    pub levels: Vec<LevelRow>,
    /// By level: the clusters that are not empty, in ascending order of their index.
    pub clusters: Vec<Vec<ClusterRow>>,
}

/// Sizes of the clusters of one level.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LevelRow {
    /// Slots, the empty ones too.
    pub clusters: usize,
    /// Clusters with points. What follows is of these.
    pub non_empty: usize,
    /// Points of the smallest.
    pub min: u64,
    /// Points of the one in the middle, the lower of two.
    pub median: u64,
    /// Points of the largest.
    pub max: u64,
    /// Standard deviation of the points over their mean.
    pub variation: f64,
    /// Largest share of a parent's points, 0 to 1.
    pub largest_share: f64,
    /// The share that k-means keeps to while it trains, 0 to 1.
    pub cap: f64,
    /// Mean squared distance of the windows to their centroid; none if no window is routed.
    pub distance: Option<f64>,
    /// Agreement with the labels, if there are any.
    pub labels: Option<LabelAgreement>,
}

/// Agreement of a level with the labels: see [`Agreement`](crate::Agreement).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LabelAgreement {
    /// Share of windows that have the commonest label of their cluster.
    pub purity: f64,
    /// Normalised mutual information.
    pub nmi: f64,
    /// Adjusted Rand index.
    pub rand: f64,
}

/// One cluster that is not empty.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ClusterRow {
    /// Index within the level.
    pub i: u32,
    /// Points.
    pub n: u64,
    /// Mean squared distance of its windows to its centroid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d: Option<f32>,
    /// Terms, best first: indices into the words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub t: Vec<u32>,
    /// (label, windows), commonest first: indices into the labels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub l: Vec<(u32, u64)>,
    /// Windows of labels that are not told.
    #[serde(skip_serializing_if = "is_zero")]
    pub m: u64,
    /// Windows nearest to the centroid, of different documents, nearest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub near: Vec<Snippet>,
    /// The farthest, farthest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub far: Vec<Snippet>,
}

/// A window of a document.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Snippet {
    /// Number of the document, in the order of the corpus from 0.
    pub doc: u32,
    /// Its label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Squared distance to the centroid.
    pub distance: f32,
    /// Its first words.
    pub text: String,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The first words of a text on one line, at most [`SNIPPET_CHARS`] characters, the last of them "…"
/// where some are left off.
pub fn snippet(text: &str) -> String {
    let mut line = String::new();
    for word in text.split_whitespace() {
        if line.len() > 4 * SNIPPET_CHARS {
            break;
        }
        line += if line.is_empty() { "" } else { " " };
        line += word;
    }
    match line.char_indices().nth(SNIPPET_CHARS) {
        None => line,
        Some(_) => line.chars().take(SNIPPET_CHARS - 1).chain(['…']).collect(),
    }
}

/// The tree as one HTML page that needs nothing else: no font, no network. Fails on nothing that a
/// [`TreePage`] can hold; a number that is not finite is shown as "–".
///
/// # Errors
/// When the data cannot be written as JSON.
pub fn html(page: &TreePage) -> serde_json::Result<String> {
    // In a script element `<` could begin a tag that ends it; in JSON it stands within strings alone.
    let data = serde_json::to_string(page)?.replace('<', "\\u003c");
    // The data comes last: it may hold what stands for the other parts.
    let parts = [("{style}", STYLE), ("{script}", SCRIPT), ("{data}", &data)];
    Ok(parts.into_iter().fold(PAGE.to_owned(), |page, (place, part)| page.replacen(place, part, 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> TreePage {
        let hostile = "</script><script>alert(1)</script><!-- {style} {script} {data}";
        TreePage {
            name: hostile.into(),
            branching: vec![2],
            words: vec!["star".into()],
            labels: vec![hostile.into()],
            levels: vec![LevelRow { clusters: 2, variation: f64::NAN, ..LevelRow::default() }],
            clusters: vec![vec![ClusterRow {
                n: 3,
                t: vec![0],
                l: vec![(0, 3)],
                near: vec![Snippet { text: hostile.into(), ..Snippet::default() }],
                ..ClusterRow::default()
            }]],
            ..TreePage::default()
        }
    }

    #[test]
    fn the_page_holds_its_data_whatever_it_says_and_needs_no_network() {
        let html = html(&page()).unwrap();
        assert_eq!(html.matches("</script>").count(), 2, "one of the data and one of the code");
        assert_eq!((html.matches("<script").count(), html.matches("<!--").count()), (2, 0));
        let (_, rest) = html.split_once("<script type=\"application/json\" id=\"data\">").unwrap();
        let data: serde_json::Value = serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap();
        assert_eq!(data["name"], page().name);
        assert_eq!(data["clusters"][0][0]["near"][0]["text"], page().name);
        assert!(data["levels"][0]["variation"].is_null());
        for outside in ["http:", "https:", "url(", "@import", "<link", "<img", "src=", "innerHTML", "eval("] {
            assert!(!html.contains(outside), "{outside}");
        }
    }

    #[test]
    fn snippets_are_one_short_line() {
        assert_eq!(snippet("  Stars\n\tshine "), "Stars shine");
        let long = snippet(&"größer ".repeat(100));
        assert!(long.chars().count() == SNIPPET_CHARS && long.ends_with('…'), "{long}");
        assert_eq!(snippet(&"x".repeat(SNIPPET_CHARS)).len(), SNIPPET_CHARS);
    }
}
