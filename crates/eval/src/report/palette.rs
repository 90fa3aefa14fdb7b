//! One name, colour and mark for each memory, and for each router, the same on the whole page.

/// The shape that stands for a memory, so that it is told apart without colour too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Disc,
    Ring,
    Square,
    Diamond,
    Triangle,
    Cross,
}

/// How a memory is shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look<'a> {
    /// Class in the style sheet: it sets the colour.
    pub(super) class: &'static str,
    pub(super) mark: Mark,
    /// On a label: "fetched".
    pub(super) short: &'a str,
    /// What it is, for a newcomer.
    pub(super) meaning: &'static str,
}

/// Memories in the order of tables and charts.
const KNOWN: [(&str, Look<'static>); 5] = [
    ("none", Look { class: "m-none", mark: Mark::Ring, short: "none", meaning: "the anchor alone" }),
    (
        "generic",
        Look {
            class: "m-generic",
            mark: Mark::Diamond,
            short: "generic",
            meaning: "the same blocks for every text",
        },
    ),
    (
        "always_on",
        Look {
            class: "m-always-on",
            mark: Mark::Square,
            short: "always-on",
            meaning: "the same blocks for every text, trained on every token",
        },
    ),
    (
        "fetched",
        Look {
            class: "m-fetched",
            mark: Mark::Disc,
            short: "fetched",
            meaning: "the blocks on the text’s own path",
        },
    ),
    (
        "random",
        Look {
            class: "m-random",
            mark: Mark::Triangle,
            short: "random",
            meaning: "the blocks of some other leaf",
        },
    ),
];

/// Routers in the order of tables and charts; one more is `random`, which comes after them.
const ROUTERS: [(&str, Look<'static>); 6] = [
    ("exact", Look { class: "m-ink", mark: Mark::Cross, short: "exact", meaning: "every leaf compared" }),
    (
        "beam",
        Look { class: "m-fetched", mark: Mark::Disc, short: "beam", meaning: "a few candidates a level" },
    ),
    ("greedy", Look { class: "m-none", mark: Mark::Ring, short: "greedy", meaning: "one candidate a level" }),
    (
        "hnsw",
        Look { class: "m-generic", mark: Mark::Diamond, short: "hnsw", meaning: "a graph over the leaves" },
    ),
    (
        "prototypes",
        Look {
            class: "m-always-on",
            mark: Mark::Square,
            short: "prototypes",
            meaning: "the most similar of a few points a leaf",
        },
    ),
    (
        "oracle",
        Look {
            class: "m-other",
            mark: Mark::Cross,
            short: "oracle",
            meaning: "the leaf that it is packed in",
        },
    ),
];

/// What memory added to a checkpoint is compared with, in the order of tables and charts; `generic` stands between.
const BEFORE: [(&str, Look<'static>); 2] = [
    (
        "before",
        Look { class: "m-none", mark: Mark::Ring, short: "before", meaning: "the checkpoint as it was" },
    ),
    (
        "memory",
        Look {
            class: "m-fetched",
            mark: Mark::Disc,
            short: "memory",
            meaning: "the checkpoint with the blocks that a text fetches",
        },
    ),
];
const BESIDE: [(&str, Look<'static>); 3] = [
    (
        "lora",
        Look {
            class: "m-always-on",
            mark: Mark::Square,
            short: "LoRA",
            meaning: "small matrices beside the checkpoint’s, the same for every text",
        },
    ),
    (
        "full",
        Look {
            class: "m-random",
            mark: Mark::Triangle,
            short: "fine-tuning",
            meaning: "all weights of the checkpoint trained",
        },
    ),
    (
        "replay",
        Look {
            class: "m-ink",
            mark: Mark::Cross,
            short: "replay",
            meaning: "the same with texts of before mixed in",
        },
    ),
];

/// Names that have a look of their own, in the order of tables and charts.
fn all() -> impl Iterator<Item = &'static (&'static str, Look<'static>)> {
    BEFORE.iter().chain(&ROUTERS).chain(&KNOWN).chain(&BESIDE)
}

/// How the memory or router `name` is shown; one that is not known keeps its name.
pub(super) fn look(name: &str) -> Look<'_> {
    match all().find(|(known, _)| *known == name) {
        Some((_, look)) => *look,
        None => Look { class: "m-other", mark: Mark::Cross, short: name, meaning: "" },
    }
}

/// `name` in a sentence: "with fetched memory".
pub(super) fn phrase(name: &str) -> String {
    match name {
        "none" => "without memory".into(),
        _ => format!("with {} memory", look(name).short),
    }
}

/// The place of `name` in tables and charts: those not known come last.
pub(super) fn rank(name: &str) -> usize {
    all().position(|(known, _)| *known == name).unwrap_or(usize::MAX)
}

/// Each of `names` once, in the order of tables and charts.
pub(super) fn ordered<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut unique: Vec<&str> = vec![];
    for name in names {
        if !unique.contains(&name) {
            unique.push(name);
        }
    }
    unique.sort_by_key(|name| rank(name));
    unique
}
