use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use super::*;

static WORLD: LazyLock<Facts> = LazyLock::new(|| Facts::generate(&Options::default()).unwrap());

fn small(seed: u64) -> Options {
    Options { seed, families: 4, ladder: [1, 2, 3, 4, 5], ..Options::default() }
}

/// The sentences of a text, without their full stops.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    text.strip_suffix('.').unwrap().split(". ")
}

/// Documents of the corpus by entity.
fn by_entity(documents: &[Document]) -> BTreeMap<&str, Vec<&Document>> {
    let mut map = BTreeMap::<&str, Vec<&Document>>::new();
    for document in documents {
        map.entry(&document.entity).or_default().push(document);
    }
    map
}

/// How often each sentence occurs in the documents of an entity.
fn counts<'a>(documents: &[&'a Document]) -> BTreeMap<&'a str, usize> {
    let mut map = BTreeMap::new();
    for sentence in documents.iter().flat_map(|document| sentences(&document.text)) {
        *map.entry(sentence).or_default() += 1;
    }
    map
}

fn error(options: Options) -> String {
    Facts::generate(&options).unwrap_err().to_string()
}

#[test]
fn same_options_give_the_same_bytes() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let written = Facts::generate(&small(7)).unwrap().write(first.path()).unwrap();
    assert_eq!(Facts::generate(&small(7)).unwrap().write(second.path()).unwrap(), written);
    for name in ["corpus.jsonl", "validation.jsonl", "questions.jsonl", "facts.json"] {
        let read = |dir: &tempfile::TempDir| std::fs::read(dir.path().join(name)).unwrap();
        assert_eq!(read(&first), read(&second), "{name}");
    }
    let other = Facts::generate(&small(8)).unwrap().write(second.path()).unwrap();
    for (name, file) in &written.files {
        assert_ne!(file.sha256, other.files[name].sha256, "{name}");
    }
}

#[test]
fn files_hold_the_world_and_their_hashes() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("new/folder");
    let facts = Facts::generate(&small(0)).unwrap();
    let summary = facts.write(&target).unwrap();
    let read = |name: &str| std::fs::read_to_string(target.join(name)).unwrap();
    let documents = |name: &str| -> Vec<Document> {
        read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    assert_eq!(documents("corpus.jsonl"), facts.corpus);
    assert_eq!(documents("validation.jsonl"), facts.validation);
    let questions: Vec<Question> =
        read("questions.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(questions, facts.questions);
    assert_eq!(serde_json::from_str::<Summary>(&read("facts.json")).unwrap(), summary);
    let words: usize = facts.corpus.iter().map(|document| document.text.split(' ').count()).sum();
    assert_eq!((summary.words, summary.documents), (words, facts.corpus.len()));
    assert_eq!(summary.buckets.iter().map(|bucket| bucket.documents).sum::<usize>(), facts.corpus.len());
    let mut names: Vec<_> =
        std::fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["corpus.jsonl", "facts.json", "questions.jsonl", "validation.jsonl"]);
    for (name, file) in &summary.files {
        use sha2::Digest;
        let digest: String =
            sha2::Sha256::digest(read(name)).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!((&file.sha256, file.bytes), (&digest, read(name).len()));
    }
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("taken");
    std::fs::write(&file, "").unwrap();
    let message = Facts::generate(&small(0)).unwrap().write(&file.join("x")).unwrap_err().to_string();
    assert!(message.starts_with(&format!("cannot create {}/x: ", file.display())), "{message}");
}

#[test]
fn the_default_world_keeps_its_budget() {
    let words: usize = WORLD.corpus.iter().map(|document| document.text.split(' ').count()).sum();
    let tokens = words as f64 * 1.35; // a rule of thumb for a small BPE vocabulary
    assert!((2.0e6..2.65e6).contains(&tokens), "{tokens}");
    assert_eq!(WORLD.entities.len(), 118 + 193 + 1024);
    let share = WORLD.validation.len() as f64 / WORLD.corpus.len() as f64;
    assert!((share - 0.03).abs() < 1e-4, "{share}");
}

