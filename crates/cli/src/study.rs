//! `anchorage route-study`: whether each router finds the nearest leaf, what a miss costs, and where short
//! prompts go.

mod losses;
mod sample;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use cluster_tree::ClusterPath;
use eval::report::{RouteStudy, RouterStudy, TextAgreement, route_study_html};
use eval::{Rate, bootstrap_mean};
use rayon::prelude::*;
use retrieve::{Beam, Query, Route, Router};

use crate::config::RouterKind;
use crate::routing::{self, Windows, first};
use crate::run::{Run, write_whole};
use losses::losses;
use sample::{Origin, Sample, Texts};

/// A router is timed for about so long.
const TIMED: Duration = Duration::from_millis(300);

#[derive(Args)]
pub(crate) struct StudyArgs {
    /// Folder of the run.
    run: PathBuf,
    /// Texts of each kind that are routed at most: windows trained on, held out, and questions.
    #[arg(long, default_value_t = 1000)]
    windows: usize,
    /// Held-out windows that are read under every router's paths at most; 0 is none.
    #[arg(long, default_value_t = 256)]
    scored: usize,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
    /// Overrides a key of the run's sections [eval] and [retrieve] for this study; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

/// A router with the best route of every text, by kind; none of kinds that it cannot route.
struct Routed {
    name: &'static str,
    routes_per_s: f64,
    kinds: Vec<Option<Vec<Route>>>,
}

/// Studies the routers of a run, and writes route-study.html beside its report.
pub(crate) fn study(args: &StudyArgs) -> Result<()> {
    if args.windows == 0 {
        bail!("--windows: expected at least 1, found 0");
    }
    let run = Run::open_with(&args.run, &args.set)?;
    let windows = Windows::open(&run)?;
    let sample = Sample::of(&run, &windows, args.windows)?;
    let routers = routers(&run, &windows, &sample)?;
    let routed = routers.iter().map(|(name, router)| route(name, &**router, &sample.kinds));
    let routed = routed.collect::<Result<Vec<_>>>()?;
    let mut losses = losses(&run, &windows, &sample, (&routed, args.scored))?;
    let study = RouteStudy {
        run: run.dir.display().to_string(),
        own: own(&run).into(),
        summary: summary(&run, &sample),
        routers: routed
            .iter()
            .map(|router| RouterStudy {
                router: router.name.into(),
                routes_per_s: router.routes_per_s,
                texts: (0..sample.kinds.len()).map(|i| agreement((router, &routed[0]), &sample, i)).collect(),
                loss: losses.remove(router.name),
            })
            .collect(),
    };
    print!("{study}");
    if args.json {
        println!("{}", serde_json::to_string(&study)?);
    }
    let page = run.dir.join("route-study.html");
    write_whole(&page, route_study_html(&study).as_bytes())?;
    eprintln!("study: {}", page.display());
    Ok(())
}

/// The name in the study of the router that the run is configured with.
fn own(run: &Run) -> &'static str {
    match run.config.retrieve.router {
        RouterKind::Beam if routing::width(run) == 1 => "greedy",
        RouterKind::Beam => "beam",
        RouterKind::Prototypes => "prototypes",
        RouterKind::Hnsw => "hnsw",
        RouterKind::Exact => "exact",
        RouterKind::Random => "random",
    }
}

/// All routers by name, the judge first.
fn routers(run: &Run, windows: &Windows, sample: &Sample) -> Result<Vec<(&'static str, Box<dyn Router>)>> {
    let mut routers = vec![("exact", routing::router(run, RouterKind::Exact)?)];
    if routing::width(run) > 1 {
        routers.push(("beam", routing::router(run, RouterKind::Beam)?));
    }
    routers.push(("greedy", Box::new(Beam::new(run.tree.clone(), 1)?)));
    routers.push(("hnsw", routing::router(run, RouterKind::Hnsw)?));
    routers.push(("prototypes", Box::new(routing::prototypes(run, windows)?)));
    routers.push(("random", routing::router(run, RouterKind::Random)?));
    routers.push(("oracle", Box::new(sample.oracle(run, windows)?)));
    Ok(routers)
}

