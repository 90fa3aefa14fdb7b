//! What may be asked of tiers.

use std::sync::Arc;

use memory_bank::{
    BankOptions, BlockDtype, BlockStore, DiskOptions, LocalBank, Step, TierOptions, TierSource, Tiered,
};

use crate::support::{Bank, STEP, id, ram, spec, version};

#[test]
fn options_are_one_object() {
    let text = r#"{
        "ram_mib": 512, "pinned_levels": [0], "disk": {"dir": "/scratch/blocks", "mib": 4096},
        "dtype": "int8", "shards": ["a:7000", "b:7000"], "store": "s3://banks/run/00001000"
    }"#;
    let options: TierOptions = serde_json::from_str(text).unwrap();
    let expected = TierOptions {
        ram_mib: 512,
        pinned_levels: vec![0],
        disk: Some(DiskOptions { dir: "/scratch/blocks".into(), mib: 4096 }),
        dtype: BlockDtype::Int8,
        shards: vec!["a:7000".to_owned(), "b:7000".to_owned()],
        store: Some("s3://banks/run/00001000".to_owned()),
    };
    assert_eq!(options, expected);
    options.validate(&spec()).unwrap();
    let empty: TierOptions = serde_json::from_str("{}").unwrap();
    assert_eq!((&empty, empty.dtype), (&TierOptions::default(), BlockDtype::F32));
    empty.validate(&spec()).unwrap();

    let error = |text: &str| serde_json::from_str::<TierOptions>(text).unwrap_err().to_string();
    assert!(error(r#"{"ram": 1}"#).contains("unknown field `ram`"));
    assert!(error(r#"{"disk": {"dir": "a", "mib": 1, "gib": 1}}"#).contains("unknown field `gib`"));
    assert!(error(r#"{"disk": {"dir": "a"}}"#).contains("missing field `mib`"));
    assert!(error(r#"{"dtype": "int4"}"#).contains("unknown variant `int4`"));
}

#[test]
fn options_that_cannot_be_are_named() {
    let error = |options: TierOptions| options.validate(&spec()).unwrap_err().to_string();
    let pinned = |levels: &[usize], ram_mib, dtype| TierOptions {
        pinned_levels: levels.to_vec(),
        ..ram(ram_mib, dtype)
    };
    assert_eq!(
        error(pinned(&[0, 1], 9, BlockDtype::F32)),
        "pinned_levels is 1, expected some of the levels [0, 2]"
    );
    assert_eq!(
        error(pinned(&[0, 0], 9, BlockDtype::F32)),
        "pinned_levels is [0, 0], expected each level once"
    );
    assert_eq!(
        error(pinned(&[0, 2], 1, BlockDtype::F32)),
        "ram_mib is 1, expected at least 2 for pinned_levels [0, 2]"
    );
    pinned(&[0, 2], 2, BlockDtype::F32).validate(&spec()).unwrap();
    pinned(&[0, 2], 1, BlockDtype::Bf16).validate(&spec()).unwrap();
    assert_eq!(
        error(pinned(&[0], 0, BlockDtype::Int8)),
        "ram_mib is 0, expected at least 1 for pinned_levels [0]"
    );

    let disk = |dir: &str, mib| TierOptions {
        disk: Some(DiskOptions { dir: dir.into(), mib }),
        ..TierOptions::default()
    };
    assert_eq!(error(disk("a", 0)), "disk.mib is 0, expected at least 1 for one block");
    assert_eq!(error(disk("", 1)), "disk.dir is empty, expected a folder");
    let shards = TierOptions { shards: vec!["a:1".to_owned(), String::new()], ..TierOptions::default() };
    assert_eq!(error(shards), r#"shards is ["a:1", ""], expected addresses"#);
    let store = TierOptions { store: Some(String::new()), ..TierOptions::default() };
    assert_eq!(error(store), "store is empty, expected a URL");
}

#[tokio::test]
async fn what_only_a_bank_itself_can_do_is_refused() {
    let bank = Bank::new().await;
    let tiered = bank.over(&TierOptions::default(), &bank.remote());
    assert_eq!(tiered.spec(), &spec());
    let push = tiered.push(Step(3), 0, Vec::new()).await.unwrap_err().to_string();
    assert_eq!(push, "cannot push step 3: the bank at step 2 is open read-only");
    let save = tiered.save(STEP).await.unwrap_err().to_string();
    assert_eq!(save, "cannot save step 2: the bank at step 2 is open read-only");
    let later = tiered.fetch(Step(3), &[id(0, 0)]).await.unwrap_err().to_string();
    assert_eq!(later, "fetch after step 3, but the bank is open read-only at step 2");
    for (unknown, text) in [
        (id(2, 1024), "no block level2/1024: level 2 has 1024 blocks"),
        (id(1, 0), "no block level1/0: level 1 has 0 blocks"),
    ] {
        assert_eq!(tiered.fetch(STEP, &[id(0, 0), unknown]).await.unwrap_err().to_string(), text);
    }
}

#[tokio::test]
async fn sources_are_of_one_bank() {
    let bank = Bank::new().await;
    let open = |sources| Tiered::open(&TierOptions::default(), version(), sources).err().unwrap().to_string();
    assert_eq!(open(vec![]), "sources is none, expected at least one");
    let options = BankOptions {
        seed: 7,
        adamw: serde_json::from_value(serde_json::json!({
            "schedule": {"peak": 0.1, "floor": 0.1, "warmup_steps": 0, "total_steps": 1},
            "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0, "clip": null,
        }))
        .unwrap(),
        world_size: 1,
        staleness: 0,
        checkpoint_root: "/nonexistent".into(),
        offload: None,
        hashes: Default::default(),
    };
    let mut wider = spec();
    wider.width[0] = 5;
    let other = Arc::new(LocalBank::create(wider, options).unwrap());
    let text = open(vec![TierSource::new("a", bank.local()), TierSource::new("b", other)]);
    assert!(text.contains("width: [5, 0, 2]") && text.ends_with("as of source a"), "{text}");
}