#[test]
fn buckets_are_as_asked_and_mix_with_kinds() {
    let options = Options::default();
    let sizes = world::bucket_sizes(&options.shares, WORLD.entities.len());
    let documents = by_entity(&WORLD.corpus);
    for (index, &size) in sizes.iter().enumerate() {
        let members: Vec<_> = WORLD.entities.iter().filter(|entity| entity.bucket == index + 1).collect();
        assert_eq!(members.len(), size);
        for entity in &members {
            assert_eq!(entity.documents, options.ladder[index]);
            assert_eq!(documents[entity.name.as_str()].len(), options.ladder[index]);
        }
        for kind in Kind::ALL {
            let all = WORLD.entities.iter().filter(|entity| entity.kind == kind).count() as f64;
            let expected = all * options.shares[index];
            let found = members.iter().filter(|entity| entity.kind == kind).count() as f64;
            assert!((found - expected).abs() < 4.0 * expected.sqrt(), "{kind:?} {found} of {expected}");
        }
    }
    let families: BTreeSet<_> = WORLD.entities.iter().filter_map(|entity| entity.family).collect();
    let mixed = families.iter().filter(|&&family| {
        let members = WORLD.entities.iter().filter(|entity| entity.family == Some(family));
        members.map(|entity| entity.bucket).collect::<BTreeSet<_>>().len() >= 3
    });
    assert!(mixed.count() * 10 > families.len() * 8, "rare and frequent entities share most families");
}

#[test]
fn names_are_unique_and_families_share_a_root() {
    let names: BTreeSet<_> = WORLD.entities.iter().map(|entity| entity.name.to_lowercase()).collect();
    assert_eq!(names.len(), WORLD.entities.len());
    let words = |entity: &Entity| entity.name.split(' ').map(str::to_owned).collect::<BTreeSet<_>>();
    let mut roots = BTreeSet::new();
    for family in 0..Options::default().families {
        let members: Vec<_> = WORLD.entities.iter().filter(|entity| entity.family == Some(family)).collect();
        assert_eq!(members.len(), 8);
        let shared = members.iter().map(|entity| words(entity)).reduce(|a, b| &a & &b).unwrap();
        assert_eq!(shared.len(), 1, "{shared:?}");
        roots.extend(shared);
    }
    assert_eq!(roots.len(), 128);
    // A root is never a word of the language of the world: a value, a given name, a real name.
    let catalog = Catalog::embedded().unwrap();
    let every_root = catalog.names.roots(catalog.names.max_families(), &mut Stream::Names.rng(0));
    let mut taken: BTreeSet<String> = catalog.names.given.iter().map(|name| name.to_lowercase()).collect();
    for kind in Kind::ALL {
        taken.extend(catalog.kind(kind).relations.iter().flat_map(|r| &r.pool).map(|v| v.to_lowercase()));
    }
    taken.extend(catalog.real.iter().map(|entity| entity.name.to_lowercase()));
    for root in every_root {
        assert!(!taken.contains(&root.to_lowercase()), "{root}");
    }
}

#[test]
fn every_fact_is_stated_as_often_as_it_says() {
    let catalog = Catalog::embedded().unwrap();
    let documents = by_entity(&WORLD.corpus);
    for entity in &WORLD.entities {
        let told = counts(&documents[entity.name.as_str()]);
        let mut stated = Vec::new();
        for fact in &entity.facts {
            let relation = &catalog.kind(entity.kind).relations[fact.relation_index];
            let found: usize = relation
                .train
                .iter()
                .filter_map(|template| {
                    let sentence = template.render(&entity.name, &fact.value);
                    told.get(sentence.strip_suffix('.').unwrap())
                })
                .sum();
            assert_eq!(found, fact.exposures, "{} {}", entity.name, fact.relation);
            stated.push(found);
        }
        assert!(stated.iter().max().unwrap() - stated.iter().min().unwrap() <= 1, "{stated:?}");
        assert_eq!(stated.iter().sum::<usize>(), entity.documents * 4);
    }
    for document in &WORLD.corpus {
        assert_eq!(sentences(&document.text).count(), 5);
        let distinct: BTreeSet<_> = sentences(&document.text).collect();
        assert_eq!(distinct.len(), 5, "{}", document.text);
    }
}

