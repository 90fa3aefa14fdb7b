//! Documents: which facts each one states, and in which words.

use std::collections::BTreeSet;

use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::catalog::Catalog;
use super::error::{Error, Result};
use super::template::capitalised;
use super::{Document, Entity, Options, Stream};

/// Texts drawn for one validation document before the entity is given up.
const MAX_TRIES: usize = 1000;

/// Tells every entity: (corpus, validation), each shuffled. Counts the exposures of the corpus in
/// the facts of `entities`; validation documents do not count.
pub(super) fn tell(
    options: &Options,
    catalog: &Catalog,
    entities: &mut [Entity],
) -> Result<(Vec<Document>, Vec<Document>)> {
    let mut corpus_rng = Stream::Corpus.rng(options.seed);
    let mut validation_rng = Stream::Validation.rng(options.seed);
    let (mut corpus, mut validation) = (Vec::new(), Vec::new());
    // Validation documents are due at even steps along the corpus: the total is exact and each
    // entity's share of it follows its documents.
    let due = |n_documents: usize| (n_documents as f64 * options.validation_share) as usize;
    for entity in entities {
        let mut teller = Teller::new(entity, catalog, options.facts_per_document);
        let texts: Vec<String> = (0..entity.documents).map(|_| teller.text(&mut corpus_rng)).collect();
        let exposures = teller.stated;
        let n_validation = due(corpus.len() + texts.len()) - due(corpus.len());
        let teller = Teller::new(entity, catalog, options.facts_per_document);
        let fresh = new_texts(teller, &texts, n_validation, &mut validation_rng)?;
        let document =
            |text| Document { id: String::new(), label: entity.kind, entity: entity.name.clone(), text };
        corpus.extend(texts.into_iter().map(document));
        validation.extend(fresh.into_iter().map(document));
        for (fact, count) in entity.facts.iter_mut().zip(exposures) {
            fact.exposures = count;
        }
    }
    let mut order_rng = Stream::Order.rng(options.seed);
    for (documents, split) in [(&mut corpus, "train"), (&mut validation, "validation")] {
        documents.shuffle(&mut order_rng);
        for (index, document) in documents.iter_mut().enumerate() {
            document.id = format!("{split}/{index:07}");
        }
    }
    Ok((corpus, validation))
}

/// `n` texts that are neither in `known` nor equal to one another.
fn new_texts(mut teller: Teller, known: &[String], n: usize, rng: &mut ChaCha8Rng) -> Result<Vec<String>> {
    let mut seen: BTreeSet<String> = known.iter().cloned().collect();
    let mut fresh = Vec::new();
    while fresh.len() < n {
        let drawn = (0..MAX_TRIES).map(|_| teller.text(rng)).find(|text| !seen.contains(text));
        let text = drawn.ok_or_else(|| Error::NoNewDocument {
            entity: teller.entity.name.clone(),
            expected: n,
            found: fresh.len(),
            tries: MAX_TRIES,
        })?;
        seen.insert(text.clone());
        fresh.push(text);
    }
    Ok(fresh)
}

/// Tells one entity, document after document, and keeps its facts in balance.
struct Teller<'a> {
    entity: &'a Entity,
    catalog: &'a Catalog,
    facts_per_document: usize,
    /// How often each fact has been stated.
    stated: Vec<usize>,
}

impl<'a> Teller<'a> {
    fn new(entity: &'a Entity, catalog: &'a Catalog, facts_per_document: usize) -> Self {
        Self { entity, catalog, facts_per_document, stated: vec![0; entity.facts.len()] }
    }

    /// The next document: an opening, then its facts in random order, one sentence each.
    fn text(&mut self, rng: &mut ChaCha8Rng) -> String {
        let facts = self.deal(rng);
        let kind = self.catalog.kind(self.entity.kind);
        let opening = kind.openings.choose(rng);
        let mut sentences: Vec<String> =
            opening.iter().map(|text| capitalised(&text.replace("{e}", &self.entity.name))).collect();
        for fact_index in facts {
            let fact = &self.entity.facts[fact_index];
            let template = kind.relations[fact.relation_index].train.choose(rng);
            sentences.extend(template.map(|template| template.render(&self.entity.name, &fact.value)));
        }
        sentences.join(" ")
    }

    /// The facts stated least so far, ties broken at random: like cards dealt from a shuffled deck,
    /// so that no two facts of an entity ever differ by more than one statement.
    fn deal(&mut self, rng: &mut ChaCha8Rng) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.stated.len()).collect();
        order.shuffle(rng);
        order.sort_by_key(|&fact_index| self.stated[fact_index]);
        order.truncate(self.facts_per_document);
        order.shuffle(rng);
        order.iter().for_each(|&fact_index| self.stated[fact_index] += 1);
        order
    }
}
