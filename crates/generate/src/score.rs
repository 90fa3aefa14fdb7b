use anchor::{Input, Targets};
use cluster_tree::ClusterPath;
use memory_bank::BlockStore;

use crate::{Error, Model, Result};

/// A continuation whose likelihood is asked for.
#[derive(Clone, Debug)]
pub struct Continuation {
    /// The tokens before it, EOT included.
    pub context: Vec<u32>,
    /// The tokens that are scored.
    pub tokens: Vec<u32>,
    /// The path of its memory blocks; none is the plain anchor.
    pub path: Option<ClusterPath>,
}

/// log p(tokens | context) of each continuation, in nats, all in one batch.
///
/// # Errors
/// When memory cannot be fetched, a context is empty, or a continuation is longer than the anchor's
/// positions.
pub fn score<S: BlockStore>(model: &Model<S>, continuations: &[Continuation]) -> Result<Vec<f64>> {
    if let Some(index) = continuations.iter().position(|c| c.context.is_empty()) {
        return Err(Error::EmptyContext { index });
    }
    let whole: Vec<Vec<u32>> =
        continuations.iter().map(|c| [&c.context[..], &c.tokens[..]].concat()).collect();
    let len = whole.iter().map(|tokens| tokens.len().saturating_sub(1)).max().unwrap_or(0);
    if len == 0 {
        return Ok(vec![0.0; continuations.len()]);
    }
    let (mut tokens, mut targets) = (vec![], vec![]);
    for (whole, continuation) in whole.iter().zip(continuations) {
        let first = continuation.context.len() - 1;
        for position in 0..len {
            tokens.push(whole.get(position).copied().unwrap_or(whole[0]));
            let scored = position >= first && position + 1 < whole.len();
            targets.push(if scored { whole[position + 1] } else { corpus::IGNORE });
        }
    }
    let starts = vec![0; tokens.len()];
    let paths: Vec<_> = continuations.iter().map(|c| c.path.clone()).collect();
    let input = Input { tokens: &tokens, starts: &starts, batch: continuations.len(), len };
    let targets = Targets { targets: &targets, scale: 1.0, z_loss: 0.0 };
    let (_, losses) = model.anchor.loss(input, targets, &model.memory(&paths)?)?;
    Ok(losses.chunks_exact(len).map(|row| -row.iter().map(|&x| f64::from(x)).sum::<f64>()).collect())
}
