//! What is known before anything is drawn: the data files, read and checked.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::Kind;
use super::error::{Error, Result};
use super::names::Names;
use super::template::Template;

const TEMPLATES: &str = "templates.json";
const VALUES: &str = "values.json";
/// Values of a fictional relation: enough that a guess is worth little, few enough to be learned.
const VALUE_COUNTS: std::ops::RangeInclusive<usize> = 32..=64;
/// Training templates of a relation, at least.
const MIN_TRAIN: usize = 4;

/// The data files as one value.
pub(super) struct Catalog {
    pub(super) names: Names,
    /// Elements, then countries, in the order of their files.
    pub(super) real: Vec<RealEntity>,
    kinds: BTreeMap<Kind, KindCatalog>,
}

/// How entities of one kind are told.
pub(super) struct KindCatalog {
    /// Opening sentences, with `{e}` for the entity.
    pub(super) openings: Vec<String>,
    pub(super) relations: Vec<Relation>,
}

/// One attribute of a kind, and the sentences that state it.
pub(super) struct Relation {
    pub(super) name: String,
    /// All values that the relation takes, distinct.
    pub(super) pool: Vec<String>,
    pub(super) train: Vec<Template>,
    /// Templates kept out of the corpus; each can be asked.
    pub(super) held_out: Vec<Template>,
}

