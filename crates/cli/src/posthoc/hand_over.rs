//! The folder that a bank is handed over as: bank.safetensors, spec.json, tree.safetensors, the embedder if it was
//! fitted on the corpus, and the model card.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use eval::report::{MethodRow, Posthoc, Side, count, model_card};
use eval::{N_BUCKETS, Rate};
use memory_bank::{BlockSpec, Checkpoint, LoraOn, MemoryKind, MemoryLayers, Precision};
use retrieve::{Exact, Query, Router};

use super::measure::Asked;
use super::report::BEFORE;
use crate::checkpoint;
use crate::config::{Config, EmbedKind, Method, PosthocSection};
use crate::routing;
use crate::run::{Run, write_whole};

/// Values of the card's places, by name.
type Card = BTreeMap<String, String>;

/// The embedder of a tree, if it was fitted on the corpus.
const EMBEDDER: &str = "embedder.safetensors";

/// What stands where nothing was asked or said.
const UNKNOWN: &str = "not stated";

/// Writes the folder of a run's bank. The card is that of the `posthoc` which the run is of; without one none is
/// written.
pub(crate) fn hand_over(run: &Run, folder: &Path, bf16: bool) -> Result<()> {
    let study = run.dir.ancestors().nth(2).map(|dir| dir.join("posthoc.json")).filter(|path| path.exists());
    // The others of a posthoc are what its memory is compared with.
    let study = study.filter(|_| run.dir.ends_with(Method::Memory.name()));
    if run.bank.is_none() || !run.memory_folder().is_dir() {
        bail!("{}: expected a memory bank in its checkpoint, found none", run.dir.display());
    }
    fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let exported = runtime.block_on(async {
        let checkpoint = Checkpoint::open_folder(&run.memory_folder()).await?;
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        memory_bank::export(&checkpoint, &folder.join("bank.safetensors"), precision).await
    })?;
    let spec = run.identity().spec;
    write_whole(&folder.join("spec.json"), serde_json::to_string_pretty(&spec)?.as_bytes())?;
    run.tree.save(&folder.join("tree.safetensors"))?;
    let mut files = vec!["bank.safetensors", "spec.json", "tree.safetensors"];
    let fitted = run.dir.join(EMBEDDER);
    if fitted.exists() {
        let bytes = fs::read(&fitted).with_context(|| format!("{}", fitted.display()))?;
        write_whole(&folder.join(EMBEDDER), &bytes)?;
        files.push(EMBEDDER);
    }
    match study {
        None => eprintln!("note: no model card: {} is no memory of `anchorage posthoc`", run.dir.display()),
        Some(path) => {
            let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
            let study: Posthoc =
                serde_json::from_str(&text).with_context(|| format!("{}", path.display()))?;
            let mut card = study.card;
            card.entry("folder".into()).or_insert_with(|| folder.display().to_string());
            card.insert("seed".into(), run.config.train.seed.to_string());
            card.insert("bank_hash".into(), exported.sha256);
            card.insert("spec_hash".into(), spec.hash());
            card.insert("tree_hash".into(), run.tree.hash());
            let card = model_card(&card).map_err(|problem| anyhow!("{}: card: {problem}", path.display()))?;
            write_whole(&folder.join("README.md"), card.as_bytes())?;
            files.push("README.md");
        }
    }
    println!("{}: {} ({} bytes of memory)", folder.display(), files.join(", "), exported.bytes);
    Ok(())
}

/// What the card says of the run, but for the files; what the configuration says goes before.
pub(super) fn card(
    (config, section): (&Config, &PosthocSection),
    (run, command): (&Run, &str),
    asked: &Asked,
    study: &Posthoc,
) -> Result<Card> {
    let mut card = Card::new();
    let mut put = |key: &str, value: String| {
        card.insert(key.into(), value);
    };
    for key in ["license", "base_license", "data_license"] {
        put(key, UNKNOWN.into());
    }
    put("language", "en".into());
    let name = config.run.dir.file_name().map_or("memory".into(), |name| name.to_string_lossy().into_owned());
    put("name", name);
    put("learned", study.learned.clone());
    put("learned_type", "text".into());
    put("other", study.kept.clone());
    put("other_type", "text".into());
    put("blocking", "not measured".into());
    put("limits", "It was measured on the texts named here and on no others.".into());
    put("command", command.into());
    put("version", env!("CARGO_PKG_VERSION").into());
    put("n_seeds", section.seeds.to_string());
    of_base(config, run, &mut put)?;
    of_memory(run, &mut put)?;
    of_training(config, run, study, &mut put)?;
    of_results(asked, study, &mut put);
    let question = asked.learned.questions.iter().find(|q| !q.prompt.contains(['"', '\\']));
    let example = question.map_or("A text", |question| question.prompt.as_str());
    put("example", example.into());
    put(
        "example_path",
        run.retriever()?.paths(&[example])?.first().map_or(String::new(), ToString::to_string),
    );
    put("misrouted", misrouted(run)?);
    card.extend(section.card.clone());
    Ok(card)
}