#[test]
fn a_prompt_has_one_answer_and_held_out_words_stay_out() {
    let documents = by_entity(&WORLD.corpus);
    let validation = by_entity(&WORLD.validation);
    let mut prompts = BTreeSet::new();
    let told: BTreeMap<&str, _> = documents.iter().map(|(&name, list)| (name, counts(list))).collect();
    for question in &WORLD.questions {
        assert!(prompts.insert(&question.prompt), "asked twice: {}", question.prompt);
        let opening = format!("{} ", question.prompt);
        let answers: BTreeSet<_> =
            told[question.entity.as_str()].keys().filter_map(|text| text.strip_prefix(&opening)).collect();
        match question.phrasing {
            // Rare facts may be told in other templates only; told in this one, it is the answer.
            Phrasing::Train => assert!(answers.iter().all(|&a| a == question.answer), "{answers:?}"),
            Phrasing::HeldOut => {
                for set in [&documents, &validation] {
                    for document in set.get(question.entity.as_str()).into_iter().flatten() {
                        assert!(!document.text.contains(&question.prompt), "{}", question.prompt);
                    }
                }
            }
        }
    }
    // By wording alone too: no sentence of one relation can begin with the prompt of another.
    let catalog = Catalog::embedded().unwrap();
    for kind in Kind::ALL {
        let relations = &catalog.kind(kind).relations;
        for (asked, other) in relations.iter().flat_map(|a| relations.iter().map(move |b| (a, b))) {
            let prompts = asked.train.iter().chain(&asked.held_out).filter_map(|t| t.prompt("Foo"));
            for prompt in prompts.filter(|_| asked.name != other.name) {
                for template in other.train.iter().chain(&other.held_out) {
                    let sentence = template.render("Foo", "bar");
                    assert!(!sentence.starts_with(&format!("{prompt} ")), "{prompt} begins {sentence}");
                }
            }
        }
    }
}

#[test]
fn each_fact_is_asked_in_both_phrasings() {
    let facts: usize = WORLD.entities.iter().map(|entity| entity.facts.len()).sum();
    assert_eq!(WORLD.questions.len(), 2 * facts);
    let ids: BTreeSet<_> = WORLD.questions.iter().map(|question| &question.id).collect();
    assert_eq!(ids.len(), WORLD.questions.len());
    let entities: BTreeMap<_, _> = WORLD.entities.iter().map(|entity| (&entity.name, entity)).collect();
    for question in &WORLD.questions {
        let entity = entities[&question.entity];
        let fact = entity.facts.iter().find(|fact| fact.relation == question.relation).unwrap();
        assert_eq!((&question.answer, question.exposures), (&fact.value, fact.exposures));
        assert_eq!((question.frequency, question.bucket), (entity.documents, entity.bucket));
        assert_eq!(question.kind, entity.kind);
    }
}

#[test]
fn choices_hold_the_answer_once() {
    let mut places = [0usize; N_CHOICES];
    for question in &WORLD.questions {
        let distinct: BTreeSet<_> = question.choices.iter().collect();
        assert_eq!(distinct.len(), question.choices.len(), "{:?}", question.choices);
        let expected = match question.relation.as_str() {
            "continent" => 6,
            "period" => 7,
            _ => N_CHOICES,
        };
        assert_eq!(question.choices.len(), expected, "{}", question.id);
        let place = question.choices.iter().position(|choice| *choice == question.answer).unwrap();
        places[place] += usize::from(expected == N_CHOICES);
    }
    let mean = places.iter().sum::<usize>() as f64 / 8.0;
    assert!(places.iter().all(|&n| (n as f64 - mean).abs() < 5.0 * mean.sqrt()), "{places:?}");
}

#[test]
fn validation_documents_are_new_and_true() {
    let corpus: BTreeSet<_> = WORLD.corpus.iter().map(|document| &document.text).collect();
    let known = by_entity(&WORLD.corpus);
    let catalog = Catalog::embedded().unwrap();
    let entities: BTreeMap<_, _> = WORLD.entities.iter().map(|entity| (&entity.name, entity)).collect();
    let mut texts = BTreeSet::new();
    for (index, document) in WORLD.validation.iter().enumerate() {
        assert_eq!(document.id, format!("validation/{index:07}"));
        assert!(!corpus.contains(&document.text) && texts.insert(&document.text));
        assert_eq!(known[document.entity.as_str()][0].label, document.label);
        let entity = entities[&document.entity];
        let true_sentences: BTreeSet<String> = entity
            .facts
            .iter()
            .flat_map(|fact| {
                let relation = &catalog.kind(entity.kind).relations[fact.relation_index];
                relation.train.iter().map(|template| template.render(&entity.name, &fact.value))
            })
            .collect();
        let stated = |sentence: &&str| true_sentences.contains(&format!("{sentence}."));
        assert_eq!(sentences(&document.text).filter(stated).count(), 4, "{}", document.text);
        assert_eq!(sentences(&document.text).count(), 5);
    }
    // The frequent fifth bucket, 16 of 37 documents, is seen in proportion.
    let frequent = WORLD.validation.iter().filter(|document| entities[&document.entity].bucket == 5).count();
    let share = frequent as f64 / WORLD.validation.len() as f64;
    assert!((share - 16.0 / 37.16).abs() < 0.01, "{share}");
}

