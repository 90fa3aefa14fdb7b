use rand::SeedableRng;

use super::*;

fn sampling(temperature: f64) -> Sampling {
    Sampling { temperature, ..Sampling::default() }
}

fn draws(logits: &[f32], sampling: &Sampling, n: usize) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
    (0..n).map(|_| choose(logits, sampling, &Seen::new(), &mut random).unwrap()).collect()
}

const FOUR: [f32; 4] = [1.0, 3.0, 2.0, -4.0];

/// A uniform number in [0, 1), as a choice takes one.
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Scores as models have them: some high, many low, some equal.
fn scores(random: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let spread = 1.0 + 12.0 * uniform(random);
    let mut score = || {
        let x = (uniform(random) + uniform(random) + uniform(random) - 1.5) * spread;
        if random.next_u32().is_multiple_of(4) { x.round() as f32 } else { x as f32 }
    };
    (0..n).map(|_| score()).collect()
}

/// The scores with penalties and biases, in f64.
fn reference_scores(logits: &[f32], sampling: &Sampling, seen: &Seen) -> Vec<f64> {
    let mut scores: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for (&token, &count) in seen {
        let score = &mut scores[token as usize];
        *score *= if *score > 0.0 { 1.0 / sampling.repetition_penalty } else { sampling.repetition_penalty };
        *score -= sampling.frequency_penalty * f64::from(count);
        *score -= if count > 0 { sampling.presence_penalty } else { 0.0 };
    }
    for (&token, &bias) in &sampling.logit_bias {
        scores[token as usize] += f64::from(bias);
    }
    scores
}

/// The choice with everything put in order at every step and summed as it stands.
fn reference(scores: &[f64], sampling: &Sampling, uniform: f64) -> u32 {
    let mut all: Vec<(u32, f64)> = (0u32..).zip(scores.iter().copied()).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if sampling.temperature == 0.0 {
        return all[0].0;
    }
    let largest = all[0].1;
    all.iter_mut().for_each(|(_, x)| *x = ((*x - largest) / sampling.temperature).exp());
    all.retain(|(_, p)| *p >= sampling.min_p);
    all.truncate(if sampling.top_k == 0 { usize::MAX } else { sampling.top_k });
    let total: f64 = all.iter().map(|(_, p)| p).sum();
    let mut n_kept = 0;
    let mut kept = 0.0;
    while n_kept < all.len() && kept < sampling.top_p * total {
        kept += all[n_kept].1;
        n_kept += 1;
    }
    let mut left = uniform * kept;
    for &(token, p) in &all[..n_kept] {
        left -= p;
        if left < 0.0 {
            return token;
        }
    }
    all[n_kept - 1].0
}

#[test]
fn temperature_0_takes_the_likeliest_and_the_first_of_equals() {
    assert_eq!(draws(&FOUR, &sampling(0.0), 3), [1, 1, 1]);
    assert_eq!(draws(&[2.0, 5.0, 5.0], &sampling(0.0), 1), [1]);
    assert_eq!(draws(&[-1.0, -0.0, 0.0, 0.0], &sampling(0.0), 1), [2], "as the total order has it");
    assert_eq!(draws(&[-1.0, -0.0, -0.0], &sampling(0.0), 1), [1]);
    let biased = Sampling { logit_bias: [(3, 8.0), (1, -100.0)].into(), ..sampling(0.0) };
    assert_eq!(draws(&FOUR, &biased, 1), [3]);
}

#[test]
fn sampling_follows_the_softmax_and_repeats_by_seed() {
    let drawn = draws(&FOUR, &sampling(1.0), 20_000);
    assert_eq!(drawn, draws(&FOUR, &sampling(1.0), 20_000));
    let share = |token| drawn.iter().filter(|&&t| t == token).count() as f64 / 20_000.0;
    // softmax(1, 3, 2, −4) = 0.0900, 0.6648, 0.2446, 0.0006
    assert!((share(1) - 0.6648).abs() < 0.015 && (share(0) - 0.09).abs() < 0.01, "{}", share(1));
}

