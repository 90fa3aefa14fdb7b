use serde::Deserialize;

use super::*;

/// The site that comes with the program, edited.
pub(in crate::kubernetes) fn site_with(edit: impl FnOnce(&mut toml::Table)) -> Site {
    let text = include_str!("../../../../../cluster/kubernetes.toml");
    let mut table: toml::Table = toml::from_str(text).unwrap();
    let section = table["kubernetes"].as_table_mut().unwrap();
    edit(section);
    Site::deserialize(section.clone()).unwrap()
}

pub(in crate::kubernetes) fn site() -> Site {
    site_with(|_| ())
}

/// The smallest site.
fn small() -> Site {
    let text = r#"
image = "a:1"
volume = "runs"
insecure = true
worker = { cpu = "1", memory = "1Gi" }
shard = { cpu = "500m", memory = "2Gi" }
"#;
    toml::from_str(text).unwrap()
}

#[test]
fn names_are_dns_labels_and_tell_runs_apart() {
    for (run, name) in [
        ("runs/facts", "runs-facts"),
        ("/work/runs/Facts_v2.1/", "work-runs-facts-v2-1"),
        ("160m", "run-160m"),
        ("äöü", "run"),
    ] {
        assert_eq!(name_of(run), name);
    }
    let long = "runs/a-very-long-name-of-a-run-that-has-to-be-cut";
    assert_eq!(name_of(long), "runs-a-very-long-name-of-a-run-c5573a93");
    assert_ne!(name_of(long), name_of(&format!("{long}-too")));
    assert!(name_of(&long.repeat(9)).len() <= MAX_NAME);
}

#[test]
fn a_small_job_is_these_manifests() {
    let site = small();
    let job = Job { name: "facts", workers: 2, shards: 1, site: &site };
    assert_eq!(
        job.settings(),
        [
            r#"memory.shards=["facts-shard-0.facts-shard.default.svc:7070"]"#,
            "collective.insecure=true",
            r#"shard.serve.listen="0.0.0.0:7070""#,
            "shard.serve.bulk_port=7071",
            r#"shard.serve.http="0.0.0.0:9090""#,
            "shard.serve.insecure=true",
        ]
    );
    let manifests = job.manifests("[run]\ndir = \"runs/facts\"\n", true).unwrap();
    assert_eq!(crate::kubernetes::to_yaml(&manifests), include_str!("small.yaml"));
}

fn put(section: &mut toml::Table, pods: &str, (key, value): (&str, &str)) {
    section[pods].as_table_mut().unwrap().insert(key.into(), value.into());
}

fn take(section: &mut toml::Table, pods: &str, key: &str) {
    section[pods].as_table_mut().unwrap().remove(key).unwrap();
}

/// What stands at a place of a manifest.
fn at<'a>(manifest: &'a Value, place: &str) -> &'a Value {
    manifest.pointer(place).unwrap_or(&Value::Null)
}