#[test]
fn facts_of_people_are_uniform_and_independent() {
    let catalog = Catalog::embedded().unwrap();
    let options = Options { families: 2000, ..Options::default() };
    let entities = world::build(&options, &catalog);
    let people: Vec<_> = entities.iter().filter(|entity| entity.kind == Kind::Person).collect();
    let chi_square = |cells: &BTreeMap<String, usize>, n_cells: f64| {
        let mean = people.len() as f64 / n_cells;
        let seen: f64 = cells.values().map(|&n| (n as f64 - mean).powi(2) / mean).sum();
        seen + (n_cells - cells.len() as f64) * mean
    };
    let count = |key: &dyn Fn(&Entity) -> String| {
        let mut cells = BTreeMap::<String, usize>::new();
        people.iter().for_each(|person| *cells.entry(key(person)).or_default() += 1);
        cells
    };
    // Mean 63, standard deviation 11.2.
    let single = chi_square(&count(&|person| person.facts[0].value.clone()), 64.0);
    assert!((20.0..115.0).contains(&single), "{single}");
    // 64 professions by 32 instruments: mean 2047, standard deviation 64.
    let pair = count(&|person| format!("{} {}", person.facts[0].value, person.facts[3].value));
    let pair = chi_square(&pair, 2048.0);
    assert!((1790.0..2305.0).contains(&pair), "{pair}");
}

#[test]
fn elements_are_sound() {
    let elements: Vec<_> = WORLD.entities.iter().filter(|entity| entity.kind == Kind::Element).collect();
    let value = |entity: &Entity, relation: &str| {
        entity.facts.iter().find(|fact| fact.relation == relation).map(|fact| fact.value.clone())
    };
    let symbols: BTreeSet<_> = elements.iter().filter_map(|entity| value(entity, "symbol")).collect();
    assert_eq!(symbols.len(), 118);
    for (index, element) in elements.iter().enumerate() {
        assert_eq!(value(element, "number").unwrap(), (index + 1).to_string());
        let period: u32 = value(element, "period").unwrap().parse().unwrap();
        assert!((1..=7).contains(&period));
        if let Some(group) = value(element, "group") {
            assert!((1..=18).contains(&group.parse::<u32>().unwrap()));
        }
        if let Some(year) = value(element, "discovery").filter(|when| when != "antiquity") {
            assert!((1600..=2010).contains(&year.parse::<u32>().unwrap()), "{year}");
        }
    }
    let facts = |name: &str| -> Vec<_> {
        let element = elements.iter().find(|entity| entity.name == name).unwrap();
        element.facts.iter().map(|fact| fact.value.as_str()).collect()
    };
    assert_eq!(facts("gold"), ["79", "Au", "11", "6", "transition metal", "antiquity"]);
    assert_eq!(facts("neon"), ["10", "Ne", "18", "2", "noble gas", "1898"]);
    assert_eq!(facts("uranium"), ["92", "U", "7", "actinide", "1789"]);
}

#[test]
fn countries_are_sound() {
    let of = |relation: &str| {
        let countries = WORLD.entities.iter().filter(|entity| entity.kind == Kind::Country);
        let facts = countries.flat_map(|entity| &entity.facts).filter(|fact| fact.relation == relation);
        facts.map(|fact| fact.value.as_str()).collect::<Vec<_>>()
    };
    let distinct = |values: &[&str]| values.iter().collect::<BTreeSet<_>>().len();
    assert_eq!((of("code").len(), distinct(&of("code"))), (193, 193));
    assert!(of("code").iter().all(|code| code.len() == 2));
    assert_eq!(of("capital").len(), distinct(&of("capital")));
    assert!(of("capital").len() > 170 && of("language").len() > 100);
    assert_eq!(distinct(&of("continent")), 6);
    assert!(of("dialling").iter().all(|code| (1..1000).contains(&code.parse::<u32>().unwrap())));
}

