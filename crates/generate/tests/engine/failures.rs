//! What fails alone.

use std::sync::Arc;

use anchor::{PackedBlock, PathMemory};
use cluster_tree::ClusterId;
use generate::engine::{EngineOptions, Event, Reason, Request};
use memory_bank::{BlockSpec, Encoded};

use crate::fixture::{Answer, Fixture, fixture, leaf, read};

/// A block of one number for an anchor of this width.
fn memory(d_model: usize, value: f32) -> PathMemory {
    let spec = BlockSpec::ffn(2, d_model, vec![8], vec![2]);
    let block = Encoded::F32(vec![value; spec.block_len(0)]);
    let id = ClusterId { level: 0, index: 0 };
    PathMemory::new(vec![Arc::new(PackedBlock::pack(id, &block, &spec).unwrap())])
}

/// One request with this memory among six others: its answer, and theirs.
async fn among_others(f: &Fixture, memory: PathMemory) -> (Answer, Vec<Answer>) {
    let engine = f.engine(EngineOptions { kv_mib: 1, ..EngineOptions::default() });
    let mut submitted = vec![];
    for round in 0..2 {
        for i in 0..3 {
            submitted.push(engine.submit(f.request("The boat", Some(leaf(i + round)))).unwrap());
        }
        if round == 0 {
            let broken = Request { memory: memory.clone(), ..f.request("Rope", None) };
            submitted.push(engine.submit(broken).unwrap());
        }
    }
    let mut answers = vec![];
    for generation in submitted {
        answers.push(read(generation, &|_| unreachable!()).await.0);
    }
    let stats = engine.stats();
    assert_eq!((stats.completed, stats.failed, stats.free_pages), (6, 1, stats.total_pages));
    // Pages that held numbers that are not finite are as good as others.
    for i in 0..8 {
        let again = engine.submit(f.request("The boat", Some(leaf(i % 4)))).unwrap();
        answers.push(read(again, &|_| unreachable!()).await.0);
    }
    (answers.remove(3), answers)
}

#[tokio::test]
async fn a_sequence_that_cannot_go_on_fails_alone() {
    let f = fixture();
    let (sound, others) = among_others_sound(f).await;
    assert_eq!(sound.len(), 4);
    let cases = [
        (memory(16, f32::NAN), "the scores of the next token are not finite"),
        (memory(24, 0.1), "memory of 2 layers and d_model 24 for an anchor of 2 and 16"),
    ];
    for (memory, why) in cases {
        let (failed, answers) = among_others(f, memory).await;
        assert_eq!(failed.reason, Some(Reason::Failed(why.into())));
        assert!(failed.tokens.is_empty());
        for (i, answer) in others.iter().zip(&answers) {
            assert_eq!(*answer, sound[*i], "the others do not see it");
        }
    }
}

/// What the others answer where nothing fails, by leaf, and the leaves in the order of the answers.
async fn among_others_sound(f: &Fixture) -> (Vec<Answer>, Vec<usize>) {
    let engine = f.engine(EngineOptions { kv_mib: 1, ..EngineOptions::default() });
    let mut sound = vec![];
    for i in 0..4 {
        let generation = engine.submit(f.request("The boat", Some(leaf(i)))).unwrap();
        sound.push(read(generation, &|_| unreachable!()).await.0);
    }
    (sound, vec![0, 1, 2, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3])
}

#[tokio::test]
async fn the_wrong_memory_at_a_reroute_fails_alone() {
    let f = fixture();
    let engine = f.engine(EngineOptions { kv_mib: 1, ..EngineOptions::default() });
    let reroute = Some(generate::engine::Reroute::EveryTokens(3));
    let mut generation = engine.submit(Request { reroute, ..f.request("The boat", None) }).unwrap();
    while !matches!(generation.next().await, Some(Event::Reroute { .. })) {}
    generation.set_memory(memory(24, 0.1));
    let Some(Event::Done(finish)) = generation.next().await else { panic!("it goes on") };
    assert!(matches!(finish.reason, Reason::Failed(_)));
    assert_eq!(finish.n_generated, 3);
}