#[test]
fn a_site_decides_about_pods() {
    let site = site_with(|section| {
        for (key, value) in [
            ("pull_secret", "registry"),
            ("store_secret", "bucket"),
            ("service_account", "anchorage"),
            ("priority_class", "training"),
            ("queue", "research"),
        ] {
            section.insert(key.into(), value.into());
        }
        put(section, "worker", ("token", "worker-token"));
        put(section, "shard", ("token", "shard-tokens"));
        put(section, "worker", ("scratch", "100Gi"));
        put(section, "shard", ("scratch", "1Ti"));
        put(section, "shard", ("scratch_class", "nvme"));
    });
    let job = Job { name: "facts", workers: 64, shards: 16, site: &site };
    let settings = job.settings().join("\n");
    let tls = r#"{ cert = "/etc/anchorage-tls/tls.crt", key = "/etc/anchorage-tls/tls.key", ca = "/etc/anchorage-tls/ca.crt" }"#;
    for setting in [
        r#""facts-shard-15.facts-shard.default.svc:7070"]"#,
        "shard.serve.insecure=false",
        &format!("shard.serve.tls={tls}"),
        &format!("memory.tls={tls}"),
        &format!("collective.tls={tls}"),
        r#"shard.serve.tokens="/etc/anchorage-token/tokens""#,
        r#"memory.token_file="/etc/anchorage-token/token""#,
    ] {
        assert!(settings.contains(setting), "{settings}");
    }
    let manifests = job.manifests("", false).unwrap();
    let (set, shards) = (&manifests[0], &manifests[3]);
    assert_eq!(at(set, "/metadata/labels/kueue.x-k8s.io~1queue-name"), "research");
    assert_eq!(at(set, "/spec/suspend"), true);
    let worker = at(set, "/spec/replicatedJobs/0/template/spec/template/spec");
    let shard = at(shards, "/spec/template/spec");
    assert_eq!(at(shards, "/spec/replicas"), 16);
    for pod in [worker, shard] {
        assert_eq!(at(pod, "/imagePullSecrets/0/name"), "registry");
        assert_eq!(at(pod, "/containers/0/envFrom/0/secretRef/name"), "bucket");
        assert_eq!(at(pod, "/serviceAccountName"), "anchorage");
        assert_eq!(at(pod, "/automountServiceAccountToken"), false);
        assert_eq!(at(pod, "/priorityClassName"), "training");
    }
    let resources = json!({ "cpu": "12", "memory": "96Gi", "nvidia.com/gpu": "1" });
    assert_eq!(at(worker, "/containers/0/resources"), &json!({ "requests": resources, "limits": resources }));
    let toleration = json!([{ "key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule" }]);
    assert_eq!(at(worker, "/tolerations"), &toleration);
    assert_eq!(at(worker, "/nodeSelector"), &json!({ "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3" }));
    let scratch = json!({ "name": "scratch", "mountPath": "/scratch" });
    for (pod, source) in [
        (worker, "/emptyDir/sizeLimit"),
        (shard, "/ephemeral/volumeClaimTemplate/spec/resources/requests/storage"),
    ] {
        assert!(at(pod, "/containers/0/volumeMounts").as_array().unwrap().contains(&scratch));
        let volumes = at(pod, "/volumes").as_array().unwrap();
        let size = volumes.iter().find(|volume| volume["name"] == "scratch").map(|volume| at(volume, source));
        assert!(size.is_some_and(|size| size == "100Gi" || size == "1Ti"), "{volumes:?}");
    }
    // The bank's checkpoints go elsewhere: shards only read the volume.
    assert_eq!(at(shard, "/containers/0/volumeMounts/1/readOnly"), true);
    assert_eq!(at(worker, "/containers/0/volumeMounts/1/readOnly"), &Value::Null);
    let secrets = |pod: &Value| -> Vec<Value> {
        let volumes = pod["volumes"].as_array().unwrap();
        volumes.iter().filter_map(|volume| volume.pointer("/secret/secretName").cloned()).collect()
    };
    assert_eq!(secrets(worker), ["anchorage-worker", "worker-token"]);
    assert_eq!(secrets(shard), ["anchorage-shard", "shard-tokens"]);
}

#[test]
fn a_job_without_shards_is_workers_alone() {
    let site = site_with(|section| {
        section.remove("shard").unwrap();
        take(section, "worker", "certificate");
    });
    // Alone, a worker needs no certificate.
    let job = Job { name: "facts", workers: 1, shards: 0, site: &site };
    assert_eq!(job.settings(), ["memory.shards=[]", "collective.insecure=false"]);
    let two = Job { workers: 2, ..job.clone() };
    let error = two.manifests("", true).unwrap_err().to_string();
    assert!(error.starts_with("kubernetes.worker.certificate: expected the name of a Secret"), "{error}");
    let manifests = job.manifests("", true).unwrap();
    let kinds: Vec<_> = manifests.iter().map(|manifest| manifest["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["JobSet", "ConfigMap"]);
}

#[test]
fn a_site_that_lacks_something_is_refused() {
    type Edit = fn(&mut toml::Table);
    let cases: [(Edit, &str); 9] = [
        (|site| drop(site.insert("user".into(), 0.into())), "user: expected one that is not root, found 0"),
        (|site| drop(site.remove("shard")), "shard: expected what the pods of 2 shards need, found nothing"),
        (
            |site| drop(site.insert("insecure".into(), true.into())),
            "insecure: expected false, since there are certificates, found true",
        ),
        (
            |site| {
                take(site, "worker", "certificate");
                take(site, "shard", "certificate");
            },
            "worker.certificate: expected the name of a Secret with tls.crt, tls.key and ca.crt (or insecure = true), \
             found nothing",
        ),
        (
            |site| take(site, "worker", "certificate"),
            "worker.certificate: expected the name of a Secret with tls.crt, tls.key and ca.crt (or insecure = true), \
             found nothing",
        ),
        (
            |site| take(site, "shard", "certificate"),
            "shard.certificate: expected one beside the workers', found nothing",
        ),
        (
            |site| put(site, "shard", ("token", "a")),
            "worker.token: expected one beside the shards', found nothing",
        ),
        (
            |site| put(site, "worker", ("token", "a")),
            "shard.token: expected one beside the workers', found nothing",
        ),
        // What is no key of the section shows in a manifest.
        (
            |site| drop(site.insert("volume".into(), "My Runs".into())),
            "JobSet facts: spec.replicatedJobs[0].template.spec.template.spec.volumes[1].persistentVolumeClaim.claimName: \
             expected a DNS name (lower-case letters, digits, - and .), found \"My Runs\"",
        ),
    ];
    for (edit, expected) in cases {
        let site = site_with(edit);
        let job = Job { name: "facts", workers: 3, shards: 2, site: &site };
        let found = job.manifests("", true).unwrap_err().to_string();
        assert_eq!(found.trim_start_matches("kubernetes."), expected);
    }
}
