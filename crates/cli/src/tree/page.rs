//! `anchorage tree inspect --html`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use eval::LevelTerms;
use eval::tree_page::{self, ClusterRow, MAX_DETAILED, TreePage};

use super::Opened;
use super::inspect::{N_TERMS, levels, snippets, texts_by_leaf, vocabulary};
use super::survey::Survey;
use crate::run::write_whole;

/// Terms of a cluster of a level that has too many for more.
const N_FEW_TERMS: usize = 5;

/// Labels of a cluster that the page tells.
const N_LABELS: usize = 12;

/// Writes the page, to `file` or beside the tree.
pub(super) fn write(opened: &Opened, survey: &Survey, file: Option<PathBuf>) -> Result<()> {
    let file = file.unwrap_or_else(|| opened.prepared.dir.join("tree.html"));
    let page = page(opened, survey)?;
    let html = tree_page::html(&page).with_context(|| format!("{}", file.display()))?;
    write_whole(&file, html.as_bytes())?;
    eprintln!("page: {} ({} kB)", file.display(), html.len() >> 10);
    Ok(())
}

pub(super) fn page(opened: &Opened, survey: &Survey) -> Result<TreePage> {
    let branching = opened.branching();
    let vocabulary = vocabulary(opened)?;
    let texts = texts_by_leaf(opened, &survey.leaves);
    let mut terms = vocabulary.tree_terms(&branching, &survey.n_used(), texts, N_TERMS)?;
    for (level, terms) in terms.iter_mut().enumerate() {
        if is_crowded(opened, level) {
            terms.values_mut().for_each(|terms| terms.truncate(N_FEW_TERMS));
        }
    }
    // Only the words that are used, in the order of the vocabulary.
    let used = terms.iter().flat_map(LevelTerms::values).flatten().map(|&(id, _)| (id, 0));
    let mut places: BTreeMap<u32, u32> = used.collect();
    (0..).zip(places.values_mut()).for_each(|(place, value)| *value = place);
    let labels: Vec<String> = match survey.labels.is_empty() {
        true => vec![],
        false => opened.windows.store.labels().to_vec(),
    };
    let builder = Builder { opened, survey, labels: &labels };
    let clusters = terms.iter().enumerate().map(|(level, terms)| builder.level(level, terms, &places));
    Ok(TreePage {
        name: opened.prepared.dir.display().to_string(),
        facts: facts(opened, survey),
        words: places.keys().map(|&id| vocabulary.word(id).to_owned()).collect(),
        levels: levels(opened, survey)?,
        clusters: clusters.collect::<Result<_>>()?,
        branching,
        labels,
    })
}

/// Whether a level has too many clusters to show texts and labels of each.
fn is_crowded(opened: &Opened, level: usize) -> bool {
    opened.tree.counts(level).iter().filter(|&&count| count > 0).count() > MAX_DETAILED
}

fn facts(opened: &Opened, survey: &Survey) -> Vec<(String, String)> {
    let store = &opened.windows.store;
    [
        ("tree", opened.tree.hash()[..12].to_owned()),
        ("dimensions", opened.tree.dim().to_string()),
        ("documents", store.n_documents().to_string()),
        ("windows", survey.leaves.len().to_string()),
        ("tokens", store.n_tokens().to_string()),
        ("routed by", format!("a beam of {}", opened.config.tree.beam)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// Makes the clusters of a page.
struct Builder<'a> {
    opened: &'a Opened,
    survey: &'a Survey<'a>,
    labels: &'a [String],
}

impl Builder<'_> {
    /// The clusters of a level; `places` is where a word of the vocabulary stands on the page.
    fn level(
        &self,
        level: usize,
        terms: &LevelTerms,
        places: &BTreeMap<u32, u32>,
    ) -> Result<Vec<ClusterRow>> {
        let detailed = !is_crowded(self.opened, level);
        let positions: BTreeMap<&str, u32> = self.labels.iter().map(String::as_str).zip(0..).collect();
        let counts = self.opened.tree.counts(level).iter().zip(0..).filter(|(count, _)| **count > 0);
        let row = |(&count, index): (&u64, u32)| -> Result<ClusterRow> {
            let terms = terms.get(&index).into_iter().flatten().map(|(id, _)| places[id]).collect();
            let row = ClusterRow { i: index, n: count, t: terms, ..ClusterRow::default() };
            if !detailed {
                return Ok(row);
            }
            let members = &self.survey.clusters[level][index as usize];
            let labels = self.survey.labels.labels_of(level, index);
            Ok(ClusterRow {
                d: members.distance().map(|distance| distance as f32),
                l: labels.iter().take(N_LABELS).map(|(label, n)| (positions[label], *n)).collect(),
                m: labels.iter().skip(N_LABELS).map(|(_, n)| n).sum(),
                near: snippets(self.opened, &members.nearest)?,
                far: snippets(self.opened, &members.farthest)?,
                ..row
            })
        };
        counts.map(row).collect()
    }
}
