use memory_bank::{BlockStore, Step};
use memory_service::{Dtype, RemoteBank};

use crate::support::{all_ids, bits, gradients, id, reference, remote, shards};

/// Two ranks train six steps over the network.
async fn train(n_shards: usize, bulk: bool) -> (RemoteBank, Vec<crate::support::Served>) {
    let served = shards(n_shards, 2, bulk).await;
    let bank = RemoteBank::connect(remote(&served)).await.unwrap();
    for step in 1..=6 {
        let push = |rank| bank.push(Step(step), rank, gradients(step, rank));
        // The second rank waits for nobody, and repeats itself.
        push(1).await.unwrap();
        push(1).await.unwrap();
        push(0).await.unwrap();
    }
    (bank, served)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_shards_by_any_way_gives_the_bits_of_one_value() {
    let expected = bits(&reference(6, 2));
    for n_shards in [1, 2, 3] {
        for bulk in [false, true] {
            let (bank, _served) = train(n_shards, bulk).await;
            let blocks = bank.fetch(Step(6), &all_ids()).await.unwrap();
            assert!(bits(&blocks) == expected, "{n_shards} shards, bulk {bulk}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wire_carries_exactly_the_blocks_asked_for() {
    for (bulk, dtype, size) in
        [(false, Dtype::F32, 4), (true, Dtype::F32, 4), (true, Dtype::Bf16, 2), (false, Dtype::Bf16, 2)]
    {
        let served = shards(2, 1, bulk).await;
        let mut options = remote(&served);
        (options.fetch_dtype, options.push_dtype) = (dtype, dtype);
        let bank = RemoteBank::connect(options).await.unwrap();
        let ids = [id(0, 1), id(2, 3), id(2, 4)];
        let n: usize = ids.iter().map(|id| crate::support::spec().block_len(usize::from(id.level))).sum();
        bank.fetch(Step(0), &ids).await.unwrap();
        assert_eq!(bank.stats().received_bytes, (n * size) as u64);
        let pushed = gradients(1, 0);
        let n: usize = pushed.iter().map(|block| block.values.len()).sum();
        bank.push(Step(1), 0, pushed).await.unwrap();
        assert_eq!(bank.stats().sent_bytes, (n * size) as u64);
        assert_eq!(bank.stats().retries, 0);
    }
}