fn of_base(config: &Config, run: &Run, put: &mut impl FnMut(&str, String)) -> Result<()> {
    let Some(path) = &config.anchor.checkpoint else {
        bail!("anchor.checkpoint: expected one, found nothing")
    };
    let sizes = run.anchor.config();
    put("base_model", path.display().to_string());
    let family = checkpoint::describe(path)?.family;
    put("architecture", format!("{family}, {} layers of {}", sizes.n_layers, sizes.d_model));
    put("n_anchor", count(sizes.n_parameters()));
    put("anchor_hash", run.anchor.sha256()?);
    Ok(())
}

fn of_memory(run: &Run, put: &mut impl FnMut(&str, String)) -> Result<()> {
    let spec = run.identity().spec;
    put("kind", spec.kind.name().into());
    put("n_bank", count(spec.bank_len()));
    put("n_blocks", count(spec.levels().map(|level| spec.n_blocks(level) as u64).sum()));
    put("n_fetch", count(spec.fetch_len()));
    let share = spec.fetch_len() as f64 / run.anchor.config().n_parameters() as f64;
    put("fetch_share", format!("{:.1} %", share * 100.0));
    let (place, layers) = place(&spec);
    put("where", place);
    put("layers", layers);
    let list = |values: &[usize]| values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    put("widths", list(&spec.width));
    put("branching", list(&spec.branching));
    let tree = &run.tree;
    put("n_levels", tree.n_levels().to_string());
    let used = tree.counts(tree.n_levels() - 1).iter().filter(|&&n| n > 0).count();
    put("n_leaves", count(used as u64));
    let embed = &run.config.embed;
    let path = embed.path.as_ref().map_or(String::new(), |path| path.display().to_string());
    put(
        "embedder",
        match embed.kind {
            EmbedKind::Hashed => "the hashed embedder fitted on the corpus (embedder.safetensors)".into(),
            EmbedKind::Static => format!("the static embedder {path}"),
            EmbedKind::Bert => format!("the sentence transformer {path}"),
        },
    );
    // That of the corpus is in the folder, and found there.
    put("embed", if embed.kind == EmbedKind::Hashed { String::new() } else { "embed=embed, ".into() });
    put("beam", run.config.tree.beam.to_string());
    put("embedding_dim", tree.dim().to_string());
    Ok(())
}

/// What memory is added to, and the layers that have some.
fn place(spec: &BlockSpec) -> (String, String) {
    let what = match spec.kind {
        MemoryKind::Ffn => "the FFNs",
        MemoryKind::Kv => "the attention",
        MemoryKind::Lora { on: LoraOn::Qk } => "the queries and keys",
        MemoryKind::Lora { on: LoraOn::Vo } => "the values and outputs of the attention",
        MemoryKind::Lora { on: LoraOn::Ffn } => "the matrices of the FFNs",
    };
    let of: Vec<String> = spec.memory_layers().map(|layer| layer.to_string()).collect();
    let of = of.join(", ");
    match &spec.layers {
        MemoryLayers::Uniform => (format!("{what} of all layers"), "all".into()),
        named => (format!("{what} of layers {of}"), format!("{named} ({of})")),
    }
}

fn of_training(
    config: &Config,
    run: &Run,
    study: &Posthoc,
    put: &mut impl FnMut(&str, String),
) -> Result<()> {
    let train = &run.config.train;
    put("n_tokens", count(run.state.tokens_seen));
    put("n_steps", count(train.steps));
    put("batch_tokens", count(train.batch_size as u64 * u64::from(config.corpus.seq_len)));
    let rate = train.memory_learning_rate;
    put("optimizer", format!("lazy AdamW, {rate:e} to {:e}", rate * train.final_share));
    put("seed", train.seed.to_string());
    put("precision", format!("{:?}", train.precision).to_lowercase());
    let rate = row(study, "memory").map_or(0.0, |row| row.tokens_per_s);
    let minutes = run.state.tokens_seen as f64 / rate.max(1e-9) / 60.0;
    put("duration", if rate > 0.0 { format!("{minutes:.1} min") } else { UNKNOWN.into() });
    put("hardware", hardware());
    let corpus = run.corpus()?;
    put(
        "data",
        format!("{} tokens a pass of {}", count(corpus.n_train_tokens()), config.corpus.files.join(", ")),
    );
    Ok(())
}