#[test]
fn cuts_keep_what_they_say() {
    let kept = |sampling| {
        let drawn: std::collections::BTreeSet<u32> = draws(&FOUR, &sampling, 4_000).into_iter().collect();
        drawn.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(kept(Sampling { top_p: 0.7, ..sampling(1.0) }), [1, 2], "the smallest set that reaches it");
    assert_eq!(kept(Sampling { top_p: 0.6, ..sampling(1.0) }), [1]);
    assert_eq!(kept(Sampling { top_k: 3, ..sampling(1.0) }), [0, 1, 2]);
    assert_eq!(kept(Sampling { top_k: 1, ..sampling(9.0) }), [1]);
    // e^−2 = 0.135, e^−1 = 0.368
    assert_eq!(kept(Sampling { min_p: 0.3, ..sampling(1.0) }), [1, 2]);
    assert_eq!(kept(Sampling { min_p: 1.0, ..sampling(1.0) }), [1]);
    // Of the two that top_k leaves, 0.731 and 0.269.
    assert_eq!(kept(Sampling { top_k: 2, top_p: 0.73, ..sampling(1.0) }), [1]);
}

#[test]
fn candidates_in_part_choose_what_all_in_order_do() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let mut early = 0;
    for case in 0..4_000 {
        let n = 1 + random.next_u32() as usize % if case % 10 == 0 { 3_000 } else { 200 };
        let scores = scores(&mut random, n);
        let temperature = [0.01, 0.3, 1.0, 3.0, 1e3, 1e20][random.next_u32() as usize % 6];
        let top_p =
            [1.0, 1.0 - 1e-12, 0.999, 0.9, uniform(&mut random).max(1e-9)][random.next_u32() as usize % 5];
        let number =
            [uniform(&mut random), 0.0, 1.0 - f64::EPSILON / 2.0][(random.next_u32() % 8) as usize / 6];
        let largest = likeliest(&scores).unwrap().1;
        let weights = scores.iter().map(|x| (f64::from(x - largest) / temperature).exp());
        let ranked = || Ranked::new((0u32..).zip(weights.clone()).collect());
        let drawn = ranked().draw(top_p, number);
        if let Some(token) = ranked().draw_early(top_p, number) {
            assert_eq!(token, drawn, "n {n} temperature {temperature} top_p {top_p} number {number}");
            early += 1;
        }
    }
    assert!(early > 3_000, "only {early} of 4000 were told early");
}

#[test]
fn choices_are_those_of_a_plain_reference() {
    let (mut random, mut n_equal) = (ChaCha8Rng::seed_from_u64(5), 0);
    for case in 0..2_000 {
        let n = 2 + random.next_u32() as usize % 300;
        let logits = scores(&mut random, n);
        let mut part = |values: [f64; 4]| values[random.next_u32() as usize % 4];
        let mut sampling = Sampling {
            temperature: part([0.0, 0.5, 1.0, 2.0]),
            top_k: part([0.0, 0.0, 1.0, 20.0]) as usize,
            top_p: part([1.0, 1.0, 0.9, 0.4]),
            min_p: part([0.0, 0.0, 0.02, 0.2]),
            ..Sampling::default()
        };
        let mut seen = Seen::new();
        if case % 2 == 0 {
            sampling.presence_penalty = part([0.0, 0.5, -1.0, 2.0]);
            sampling.frequency_penalty = part([0.0, 0.25, -0.5, 1.0]);
            sampling.repetition_penalty = part([1.0, 1.0, 1.25, 0.5]);
            let mut token = || random.next_u32() % n as u32;
            seen.extend([(token(), 0), (token(), 1), (token(), 2), (token(), 7)]);
            sampling.logit_bias = [(token(), 3.5), (token(), -2.0)].into();
        }
        let mut stream = ChaCha8Rng::seed_from_u64(case);
        let chosen = choose(&logits, &sampling, &seen, &mut stream).unwrap();
        let number = uniform(&mut ChaCha8Rng::seed_from_u64(case));
        let scores = reference_scores(&logits, &sampling, &seen);
        let expected = reference(&scores, &sampling, number);
        // Scores that f32 cannot tell apart are in the order of the tokens.
        let difference = (scores[chosen as usize] - scores[expected as usize]).abs();
        assert!(difference < 1e-5, "{chosen} not {expected} by {sampling:?} {seen:?}");
        n_equal += usize::from(chosen == expected);
    }
    assert!(n_equal > 1_980, "{n_equal} of 2000");
}

#[test]
fn scores_that_are_not_finite_are_an_error() {
    for wrong in [&[f32::NAN, 1.0][..], &[1.0, f32::INFINITY], &[f32::NEG_INFINITY], &[1.0, -f32::NAN], &[]] {
        let found = choose(wrong, &sampling(0.0), &Seen::new(), &mut ChaCha8Rng::seed_from_u64(0));
        assert!(matches!(found, Err(Error::NotFinite)), "{wrong:?}");
    }
    assert_eq!(draws(&[f32::NEG_INFINITY, 1.0], &sampling(1.0), 20), [1; 20], "−∞ is never chosen");
}
