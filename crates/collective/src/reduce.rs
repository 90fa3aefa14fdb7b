use bytes::Bytes;

use crate::{Call, Error, Leaves, Mesh, Result, TreeSum};

/// Sums arrays over all leaves of all workers: `parts` are this one's, as a [`TreeSum`] over its leaves of
/// one array each has left them, and `sum` takes the whole. The bits are the same on every worker, and
/// those of one worker alone.
///
/// # Errors
/// When another rank fails, or has arrays of another length.
pub fn all_reduce(
    mesh: &mut Mesh,
    call: &Call,
    leaves: Leaves,
    parts: &[&[f32]],
    sum: &mut [f32],
) -> Result<()> {
    let (rank, world_size, len) = (mesh.rank(), mesh.world_size(), sum.len());
    let slice = |rank: usize| rank * len / world_size..(rank + 1) * len / world_size;
    let slice_of_all = |rank: usize| -> Bytes {
        let values: Vec<f32> = parts.iter().flat_map(|part| &part[slice(rank)]).copied().collect();
        to_bytes(values)
    };
    let own = slice(rank);
    let received = mesh.exchange(call, (0..world_size).map(slice_of_all).collect())?;
    let mut total = TreeSum::new(leaves.n, 0..leaves.n);
    for (from, bytes) in received.iter().enumerate() {
        // Which none of them has to be told.
        let ranges = TreeSum::ranges(leaves.n, leaves.of(from), leaves.of(from));
        check(call, from, bytes, ranges.len() * own.len())?;
        for (i, range) in ranges.into_iter().enumerate() {
            let part = i * own.len() * size_of::<f32>()..(i + 1) * own.len() * size_of::<f32>();
            total.push_array(range, bytemuck::pod_collect_to_vec(&bytes[part]));
        }
    }
    // One part, unless there is not a single leaf.
    let (_, mine) = total.finish_arrays().pop().unwrap_or((0..0, vec![0.0; own.len()]));
    let gathered = mesh.all_gather(call, to_bytes(mine))?;
    for (from, bytes) in gathered.iter().enumerate() {
        let range = slice(from);
        check(call, from, bytes, range.len())?;
        bytemuck::cast_slice_mut(&mut sum[range]).copy_from_slice(bytes);
    }
    Ok(())
}

fn check(call: &Call, rank: usize, bytes: &Bytes, n_values: usize) -> Result<()> {
    let (expected, found) = (n_values * size_of::<f32>(), bytes.len());
    if expected == found {
        return Ok(());
    }
    Err(Error::Length { rank, call: call.clone(), expected, found })
}

/// Numbers as they are in memory, in little-endian.
fn to_bytes(values: Vec<f32>) -> Bytes {
    Bytes::from_owner(Numbers(values))
}

struct Numbers(Vec<f32>);

impl AsRef<[u8]> for Numbers {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
