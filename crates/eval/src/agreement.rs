//! How well clusters agree with labels that the clustering never saw.

use std::collections::BTreeMap;

/// Points counted by cluster and label, at every level of a tree. Labels are told apart by their text.
#[derive(Clone, Debug, Default)]
pub struct Agreement<'a> {
    /// Children of a cluster per level, coarse to fine.
    branching: Vec<usize>,
    /// By level: points of a cluster that have a label.
    levels: Vec<BTreeMap<(u32, &'a str), u64>>,
}

impl<'a> Agreement<'a> {
    /// Nothing counted yet, of a tree with `branching` children per level, coarse to fine.
    pub fn new(branching: &[usize]) -> Self {
        Self { branching: branching.to_vec(), levels: vec![BTreeMap::new(); branching.len()] }
    }

    /// Counts a point of a leaf, and of the clusters above it.
    pub fn add(&mut self, leaf: u32, label: &'a str) {
        let mut cluster = leaf;
        for (counts, &children) in self.levels.iter_mut().zip(&self.branching).rev() {
            *counts.entry((cluster, label)).or_default() += 1;
            cluster /= children as u32;
        }
    }

    /// Whether no point was counted.
    pub fn is_empty(&self) -> bool {
        self.levels.first().is_none_or(BTreeMap::is_empty)
    }

    /// Levels of the tree.
    pub fn n_levels(&self) -> usize {
        self.levels.len()
    }

    /// Labels of the points of a cluster with their numbers, commonest first, ties by name.
    pub fn labels_of(&self, level: usize, cluster: u32) -> Vec<(&'a str, u64)> {
        let found = self.levels[level].range((cluster, "")..).take_while(|((found, _), _)| *found == cluster);
        let mut labels: Vec<(&str, u64)> = found.map(|(&(_, label), &n)| (label, n)).collect();
        labels.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        labels
    }

    /// Share of the points that have the commonest label of their cluster, 0 to 1; rises with the
    /// number of clusters. NaN of no points.
    pub fn purity(&self, level: usize) -> f64 {
        let mut largest: BTreeMap<u32, u64> = BTreeMap::new();
        for ((cluster, _), &n) in &self.levels[level] {
            let largest = largest.entry(*cluster).or_default();
            *largest = (*largest).max(n);
        }
        largest.values().sum::<u64>() as f64 / self.levels[level].values().sum::<u64>() as f64
    }

    /// Mutual information of cluster and label over the mean of their entropies, 0 to 1. One label in
    /// one cluster agrees wholly: 1. NaN of no points.
    pub fn normalised_mutual_information(&self, level: usize) -> f64 {
        let Margins { clusters, labels, n } = self.margins(level);
        let entropy = |counts: &mut dyn Iterator<Item = u64>| -> f64 {
            counts.map(|count| -(count as f64 / n) * (count as f64 / n).ln()).sum()
        };
        let both = entropy(&mut clusters.values().copied()) + entropy(&mut labels.values().copied());
        let share = |(&(cluster, label), &count): (&(u32, &str), &u64)| {
            let expected = clusters[&cluster] as f64 / n * (labels[label] as f64 / n);
            let found = count as f64 / n;
            found * (found / expected).ln()
        };
        let information: f64 = self.levels[level].iter().map(share).sum();
        match both {
            0.0 => 1.0,
            _ => (2.0 * information / both).clamp(0.0, 1.0),
        }
    }

    /// Adjusted Rand index (Hubert and Arabie, 1985): pairs of points on which clusters and labels
    /// agree, 0 as by chance, 1 for the same division. NaN of no points.
    pub fn adjusted_rand(&self, level: usize) -> f64 {
        let Margins { clusters, labels, n } = self.margins(level);
        let pairs = |counts: &mut dyn Iterator<Item = u64>| -> f64 {
            counts.map(|count| count as f64 * (count as f64 - 1.0) / 2.0).sum()
        };
        let together = pairs(&mut self.levels[level].values().copied());
        let (rows, columns) = (pairs(&mut clusters.into_values()), pairs(&mut labels.into_values()));
        let expected = rows * columns / (n * (n - 1.0) / 2.0).max(1.0);
        let most = (rows + columns) / 2.0;
        if most == expected { 1.0 } else { (together - expected) / (most - expected) }
    }

    fn margins(&self, level: usize) -> Margins<'a> {
        let mut margins = Margins { clusters: BTreeMap::new(), labels: BTreeMap::new(), n: 0.0 };
        for (&(cluster, label), &count) in &self.levels[level] {
            *margins.clusters.entry(cluster).or_default() += count;
            *margins.labels.entry(label).or_default() += count;
            margins.n += count as f64;
        }
        margins
    }
}

/// Points by cluster, by label, and in all.
struct Margins<'a> {
    clusters: BTreeMap<u32, u64>,
    labels: BTreeMap<&'a str, u64>,
    n: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The classic example of Manning et al., Introduction to Information Retrieval, figure 16.4: 17
    /// points of three labels in three clusters.
    fn textbook() -> Agreement<'static> {
        let mut agreement = Agreement::new(&[2, 2]);
        for (leaf, labels) in [(0, "xxxxxo"), (1, "xoooov"), (2, "xxvvv")] {
            for label in labels.split("").filter(|label| !label.is_empty()) {
                agreement.add(leaf, label);
            }
        }
        agreement
    }

    #[test]
    fn the_measures_have_their_textbook_values() {
        let agreement = textbook();
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 5e-3, "{found}");
        near(agreement.purity(1), 12.0 / 17.0); // the book: 0.71
        near(agreement.normalised_mutual_information(1), 0.36); // the book: 0.36
        // Of 136 pairs 20 are together in both; 40 in a cluster, 44 under a label:
        // (20 − 40·44/136) / (42 − 40·44/136) = 0.2429
        near(agreement.adjusted_rand(1), 0.2429);
        assert_eq!(agreement.labels_of(1, 1), [("o", 4), ("v", 1), ("x", 1)]);
        assert_eq!(agreement.labels_of(0, 0), [("x", 6), ("o", 5), ("v", 1)]);
        assert_eq!(agreement.labels_of(1, 3), []);
        near(agreement.purity(0), (6.0 + 3.0) / 17.0);
    }

    #[test]
    fn the_same_division_agrees_wholly_and_one_cluster_not_at_all() {
        let mut same = Agreement::new(&[4]);
        let mut one = Agreement::new(&[4]);
        for i in 0..40 {
            let label = ["a", "b", "c", "d"][i as usize % 4];
            same.add(3 - i % 4, label);
            one.add(0, label);
        }
        assert_eq!((same.purity(0), one.purity(0)), (1.0, 0.25));
        assert!((same.normalised_mutual_information(0) - 1.0).abs() < 1e-12);
        assert!(one.normalised_mutual_information(0).abs() < 1e-12);
        assert!((same.adjusted_rand(0) - 1.0).abs() < 1e-12 && one.adjusted_rand(0).abs() < 1e-12);
        assert!(Agreement::new(&[4]).is_empty() && !one.is_empty());
    }
}