#[test]
fn texts_are_clean_english() {
    for document in WORLD.corpus.iter().chain(&WORLD.validation) {
        let text = &document.text;
        assert!(text.is_ascii() && !text.contains("  ") && !text.contains(['{', '}', '"']), "{text}");
        for sentence in sentences(text) {
            let first = sentence.chars().next().unwrap();
            assert!(first.is_uppercase() && !sentence.contains('.'), "{sentence}");
            assert!(sentence.to_lowercase().contains(&document.entity.to_lowercase()), "{sentence}");
        }
    }
    for question in &WORLD.questions {
        assert!(!question.prompt.ends_with([' ', '.']) && !question.answer.contains('.'));
        assert!(!question.answer.starts_with(' ') && !question.answer.ends_with(' '));
    }
    // An article before a slot would be wrong for half of what fills it, or double that of a name.
    let text = include_str!("../../data/templates.json");
    for article in [" a {", " an {", " the {e}", "\"A {", "\"An {", "\"The {e}"] {
        assert!(!text.contains(article), "{article}");
    }
}

#[test]
fn options_out_of_range_are_errors() {
    let with = |change: fn(&mut Options)| {
        let mut options = small(0);
        change(&mut options);
        error(options)
    };
    for (message, expected) in [
        (with(|o| o.families = 2305), "`families`: expected at most 2304, found 2305"),
        (with(|o| o.people_per_family = 129), "`people_per_family`: expected at most 128, found 129"),
        (with(|o| o.companies_per_family = 25), "`companies_per_family`: expected at most 24, found 25"),
        (with(|o| o.places_per_family = 17), "`places_per_family`: expected at most 16, found 17"),
        (with(|o| o.facts_per_document = 5), "`facts_per_document`: expected at most 4, found 5"),
        (with(|o| o.facts_per_document = 0), "`facts_per_document`: expected at least 1, found 0"),
        (
            with(|o| o.ladder = [1, 2, 2, 4, 5]),
            "`ladder`: expected increasing counts from 1 up, found [1, 2, 2, 4, 5]",
        ),
        (
            with(|o| o.ladder = [0, 2, 3, 4, 5]),
            "`ladder`: expected increasing counts from 1 up, found [0, 2, 3, 4, 5]",
        ),
        (
            with(|o| o.shares = [0.5, 0.5, 0.5, 0.5, 0.5]),
            "`shares`: expected positive shares that sum to 1, found [0.5, 0.5, 0.5, 0.5, 0.5]",
        ),
        (
            with(|o| o.shares = [0.5, 0.5, 0.5, -0.5, f64::NAN]),
            "`shares`: expected positive shares that sum to 1, found [0.5, 0.5, 0.5, -0.5, NaN]",
        ),
        (with(|o| o.validation_share = 0.6), "`validation_share`: expected 0 to 0.5, found 0.6"),
    ] {
        assert_eq!(message, format!("facts option {expected}"));
    }
    assert!(serde_json::from_str::<Options>(r#"{"family": 3}"#).unwrap_err().to_string().contains("family"));
    assert_eq!(serde_json::from_str::<Options>(r#"{"seed": 3}"#).unwrap().seed, 3);
}

#[test]
fn validation_that_cannot_be_new_is_an_error() {
    // One fact a document: at most 6 facts x 5 templates x 4 openings = 120 texts, all of them used up.
    let options = Options {
        families: 0,
        ladder: [4000, 4001, 4002, 4003, 4004],
        facts_per_document: 1,
        ..Options::default()
    };
    let message = error(options);
    assert!(message.ends_with("new validation documents, found 0 in 1000 tries"), "{message}");
}

#[test]
fn the_largest_world_can_be_named() {
    let catalog = Catalog::embedded().unwrap();
    let options = Options { families: catalog.names.max_families(), ..Options::default() };
    let entities = world::build(&options, &catalog);
    let names: BTreeSet<_> = entities.iter().map(|entity| &entity.name).collect();
    assert_eq!(names.len(), 118 + 193 + 8 * 2304);
}

#[test]
fn streams_of_one_seed_differ() {
    use rand::Rng;
    let streams = [
        Stream::Names,
        Stream::Values,
        Stream::Buckets,
        Stream::Corpus,
        Stream::Validation,
        Stream::Order,
        Stream::Questions,
    ];
    let first: BTreeSet<u64> = streams.iter().map(|stream| stream.rng(0).next_u64()).collect();
    assert_eq!(first.len(), streams.len());
}
