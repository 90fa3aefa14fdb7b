//! A step of a shard without a network: from gradients in the arrays that they are received into, in the precision of
//! the wire, to updated blocks.

use std::time::Instant;

use cluster_tree::ClusterId;
use half::bf16;
use memory_bank::{Gradients, Live, Step, Values};
use memory_service::Dtype;
use serde_json::json;

use crate::bank::{Moments, START, Sizes};
use crate::closed_loop::{Result, answer_lines};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    sizes: Sizes,
    /// The gradients are bf16, else f32.
    #[arg(long)]
    bf16: bool,
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// Per line, the seconds of a step and the mean magnitude of the first block's weights after it.
pub(crate) fn run(args: Args) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    let live = Live::new(args.sizes.shard(Moments::Own)?);
    let dtype = if args.bf16 { Dtype::Bf16 } else { Dtype::F32 };
    let (spec, ids) = (args.sizes.spec(), args.sizes.ids());
    let len = |id: ClusterId| spec.block_len(usize::from(id.level));
    let received: Vec<(ClusterId, Values)> =
        ids.iter().map(|&id| (id, gradient(id.index, len(id), dtype))).collect();
    let n_parameters: usize = ids.iter().map(|&id| len(id)).sum();
    let mut step = START;
    answer_lines(|_| {
        step = Step(step.0 + 1);
        // As they arrive from the network, where each block is checked as soon as it is whole.
        let mut gradients = Gradients::default();
        received.iter().try_for_each(|(id, values)| gradients.insert(&spec, *id, values.clone()))?;
        let start = Instant::now();
        live.push(step, 0, gradients)?;
        let seconds = start.elapsed().as_secs_f64();
        let first = live.fetch(&ids[..1])?;
        let mean = first[0].iter().map(|&value| f64::from(value.abs())).sum::<f64>() / first[0].len() as f64;
        Ok(json!({"seconds": seconds, "parameters": n_parameters, "mean": mean}))
    })
}

/// Numbers in 256ths from -0.5 to 0.5, which bf16 holds exactly; torch_peer.py makes the same.
fn gradient(index: u32, len: usize, dtype: Dtype) -> Values {
    let numbers = (0..len).map(|place| ((index as usize * 13 + place * 37) & 255) as f32 / 256.0 - 0.5);
    match dtype {
        Dtype::F32 => Values::F32(numbers.collect()),
        Dtype::Bf16 => Values::Bf16(numbers.map(bf16::from_f32).collect()),
    }
}
