//! The routers of a run, by configuration and in a study.

use std::fs;

use serde_json::Value;

use crate::support::Workdir;

fn study(work: &Workdir, options: &[&str]) -> Value {
    let (out, _) = work.ok(&[&["route-study", "run", "--json"], options].concat());
    serde_json::from_str(out.lines().last().unwrap()).unwrap()
}

/// What the study says of a router.
fn router<'a>(study: &'a Value, name: &str) -> &'a Value {
    let routers = study["routers"].as_array().unwrap();
    routers.iter().find(|router| router["router"] == name).unwrap_or_else(|| panic!("no {name} in {study}"))
}

/// The share of texts of a kind that a router sends to the nearest leaf.
fn agreement(study: &Value, name: &str, kind: &str) -> f64 {
    let texts = router(study, name)["texts"].as_array().unwrap();
    let of_kind = texts.iter().find(|texts| texts["texts"] == kind).unwrap();
    of_kind["exact"].as_array().unwrap().last().unwrap()["mean"].as_f64().unwrap()
}

#[test]
fn a_study_tells_agreement_and_what_a_miss_costs() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    // A beam of more candidates than there are leaves misses nothing.
    let wide = study(&work, &["--set", "retrieve.beam=64", "--windows", "200", "--scored", "24"]);
    for kind in ["training windows", "held-out windows", "8 words", "16 words", "questions"] {
        for name in ["exact", "beam"] {
            assert_eq!(agreement(&wide, name, kind), 1.0, "{name}, {kind}");
        }
        assert!(agreement(&wide, "random", kind) < 0.4, "{kind}");
        assert!(agreement(&wide, "hnsw", kind) > 0.9, "{kind}");
    }
    let loss = |name: &str| router(&wide, name)["loss"].clone();
    assert_eq!(loss("beam")["loss"], loss("exact")["loss"]);
    assert_eq!(loss("beam")["missed"], 0);
    assert!(loss("beam")["of_missed"].is_null());
    let random = loss("random");
    assert!(random["missed"].as_u64().unwrap() > 12, "{random}");
    assert_eq!(random["of_missed"]["loss"], random["of_missed"]["random"]);
    let cost = random["of_missed"]["loss"].as_f64().unwrap() - random["of_missed"]["exact"].as_f64().unwrap();
    assert!((random["of_missed"]["cost"]["mean"].as_f64().unwrap() - cost).abs() < 1e-9, "{random}");
    let page = fs::read_to_string(work.path("run/route-study.html")).unwrap();
    for part in ["Agreement with the nearest leaf", "What a miss costs", "Short prompts", "<svg"] {
        assert!(page.contains(part), "no {part} on the page");
    }

    // The documents are packed by a beam of 4: the oracle agrees with one of the study.
    let narrow = study(&work, &["--scored", "0"]);
    let packed = agreement(&narrow, "oracle", "training windows");
    assert_eq!(packed, agreement(&narrow, "beam", "training windows"));
    assert!(router(&narrow, "beam")["loss"].is_null());
    work.fails(&["route-study", "run", "--windows", "0"], &["--windows: expected at least 1, found 0"]);
    work.fails(&["route-study", "run", "--set", "tree.beam=1"], &["expected a key of [eval], [retrieve]"]);
}

#[test]
fn a_run_routes_as_its_configuration_says() {
    let work = Workdir::new();
    work.ok(&["train", "run.toml"]);
    let text = "The atomic number of gold is";
    let routes = |router: &str| {
        let config = fs::read_to_string(work.path("run/config.toml")).unwrap();
        let mut table: toml::Table = toml::from_str(&config).unwrap();
        table["retrieve"].as_table_mut().unwrap().insert("router".into(), router.into());
        fs::write(work.path("run/config.toml"), toml::to_string(&table).unwrap()).unwrap();
        work.ok(&["route", "run", text]).0
    };
    let exact = routes("exact");
    assert_eq!(exact.lines().count(), 4);
    assert_eq!(routes("hnsw"), exact);
    assert_eq!(routes("random").lines().count(), 1);
    assert_eq!(routes("prototypes").lines().count(), 4);
    for router in ["random", "exact"] {
        work.ok(&["eval", "run", "--set", &format!("retrieve.router={router}")]);
    }
    work.fails(
        &["eval", "run", "--set", "retrieve.router=nearest"],
        &["--set retrieve.router=nearest", "nearest"],
    );
    let settings =
        ["beam=0", "prototypes=0", "hnsw_connections=256", "hnsw_ef_construction=0", "hnsw_ef_search=0"];
    for setting in settings {
        let (key, found) = setting.split_once('=').unwrap();
        let setting = format!("retrieve.{setting}");
        work.fails(
            &["eval", "run", "--set", &setting],
            &[&format!("retrieve.{key}: expected"), &format!("found {found}")],
        );
    }

    // Prototypes are made from the prepared corpus; the others need the run alone.
    fs::rename(work.path("prepared"), work.path("elsewhere")).unwrap();
    routes("hnsw");
    let config = fs::read_to_string(work.path("run/config.toml")).unwrap();
    fs::write(work.path("run/config.toml"), config.replace("\"hnsw\"", "\"prototypes\"")).unwrap();
    let parts = ["retrieve.router = \"prototypes\" is made from the prepared corpus", "prepared"];
    work.fails(&["route", "run", text], &parts);
    work.fails(&["route-study", "run"], &["prepared"]);
}
