//! `anchorage tree purity`.

use anyhow::{Result, bail};
use eval::Agreement;
use eval::tree_page::LabelAgreement;

use super::{Opened, survey};

/// The three measures of a level.
pub(super) fn measures(agreement: &Agreement, level: usize) -> LabelAgreement {
    LabelAgreement {
        purity: agreement.purity(level),
        nmi: agreement.normalised_mutual_information(level),
        rand: agreement.adjusted_rand(level),
    }
}

pub(super) fn purity(opened: &Opened, json: bool) -> Result<()> {
    let store = &opened.windows.store;
    let agreement = survey::agreement(store, &opened.leaves()?, &opened.branching())?;
    if agreement.is_empty() {
        bail!(
            "{}: no document has a label, expected corpus.label_key to name one",
            opened.prepared.dir.display()
        );
    }
    let levels: Vec<LabelAgreement> =
        (0..agreement.n_levels()).map(|level| measures(&agreement, level)).collect();
    if json {
        let labels = store.labels();
        println!("{}", serde_json::json!({ "labels": labels, "levels": levels }));
        return Ok(());
    }
    println!("{} labels, training windows", store.labels().len());
    println!("{:>5} {:>9} {:>8} {:>8} {:>8}", "level", "clusters", "purity", "NMI", "ARI");
    for (level, measured) in levels.iter().enumerate() {
        println!(
            "{:>5} {:>9} {:>8} {:>8.3} {:>8.3}",
            level + 1,
            opened.tree.n_clusters(level),
            super::percent(measured.purity),
            measured.nmi,
            measured.rand
        );
    }
    Ok(())
}