/// An element or a country.
pub(super) struct RealEntity {
    pub(super) kind: Kind,
    pub(super) name: String,
    /// (index of the relation, value); what is contested is absent.
    pub(super) facts: Vec<(usize, String)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KindEntry {
    openings: Vec<String>,
    relations: Vec<RelationEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RelationEntry {
    relation: String,
    /// Key of values.json, or column of the table of the kind.
    values: String,
    train: Vec<String>,
    held_out: Vec<String>,
}

impl Catalog {
    /// Reads the files that are part of the build.
    pub(super) fn embedded() -> Result<Self> {
        let elements = Table::parse("elements.csv", include_str!("../../data/elements.csv"))?;
        let countries = Table::parse("countries.csv", include_str!("../../data/countries.csv"))?;
        let entries = json(TEMPLATES, include_str!("../../data/templates.json"))?;
        let values = json(VALUES, include_str!("../../data/values.json"))?;
        let names = Names::parse(include_str!("../../data/names.json"))?;
        let tables = BTreeMap::from([(Kind::Element, elements), (Kind::Country, countries)]);
        Self::assemble(names, &tables, entries, &values)
    }

    fn assemble(
        names: Names,
        tables: &BTreeMap<Kind, Table>,
        entries: BTreeMap<Kind, KindEntry>,
        values: &BTreeMap<String, Vec<String>>,
    ) -> Result<Self> {
        let mut kinds = BTreeMap::new();
        let mut real = Vec::new();
        for kind in Kind::ALL {
            let entry = entries.get(&kind).ok_or_else(|| missing(TEMPLATES, kind.name()))?;
            let table = tables.get(&kind);
            if let Some(table) = table {
                real.extend(table.entities(kind, &entry.relations)?);
            }
            let relations = entry.relations.iter().map(|relation| {
                let pool = match table {
                    Some(table) => table.column(&relation.values)?.into_iter().collect(),
                    None => closed_list(values, &relation.values)?,
                };
                relation.resolve(pool)
            });
            let relations = relations.collect::<Result<Vec<_>>>()?;
            check_openings(kind, &entry.openings)?;
            kinds.insert(kind, KindCatalog { openings: entry.openings.clone(), relations });
        }
        Ok(Self { names, real, kinds })
    }

    /// How entities of `kind` are told.
    pub(super) fn kind(&self, kind: Kind) -> &KindCatalog {
        &self.kinds[&kind]
    }

    /// Facts of the entity with the fewest.
    pub(super) fn min_facts(&self) -> usize {
        let fictional = Kind::FICTIONAL.map(|kind| self.kind(kind).relations.len());
        let real = self.real.iter().map(|entity| entity.facts.len());
        fictional.into_iter().chain(real).min().unwrap_or(0)
    }
}

impl RelationEntry {
    fn resolve(&self, pool: Vec<String>) -> Result<Relation> {
        let parse = |texts: &[String]| -> Result<Vec<Template>> {
            texts.iter().map(|text| Template::parse(TEMPLATES, text)).collect()
        };
        let (train, held_out) = (parse(&self.train)?, parse(&self.held_out)?);
        let asked = train.iter().any(Template::asks);
        if train.len() < MIN_TRAIN || !asked || held_out.is_empty() || !held_out.iter().all(Template::asks) {
            return Err(Error::Data {
                file: TEMPLATES,
                place: format!("relation {}", self.relation),
                expected: format!(
                    "at least {MIN_TRAIN} training templates, one of them and every held-out one with the value last"
                ),
                found: format!("train {:?}, held_out {:?}", self.train, self.held_out),
            });
        }
        Ok(Relation { name: self.relation.clone(), pool, train, held_out })
    }
}

/// A file of comma-separated values without quotes; the first column is the name of the entity.
struct Table {
    file: &'static str,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn parse(file: &'static str, text: &str) -> Result<Self> {
        let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
        let header = lines.next().ok_or_else(|| missing(file, "header"))?;
        let rows: Vec<_> = lines.collect();
        for (row_index, row) in rows.iter().enumerate() {
            if row.len() != header.len() {
                return Err(Error::Data {
                    file,
                    place: format!("line {}", row_index + 2),
                    expected: format!("{} columns", header.len()),
                    found: format!("{} columns", row.len()),
                });
            }
        }
        Ok(Self { file, header, rows })
    }

    fn index(&self, column: &str) -> Result<usize> {
        self.header.iter().position(|name| name == column).ok_or_else(|| missing(self.file, column))
    }

    /// Distinct values of a column, sorted.
    fn column(&self, column: &str) -> Result<BTreeSet<String>> {
        let index = self.index(column)?;
        Ok(self.rows.iter().map(|row| row[index].clone()).filter(|value| !value.is_empty()).collect())
    }

    fn entities(&self, kind: Kind, relations: &[RelationEntry]) -> Result<Vec<RealEntity>> {
        let columns =
            relations.iter().map(|relation| self.index(&relation.values)).collect::<Result<Vec<_>>>()?;
        let entity = |row: &Vec<String>| {
            let facts = columns.iter().map(|&column| row[column].clone()).enumerate();
            let facts = facts.filter(|(_, value)| !value.is_empty()).collect();
            RealEntity { kind, name: row[0].clone(), facts }
        };
        Ok(self.rows.iter().map(entity).collect())
    }
}

fn json<T: serde::de::DeserializeOwned>(file: &'static str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|source| Error::Json { file, source })
}

fn missing(file: &'static str, key: &str) -> Error {
    Error::Data { file, place: format!("key {key}"), expected: "an entry".into(), found: "none".into() }
}

fn closed_list(values: &BTreeMap<String, Vec<String>>, key: &str) -> Result<Vec<String>> {
    let list = values.get(key).ok_or_else(|| missing(VALUES, key))?;
    let distinct = list.iter().collect::<BTreeSet<_>>().len();
    if distinct != list.len() || !VALUE_COUNTS.contains(&distinct) {
        return Err(Error::Data {
            file: VALUES,
            place: format!("key {key}"),
            expected: format!("{} to {} distinct values", VALUE_COUNTS.start(), VALUE_COUNTS.end()),
            found: format!("{} values, {distinct} of them distinct", list.len()),
        });
    }
    Ok(list.clone())
}

fn check_openings(kind: Kind, openings: &[String]) -> Result<()> {
    let sound = |text: &String| text.matches("{e}").count() == 1 && text.ends_with('.');
    if openings.is_empty() || !openings.iter().all(sound) {
        return Err(Error::Data {
            file: TEMPLATES,
            place: format!("openings of {}", kind.name()),
            expected: "sentences with one slot {e}".to_owned(),
            found: format!("{openings:?}"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message<T>(result: Result<T>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn tables_with_a_wrong_row_or_without_a_column_are_errors() {
        assert_eq!(
            message(Table::parse("t.csv", "name,number\ngold,79\ntin\n")),
            "facts data t.csv, line 3: expected 2 columns, found 1 columns"
        );
        assert_eq!(
            message(Table::parse("t.csv", "")),
            "facts data t.csv, key header: expected an entry, found none"
        );
        let table = Table::parse("t.csv", "name,number\ngold,79\ntin,\nlead,79\n").unwrap();
        assert_eq!(table.column("number").unwrap(), BTreeSet::from(["79".to_owned()]));
        assert_eq!(
            message(table.column("colour")),
            "facts data t.csv, key colour: expected an entry, found none"
        );
    }

    #[test]
    fn closed_lists_that_are_short_or_repeat_are_errors() {
        let mut list: Vec<String> = (0..32).map(|i| i.to_string()).collect();
        let check = |list: &[String]| closed_list(&BTreeMap::from([("k".into(), list.to_vec())]), "k");
        assert_eq!(check(&list).unwrap(), list);
        assert_eq!(
            message(check(&list[1..])),
            "facts data values.json, key k: expected 32 to 64 distinct values, found 31 values, 31 of them distinct"
        );
        list.push("7".to_owned());
        assert!(message(check(&list)).ends_with("found 33 values, 32 of them distinct"));
        assert!(message(closed_list(&BTreeMap::new(), "k")).contains("key k: expected an entry"));
    }

    #[test]
    fn relations_that_cannot_be_told_or_asked_are_errors() {
        let (last, inner) = ("The age of {e} is {v}.", "{e} has {v} years.");
        let resolve = |train: &[&str], held_out: &[&str]| {
            let owned = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
            let (relation, values) = ("age".to_owned(), "ages".to_owned());
            RelationEntry { relation, values, train: owned(train), held_out: owned(held_out) }
                .resolve(Vec::new())
        };
        assert!(resolve(&[last, inner, inner, inner], &[last]).is_ok());
        for (train, held_out) in [
            (vec![last; 3], vec![last]),
            (vec![inner; 4], vec![last]),
            (vec![last; 4], vec![]),
            (vec![last; 4], vec![last, inner]),
        ] {
            let message = message(resolve(&train, &held_out));
            assert!(message.starts_with("facts data templates.json, relation age: expected at least 4"));
        }
    }

    #[test]
    fn kinds_without_entry_or_opening_are_errors() {
        let names = Names::parse(include_str!("../../data/names.json")).unwrap();
        assert_eq!(
            message(Catalog::assemble(names, &BTreeMap::new(), BTreeMap::new(), &BTreeMap::new())),
            "facts data templates.json, key element: expected an entry, found none"
        );
        for openings in [vec![], vec!["About it.".to_owned()], vec!["About {e}".to_owned()]] {
            let message = message(check_openings(Kind::Place, &openings));
            assert!(message.starts_with("facts data templates.json, openings of place"), "{message}");
        }
        assert!(
            message(json::<Vec<u8>>("t.json", "[1, 2")).starts_with("facts file t.json: EOF while parsing")
        );
    }
}
