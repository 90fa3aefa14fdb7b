//! What a missed leaf costs: held-out windows read with the memory that each router names.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use cluster_tree::ClusterPath;
use eval::report::{MissLoss, MissedLoss};
use generate::{Continuation, score};

use super::Routed;
use super::sample::{Origin, Sample, spread};
use crate::routing::Windows;
use crate::run::Run;
use crate::summary::per_token;

/// A held-out window to read.
struct Text {
    /// Its place among the held-out texts of the sample.
    place: usize,
    /// Tokens before those that are scored.
    context: Vec<u32>,
    /// Tokens that are scored, at least one.
    tokens: Vec<u32>,
}

/// What reading a window came to.
#[derive(Clone)]
struct Loss {
    path: ClusterPath,
    nats: f64,
    tokens: u64,
}

/// Nats of a text, by its index, under a path.
type Nats = BTreeMap<(usize, ClusterPath), f64>;

/// By router, the loss on at most `n` of the sample's held-out windows; nothing without memory that is fetched.
/// Of a window longer than a training sequence, that many tokens are read.
pub(super) fn losses(
    run: &Run,
    windows: &Windows,
    sample: &Sample,
    (routed, n): (&[Routed], usize),
) -> Result<BTreeMap<&'static str, MissLoss>> {
    let Some(kind) = sample.held_out.filter(|_| run.bank.is_some() && !run.is_always_on() && n > 0) else {
        return Ok(BTreeMap::new());
    };
    let Origin::Windows(chosen) = &sample.kinds[kind].origin else { return Ok(BTreeMap::new()) };
    let places: Vec<usize> = (0..chosen.len()).collect();
    let mut texts = vec![];
    for place in spread(&places, n) {
        texts.extend(text(run, windows, (place, chosen[place]))?);
    }
    let path = |router: &Routed, text: &Text| -> Option<ClusterPath> {
        router.kinds[kind].as_ref().map(|routes| routes[text.place].0.clone())
    };
    let mut wanted = vec![];
    for (i, text) in texts.iter().enumerate() {
        let mut paths: Vec<ClusterPath> = routed.iter().filter_map(|router| path(router, text)).collect();
        paths.sort();
        paths.dedup();
        wanted.extend(paths.into_iter().map(|path| (i, path)));
    }
    let nats = read(run, &texts, wanted)?;
    let of_router = |router: &Routed| -> Vec<Loss> {
        let loss = |(i, text): (usize, &Text)| {
            let path = path(router, text)?;
            let nats = *nats.get(&(i, path.clone()))?;
            Some(Loss { path, nats, tokens: text.tokens.len() as u64 })
        };
        texts.iter().enumerate().filter_map(loss).collect()
    };
    let named = |name: &str| {
        let router = routed.iter().find(|router| router.name == name);
        router.map(of_router).with_context(|| format!("expected the router {name} in the study"))
    };
    let (exact, random) = (named("exact")?, named("random")?);
    let compared = |router: &Routed| Some((router.name, compare(&of_router(router), &exact, &random)?));
    Ok(routed.iter().filter_map(compared).collect())
}

/// A window of the corpus as a text; none of a single token that goes on with a document: nothing is scored.
fn text(run: &Run, windows: &Windows, (place, window): (usize, usize)) -> Result<Option<Text>> {
    let mut tokens = windows.store.window_tokens(window)?;
    tokens.truncate(run.config.corpus.seq_len as usize);
    let before = windows.store.before(&windows.store.window(window)?)?;
    let context = before.map_or_else(|| tokens.drain(..1).collect(), |token| vec![token]);
    Ok((!tokens.is_empty()).then_some(Text { place, context, tokens }))
}

/// Reads every text with the memory of every path that is wanted of it, those of a length together.
fn read(run: &Run, texts: &[Text], mut wanted: Vec<(usize, ClusterPath)>) -> Result<Nats> {
    wanted.sort_by_key(|(i, _)| texts[*i].tokens.len());
    let mut nats = Nats::new();
    for batch in wanted.chunks(run.config.eval.batch) {
        let continuation = |(i, path): &(usize, ClusterPath)| {
            let Text { context, tokens, .. } = &texts[*i];
            Continuation { context: context.clone(), tokens: tokens.clone(), path: Some(path.clone()) }
        };
        let scores = score(&run.model(), &batch.iter().map(continuation).collect::<Vec<_>>())?;
        nats.extend(batch.iter().cloned().zip(scores.into_iter().map(|score| -score)));
    }
    Ok(nats)
}

/// A router's losses against those under the nearest and under random leaves, window by window.
fn compare(own: &[Loss], exact: &[Loss], random: &[Loss]) -> Option<MissLoss> {
    let missed: Vec<usize> = (0..own.len()).filter(|&i| own[i].path != exact[i].path).collect();
    let above_exact = |windows: &[usize]| {
        let above = |&i: &usize| (own[i].nats - exact[i].nats, own[i].tokens);
        per_token(&windows.iter().map(above).collect::<Vec<_>>())
    };
    let of_missed = above_exact(&missed).map(|cost| {
        let tokens = missed.iter().map(|&i| own[i].tokens).sum::<u64>() as f64;
        let mean = |losses: &[Loss]| missed.iter().map(|&i| losses[i].nats).sum::<f64>() / tokens;
        MissedLoss { loss: mean(own), exact: mean(exact), random: mean(random), cost }
    });
    Some(MissLoss {
        loss: per_token(&own.iter().map(|loss| (loss.nats, loss.tokens)).collect::<Vec<_>>())?,
        above_exact: above_exact(&(0..own.len()).collect::<Vec<_>>())?,
        missed: missed.len(),
        of_missed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_miss_costs_what_its_windows_lose() {
        let loss = |leaf: u32, nats: f64, tokens: u64| Loss {
            path: ClusterPath::new(vec![leaf]).unwrap(),
            nats,
            tokens,
        };
        let exact = [loss(0, 1.0, 10), loss(1, 2.0, 10), loss(2, 3.0, 20)];
        let own = [loss(0, 1.0, 10), loss(3, 5.0, 10), loss(4, 9.0, 20)];
        let random = [loss(9, 8.0, 10), loss(9, 9.0, 10), loss(9, 15.0, 20)];
        let found = compare(&own, &exact, &random).unwrap();
        assert_eq!((found.missed, found.loss.mean, found.loss.n), (2, 15.0 / 40.0, 3));
        assert_eq!(found.above_exact.mean, 9.0 / 40.0);
        let missed = found.of_missed.unwrap();
        assert_eq!((missed.loss, missed.exact, missed.random), (14.0 / 30.0, 5.0 / 30.0, 24.0 / 30.0));
        assert_eq!(missed.cost.mean, 9.0 / 30.0);
        let judge = compare(&exact, &exact, &random).unwrap();
        assert_eq!((judge.missed, judge.above_exact.mean, judge.of_missed), (0, 0.0, None));
        assert_eq!(compare(&[], &[], &[]), None);
    }
}