fn route(name: &'static str, router: &dyn Router, kinds: &[Texts]) -> Result<Routed> {
    let best = |(text, embedding): (&String, &[f32])| first(router.route(Query { text, embedding })?);
    let mut routed = vec![];
    for kind in kinds {
        // What the oracle was told of are windows.
        if name == "oracle" && !matches!(kind.origin, Origin::Windows(_)) {
            routed.push(None);
            continue;
        }
        let rows = kind.embeddings.par_chunks_exact(router.dim());
        let routes: Vec<Result<Route>> = kind.texts.par_iter().zip(rows).map(best).collect();
        routed.push(Some(routes.into_iter().collect::<Result<_>>()?));
    }
    let (began, mut n) = (Instant::now(), 0);
    while began.elapsed() < TIMED {
        let i = n % kinds[0].texts.len();
        best((&kinds[0].texts[i], &kinds[0].embeddings[i * router.dim()..][..router.dim()]))?;
        n += 1;
    }
    Ok(Routed { name, routes_per_s: n as f64 / began.elapsed().as_secs_f64(), kinds: routed })
}

/// Where a router sends the texts of a kind, against the judge, and against where it sends their whole windows.
fn agreement((router, judge): (&Routed, &Routed), sample: &Sample, kind: usize) -> TextAgreement {
    let texts = sample.kinds[kind].kind.clone();
    let (Some(routes), Some(nearest)) = (&router.kinds[kind], &judge.kinds[kind]) else {
        return TextAgreement { texts, ..TextAgreement::default() };
    };
    let excess = routes.iter().zip(nearest).map(|((_, found), (_, least))| f64::from(found - least));
    let whole = match (&sample.kinds[kind].origin, sample.held_out) {
        (Origin::Beginnings(of), Some(held_out)) => {
            let of_whole = router.kinds[held_out].iter().flatten();
            let wholes: Vec<&ClusterPath> = of_whole.map(|(path, _)| path).collect();
            shares(routes.iter().zip(of).map(|((path, _), &i)| (path, wholes[i])))
        }
        _ => vec![],
    };
    TextAgreement {
        texts,
        exact: shares(routes.iter().zip(nearest).map(|((path, _), (exact, _))| (path, exact))),
        excess_distance: Some(excess.sum::<f64>() / routes.len() as f64),
        whole,
    }
}

/// The share of pairs that lie in the same cluster, by level.
fn shares<'a>(pairs: impl Iterator<Item = (&'a ClusterPath, &'a ClusterPath)>) -> Vec<Rate> {
    let pairs: Vec<_> = pairs.collect();
    let n_levels = pairs.first().map_or(0, |(path, _)| path.n_levels());
    let at = |level: usize| {
        let same = pairs.iter().map(|(a, b)| f64::from(u8::from(a.index(level) == b.index(level))));
        bootstrap_mean(&same.collect::<Vec<_>>())
    };
    (0..n_levels).filter_map(at).collect()
}

/// What the page says beside the text.
fn summary(run: &Run, sample: &Sample) -> Vec<(String, String)> {
    let tree = &run.tree;
    let used = tree.counts(tree.n_levels() - 1).iter().filter(|&&n| n > 0).count();
    let branching: Vec<String> = (0..tree.n_levels()).map(|l| tree.branching(l).to_string()).collect();
    let retrieve = &run.config.retrieve;
    let mut facts = vec![
        ("cluster tree".to_string(), branching.join(" × ")),
        ("leaves with documents".into(), format!("{used} of {}", tree.n_leaves())),
        ("dimensions".into(), tree.dim().to_string()),
        ("beam".into(), format!("{} candidates a level", routing::width(run))),
        ("prototypes".into(), format!("{} a leaf", retrieve.prototypes)),
        (
            "hnsw".into(),
            format!(
                "{} connections, ef {} (building {})",
                retrieve.hnsw_connections, retrieve.hnsw_ef_search, retrieve.hnsw_ef_construction
            ),
        ),
        ("documents are packed by".into(), format!("a beam of {}", run.config.tree.beam)),
    ];
    facts.extend(sample.kinds.iter().map(|kind| (kind.kind.clone(), kind.texts.len().to_string())));
    facts
}
