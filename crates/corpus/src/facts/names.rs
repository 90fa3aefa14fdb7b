//! Names of fictional entities. A family shares a root and a region shares syllables, so that
//! character n-grams carry the locality that a cluster tree finds in real text.

use std::collections::BTreeSet;

use rand::Rng;
use rand::seq::SliceRandom;
use serde::Deserialize;

use super::error::{Error, Result};

const FILE: &str = "names.json";

/// What names are made of.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Names {
    /// Given names, shared by all families.
    pub(super) given: Vec<String>,
    /// Words that follow a root in the name of a company.
    pub(super) company: Vec<String>,
    /// Patterns of place names, with `{}` where the root goes.
    pub(super) place: Vec<String>,
    regions: Vec<Region>,
}

/// Syllables of one region: a root is a first, a middle (may be empty) and a last one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    first: Vec<String>,
    middle: Vec<String>,
    last: Vec<String>,
}

impl Region {
    fn roots(&self) -> Vec<String> {
        let mut roots = Vec::new();
        for first in &self.first {
            for middle in &self.middle {
                roots.extend(self.last.iter().map(|last| format!("{first}{middle}{last}")));
            }
        }
        roots
    }
}

impl Names {
    /// Parses `text`; no root of any region may begin another, or two families could be confused.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let names: Self = serde_json::from_str(text).map_err(|source| Error::Json { file: FILE, source })?;
        let fault = |place: &str, expected: &str, found: String| Error::Data {
            file: FILE,
            place: place.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        for (place, list) in [("given", &names.given), ("company", &names.company), ("place", &names.place)] {
            let distinct = list.iter().collect::<BTreeSet<_>>().len();
            if distinct != list.len() {
                return Err(fault(place, "distinct entries", format!("{} repeated", list.len() - distinct)));
            }
        }
        if let Some(pattern) = names.place.iter().find(|pattern| pattern.matches("{}").count() != 1) {
            return Err(fault("place", "one {} in each pattern", format!("{pattern:?}")));
        }
        let mut roots: Vec<String> = names.regions.iter().flat_map(Region::roots).collect();
        // Sorted, a root that begins another stands right before one that it begins.
        roots.sort_unstable();
        match roots.windows(2).find(|pair| pair[1].starts_with(&pair[0])) {
            Some(pair) => Err(fault("regions", "roots of which none begins another", format!("{pair:?}"))),
            None => Ok(names),
        }
    }

    /// Families that can be named: they are dealt evenly over the regions, so the region with the
    /// fewest roots sets the limit.
    pub(super) fn max_families(&self) -> usize {
        let fewest = self.regions.iter().map(|region| region.roots().len()).min();
        fewest.unwrap_or(0) * self.regions.len()
    }

    /// Roots of `n` families, at most [`Names::max_families`]; family i is of region i mod regions.
    pub(super) fn roots(&self, n: usize, rng: &mut impl Rng) -> Vec<String> {
        let mut by_region: Vec<Vec<String>> = self.regions.iter().map(Region::roots).collect();
        by_region.iter_mut().for_each(|roots| roots.shuffle(rng));
        (0..n).map(|i| by_region[i % self.regions.len()][i / self.regions.len()].clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(regions: &str, place: &str) -> Result<Names> {
        Names::parse(&format!(
            r#"{{"given": ["Alba"], "company": ["Mills"], "place": {place}, "regions": {regions}}}"#
        ))
    }

    #[test]
    fn refuses_names_that_could_be_confused() {
        let good = r#"[{"first": ["Ren"], "middle": ["", "en"], "last": ["wick"]}]"#;
        assert_eq!(parse(good, r#"["Port {}"]"#).unwrap().max_families(), 2);
        let message = |result: Result<Names>| result.unwrap_err().to_string();
        let nested = r#"[{"first": ["Ren"], "middle": [""], "last": ["wick", "wickham"]}]"#;
        assert_eq!(
            message(parse(nested, r#"["Port {}"]"#)),
            r#"facts data names.json, regions: expected roots of which none begins another, found ["Renwick", "Renwickham"]"#
        );
        assert_eq!(
            message(parse(good, r#"["Port"]"#)),
            r#"facts data names.json, place: expected one {} in each pattern, found "Port""#
        );
        assert_eq!(
            message(parse(good, r#"["Port {}", "Port {}"]"#)),
            "facts data names.json, place: expected distinct entries, found 1 repeated"
        );
        assert!(message(Names::parse("{}")).starts_with("facts file names.json: missing field"));
    }
}