fn hardware() -> String {
    if cfg!(feature = "cuda") {
        return "one NVIDIA GPU".into();
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("a processor", |(_, model)| model.trim());
    format!("{cores} core{} of {model}", if cores == 1 { "" } else { "s" })
}

fn row<'a>(study: &'a Posthoc, method: &str) -> Option<&'a MethodRow> {
    study.methods.iter().find(|row| row.method == method)
}

fn of_results(asked: &Asked, study: &Posthoc, put: &mut impl FnMut(&str, String)) {
    let ppl = |of: fn(&MethodRow) -> &Side| {
        row(study, "memory").map_or(String::new(), |row| format!("{:.3}", of(row).perplexity.mean))
    };
    put("learned_ppl", ppl(|row| &row.learned));
    put("other_ppl", ppl(|row| &row.kept));
    put("n_gain", count(row(study, "memory").map_or(0, |row| row.learned.perplexity.n as u64)));
    put("n_questions", count(asked.learned.questions.len() as u64));
    let names = [(BEFORE, "base model"), ("generic", "generic memory"), ("memory", "fetched memory")];
    let with = |rate: Option<Rate>, format: &dyn Fn(f64) -> String| match rate {
        Some(Rate { mean, low, high, .. }) => {
            format!("{} ({} to {})", format(mean), format(low), format(high))
        }
        None => "–".into(),
    };
    let two = |value: f64| format!("{value:.2}");
    let signed = |value: f64| format!("{value:+.3}");
    let percent = |value: f64| format!("{:.1} %", value * 100.0);
    let table = |of: fn(&MethodRow) -> &Side| {
        let mut lines = vec!["| | perplexity | nats a token above | answered | chosen of four |".to_string()];
        lines.push("|---|---|---|---|---|".into());
        for (method, name) in names {
            let Some(side) = row(study, method).map(of) else { continue };
            lines.push(format!(
                "| {name} | {} | {} | {} | {} |",
                with(Some(side.perplexity), &two),
                with(side.change, &signed),
                with(side.exact, &percent),
                with(side.chosen, &percent)
            ));
        }
        lines.join("\n")
    };
    put("gain_table", table(|row| &row.learned));
    put("damage_table", table(|row| &row.kept));
    put("bucket_table", bucket_table(study, &names));
    let mut lines = vec!["| | trained parameters | gain, nats a token | damage, nats a token |".to_string()];
    lines.push("|---|---|---|---|".into());
    for (method, name) in [
        ("memory", "memory"),
        ("generic", "generic memory"),
        ("full", "full fine-tuning"),
        ("lora", "LoRA"),
        ("replay", "full fine-tuning with replay"),
    ] {
        let Some((row, reading)) = row(study, method).and_then(|row| Some((row, row.reading()?))) else {
            continue;
        };
        let (trained, gain, damage) = (count(row.trained), signed(reading.gain), signed(reading.damage));
        lines.push(format!("| {name} | {trained} | {gain} | {damage} |"));
    }
    put("comparison_table", lines.join("\n"));
}

/// How often the true word is the likeliest, or else written, by how often the corpus has it.
fn bucket_table(study: &Posthoc, names: &[(&str, &str)]) -> String {
    let (rows, what) = match study.choice.is_empty() {
        true => (&study.recall, "answered"),
        false => (&study.choice, "chosen of four"),
    };
    let columns: Vec<_> = names
        .iter()
        .filter_map(|(method, name)| Some((rows.iter().find(|row| row.memory == *method)?, *name)))
        .collect();
    let heads: String = columns.iter().map(|(_, name)| format!(" {name} |")).collect();
    let mut lines = vec![
        format!("| {what}, by how often the corpus has the word |{heads}"),
        "|---".repeat(columns.len() + 1) + "|",
    ];
    for bucket in 0..N_BUCKETS {
        let label = study.buckets.get(bucket).map_or("", String::as_str);
        let cell =
            |rate: Option<&Rate>| rate.map_or("–".into(), |rate| format!("{:.1} %", rate.mean * 100.0));
        let cells: String = columns
            .iter()
            .map(|(row, _)| format!(" {} |", cell(row.buckets.get(bucket).and_then(Option::as_ref))))
            .collect();
        lines.push(format!("| {label} |{cells}"));
    }
    lines.join("\n")
}

/// The share of held-out windows that are not in the leaf that is nearest to them.
fn misrouted(run: &Run) -> Result<String> {
    let windows = routing::Windows::open(run)?;
    let held_out = windows.of(true)?;
    let exact = Exact::new(run.tree.clone(), 1)?;
    let mut n = 0;
    for &window in &held_out {
        let query = Query { text: "", embedding: windows.embedding(window) };
        let (path, _) = routing::first(exact.route(query)?)?;
        n += usize::from(path.index(path.n_levels() - 1) != windows.leaves[window]);
    }
    Ok(format!("{:.1} %", n as f64 / held_out.len().max(1) as f64 * 100.0))
}
