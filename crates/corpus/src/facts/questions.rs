//! Closed-book questions: a sentence cut right before the value.

use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::catalog::{Catalog, Relation};
use super::template::Template;
use super::{Entity, Fact, Options, Phrasing, Question, Stream, draw};

/// Values offered by a question, the answer included, where the relation has that many.
pub const N_CHOICES: usize = 8;

/// Two questions for each fact of each entity: in words that the corpus uses, and in words that it
/// does not.
pub(super) fn ask(options: &Options, catalog: &Catalog, entities: &[Entity]) -> Vec<Question> {
    let mut rng = Stream::Questions.rng(options.seed);
    let mut questions = Vec::new();
    for entity in entities {
        for fact in &entity.facts {
            let relation = &catalog.kind(entity.kind).relations[fact.relation_index];
            for phrasing in [Phrasing::Train, Phrasing::HeldOut] {
                questions.extend(question(entity, fact, relation, phrasing, &mut rng));
            }
        }
    }
    questions
}

/// None only where no template of the phrasing can be asked, which the catalog has ruled out.
fn question(
    entity: &Entity,
    fact: &Fact,
    relation: &Relation,
    phrasing: Phrasing,
    rng: &mut ChaCha8Rng,
) -> Option<Question> {
    let templates = match phrasing {
        Phrasing::Train => &relation.train,
        Phrasing::HeldOut => &relation.held_out,
    };
    let askable: Vec<&Template> = templates.iter().filter(|template| template.asks()).collect();
    let prompt = askable.choose(rng)?.prompt(&entity.name)?;
    Some(Question {
        id: format!("{}/{}/{}/{}", entity.kind.name(), slug(&entity.name), relation.name, phrasing.name()),
        prompt,
        answer: fact.value.clone(),
        entity: entity.name.clone(),
        kind: entity.kind,
        relation: relation.name.clone(),
        frequency: entity.documents,
        exposures: fact.exposures,
        bucket: entity.bucket,
        phrasing,
        choices: choices(&fact.value, &relation.pool, rng),
    })
}

fn choices(answer: &str, pool: &[String], rng: &mut ChaCha8Rng) -> Vec<String> {
    let others = pool.iter().filter(|value| *value != answer);
    let mut choices: Vec<String> = draw(others, N_CHOICES - 1, rng).into_iter().map(str::to_owned).collect();
    choices.push(answer.to_owned());
    choices.shuffle(rng);
    choices
}

fn slug(name: &str) -> String {
    name.to_lowercase().replace(' ', "-").replace('\'', "")
}
