//! The same blocks from a folder, from shards over loopback, and from a store.

use std::sync::Arc;

use memory_bank::{
    Access, AdamW, BankStore, Checkpoint, Live, Placement, Schedule, ShardOptions, Step, StoreOptions,
    TierOptions,
};
use memory_service::{Compression, Limits, ServeOptions, Source, serve};
use serve::memory::{BankSource, Error, MemoryOptions};
use tokio::net::TcpListener;

use crate::made_up::{folder, id, identity, save};
use crate::reader::retrieval;

#[tokio::test(flavor = "multi_thread")]
async fn a_bank_is_read_from_wherever_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let saved = save(dir.path(), &identity(), 2, &[id(0, 0), id(1, 2)]).await;
    let checkpoint = Checkpoint::open_folder(&saved).await.unwrap();
    let schedule = Schedule { peak: 0.02, floor: 0.002, warmup_steps: 1, total_steps: 10 };
    let adamw = AdamW { schedule, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: None };
    let whole = ShardOptions { seed: 7, adamw, world_size: 1, staleness: 0, placement: Placement::WHOLE };
    let shard = checkpoint.load(&identity(), whole).await.unwrap();

    let root = dir.path().join("store").display().to_string();
    let options = StoreOptions { access: Access::Write, ..StoreOptions::default() };
    let store = BankStore::open_url(&root, &[], "made-up", options).await.unwrap();
    let record = store.write(&identity(), shard.snapshot(Step(0)), None).await.unwrap();
    store.commit(Step(2), &[record]).await.unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = ServeOptions {
        identity: memory_service::Identity::new("made-up", &identity().spec, identity().hashes),
        limits: Limits::default(),
        compression: Compression::None,
        tls: None,
        tokens: None,
        store: None,
        bulk: None,
        http: None,
    };
    let source = Source::Live(Arc::new(Live::new(shard)));
    let served_shard = tokio::spawn(serve(source, listener, serving, std::future::pending()));

    let served = retrieval(MemoryOptions::default());
    let tiers = TierOptions::default();
    let url = format!("file://{root}");
    let ids = [id(0, 0), id(0, 1), id(1, 2), id(1, 5)];
    let mut found = vec![];
    for (name, source) in [
        ("folder", folder(&saved)),
        ("shards", BankSource::parse(&address, &tiers)),
        ("store", BankSource::parse(&url, &tiers)),
    ] {
        let info = served.banks().load(name, source).await.unwrap();
        assert_eq!((info.step, info.seed), (Step(2), 7), "{name}");
        let bank = served.banks().get(name).unwrap();
        found.push(served.blocks(&bank, &ids).await.unwrap());
        // Shards do not tell how often each block was updated.
        assert_eq!(bank.updates(id(1, 2)), if name == "shards" { None } else { Some(2) }, "{name}");
    }
    assert!(found[0] == found[1] && found[0] == found[2]);
    let names: Vec<String> = served.banks().list().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["folder", "shards", "store"]);

    let other = BankSource { step: Some(Step(3)), ..BankSource::parse(&address, &tiers) };
    let error = served.banks().load("shards", other).await.unwrap_err();
    assert!(matches!(&error, Error::OtherStep { place, .. } if *place == address), "{error}");
    served_shard.abort();
}

#[test]
fn a_text_names_a_store_shards_or_a_folder() {
    let tiers = TierOptions { ram_mib: 5, store: Some("left".to_owned()), ..TierOptions::default() };
    let store = BankSource::parse("s3://bucket/banks", &tiers);
    assert_eq!((store.tiers.store.as_deref(), store.tiers.ram_mib), (Some("s3://bucket/banks"), 5));
    let shards = BankSource::parse("a:7700,[::1]:7701", &tiers);
    assert_eq!((shards.tiers.shards.len(), shards.tiers.store, shards.folder), (2, None, None));
    for folder in ["runs/x/checkpoints/00000290/memory", "C:7700/memory", "plain", "a:b"] {
        let found = BankSource::parse(folder, &tiers);
        assert_eq!((found.folder.as_deref(), found.tiers.store), (Some(folder.as_ref()), None), "{folder}");
    }
}
