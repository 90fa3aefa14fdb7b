/// Running sums over the dimensions: as many as two vector registers of AVX-512 hold.
pub(crate) const LANES: usize = 32;

/// Σ (a − b)², its sums in an order that does not depend on the processor.
pub fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            let difference = a[lane] - b[lane];
            sums[lane] += difference * difference;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| (a - b) * (a - b)).sum();
    add_up(sums) + rest
}

/// The sum of the lanes, one after the other: adding them by halves makes the compiler cut the loop before it into
/// pairs of lanes.
pub(crate) fn add_up(sums: [f32; LANES]) -> f32 {
    sums.iter().sum()
}
