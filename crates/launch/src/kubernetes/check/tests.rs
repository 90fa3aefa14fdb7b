use serde_json::{Value, json};

use super::check;
use crate::kubernetes::Job;
use crate::kubernetes::render::tests::site;

/// Places of the manifests that a job with shards has.
const JOB_SET: usize = 0;
const CONFIG_MAP: usize = 1;
const SERVICE: usize = 2;
const SHARDS: usize = 3;
const BUDGET: usize = 4;

const JOB: &str = "/spec/replicatedJobs/0/template/spec";

/// The manifests of a job after `edit`, and what is said about them.
fn checked(edit: impl FnOnce(&mut Vec<Value>)) -> Result<(), String> {
    let site = site();
    let job = Job { name: "facts", workers: 3, shards: 2, site: &site };
    let mut manifests = job.manifests("[run]\n", true).unwrap();
    edit(&mut manifests);
    check(&manifests, &job.given()).map_err(|error| error.to_string())
}

/// What is said when `value` stands at a place; null takes away what is there.
fn refused(manifest: usize, place: &str, value: Value) -> String {
    let put = |manifests: &mut Vec<Value>| {
        let (parent, key) = place.rsplit_once('/').unwrap();
        match manifests[manifest].pointer_mut(parent).expect("a place that is there") {
            Value::Object(map) if value.is_null() => drop(map.remove(key).expect("a key that is there")),
            Value::Object(map) => drop(map.insert(key.replace("~1", "/"), value)),
            Value::Array(items) if key == "-" => items.push(value),
            Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
            other => panic!("{other}"),
        }
    };
    checked(put).expect_err(place)
}

#[test]
fn what_is_rendered_is_right() {
    checked(|_| ()).unwrap();
}

#[test]
fn names_and_labels_are_refused() {
    assert_eq!(
        refused(SHARDS, "/metadata/name", json!("Facts_1")),
        "StatefulSet Facts_1: metadata.name: expected a DNS label (lower-case letters, digits and -, a letter first), \
         found \"Facts_1\""
    );
    assert_eq!(
        refused(CONFIG_MAP, "/metadata/name", json!("a/b")),
        "ConfigMap a/b: metadata.name: expected a DNS name (lower-case letters, digits, - and .), found \"a/b\""
    );
    assert_eq!(
        refused(BUDGET, "/metadata/namespace", json!("other")),
        "PodDisruptionBudget facts-shard: metadata.namespace: expected the namespace of the others, \"default\", \
         found \"other\""
    );
    assert_eq!(
        refused(SERVICE, "/metadata/labels/x", json!("a b")),
        "Service facts-shard: metadata.labels.x: expected the value of a label, found \"a b\""
    );
    let twice = checked(|manifests| manifests.push(manifests[SERVICE].clone())).unwrap_err();
    assert_eq!(
        twice,
        "Service facts-shard: metadata.name: expected a name that no other of this kind has, found \"facts-shard\""
    );
    assert_eq!(
        refused(BUDGET, "/kind", json!("Deployment")),
        "Deployment facts-shard: kind: expected a kind that is known here, found \"Deployment\""
    );
    let long = "a".repeat(60);
    assert_eq!(
        refused(JOB_SET, "/metadata/name", json!(long)),
        format!(
            "JobSet {long}: spec.replicatedJobs[0].name: expected one with which names of pods, such as \
             {long}-worker-0-2-abcde, are DNS labels, found \"worker\""
        )
    );
    let long = "a".repeat(55);
    assert_eq!(
        refused(SHARDS, "/metadata/name", json!(long)),
        format!("StatefulSet {long}: metadata.name: expected 3 characters less, found \"{long}\"")
    );
}

#[test]
fn ports_are_refused() {
    let container = "/spec/template/spec/containers/0";
    for (place, value, expected) in [
        (
            "/ports/0/containerPort",
            json!(70707),
            "ports[0].containerPort: expected a whole number from 1 to 65535, found 70707",
        ),
        (
            "/ports/0/containerPort",
            json!("7070"),
            "ports[0].containerPort: expected a whole number from 1 to 65535, found \"7070\"",
        ),
        (
            "/ports/0/name",
            json!("a-port-without-end"),
            "ports[0].name: expected the name of a port, found \"a-port-without-end\"",
        ),
        (
            "/ports/1/name",
            json!("grpc"),
            "ports[1].name: expected another than that of spec.template.spec.containers[0].ports[0].name, found \"grpc\"",
        ),
        (
            "/ports/1/containerPort",
            json!(7070),
            "ports[1].containerPort: expected another than that of spec.template.spec.containers[0].ports[0].containerPort, found 7070",
        ),
        (
            "/livenessProbe/httpGet/port",
            json!(0),
            "livenessProbe.httpGet.port: expected a whole number from 1 to 65535, found 0",
        ),
        (
            "/livenessProbe/httpGet/port",
            json!("web"),
            "livenessProbe.httpGet.port: expected a number, or the name of a port of the container, found \"web\"",
        ),
    ] {
        let found = refused(SHARDS, &format!("{container}{place}"), value);
        // A port of the service is looked for first.
        let expected = format!("spec.template.spec.containers[0].{expected}");
        assert!(found.ends_with(&expected) || found.contains("targetPort"), "{found}\n{expected}");
    }
    assert_eq!(
        refused(SERVICE, "/spec/ports/1/targetPort", json!("web")),
        "Service facts-shard: spec.ports[1].targetPort: expected a number, or the name of a port of the container, \
         found \"web\""
    );
    assert_eq!(
        refused(SERVICE, "/spec/ports/1/port", json!(-1)),
        "Service facts-shard: spec.ports[1].port: expected a whole number from 1 to 65535, found -1"
    );
}

#[test]
fn quantities_are_refused() {
    let resources = format!("{JOB}/template/spec/containers/0/resources");
    let at = "JobSet facts: spec.replicatedJobs[0].template.spec.template.spec";
    assert_eq!(
        refused(JOB_SET, &format!("{resources}/requests/memory"), json!("64GB")),
        format!(
            "{at}.containers[0].resources.requests.memory: expected a quantity above 0, such as 500m, 8 or 64Gi, \
             found \"64GB\""
        )
    );
    assert_eq!(
        refused(JOB_SET, &format!("{resources}/limits/cpu"), json!("500m")),
        format!(
            "{at}.containers[0].resources.requests.cpu: expected no more than its limit, 500m, found \"12\""
        )
    );
    assert_eq!(
        refused(JOB_SET, &format!("{JOB}/template/spec/volumes/3/emptyDir/sizeLimit"), json!("much")),
        format!(
            "{at}.volumes[3].emptyDir.sizeLimit: expected a quantity above 0, such as 500m, 8 or 64Gi, found \"much\""
        )
    );
    assert_eq!(
        refused(SHARDS, "/spec/replicas", json!(0)),
        "StatefulSet facts-shard: spec.replicas: expected a whole number from 1 to 2147483647, found 0"
    );
    assert_eq!(
        refused(CONFIG_MAP, "/data/more", json!("x".repeat(1 << 20))).split(", found").next().unwrap(),
        "ConfigMap facts: data: expected 1048576 bytes at most (there are 1048582)"
    );
}

#[test]
fn selectors_that_find_no_pods_are_refused() {
    assert_eq!(
        refused(SHARDS, "/spec/template/metadata/labels/app.kubernetes.io~1component", json!("shards")),
        "Service facts-shard: spec.selector: expected labels that some pods have, found \
         {\"app.kubernetes.io/name\":\"anchorage\",\"app.kubernetes.io/instance\":\"facts\",\"app.…"
    );
    assert_eq!(
        refused(SHARDS, "/spec/selector/matchLabels/app.kubernetes.io~1component", json!("shards")),
        "StatefulSet facts-shard: spec.selector.matchLabels.app.kubernetes.io/component: expected the label of the \
         template, \"shard\", found \"shards\""
    );
    assert_eq!(
        refused(SHARDS, "/spec/selector/matchLabels", json!({})),
        "StatefulSet facts-shard: spec.selector.matchLabels: expected labels of the template, found {}"
    );
    assert_eq!(
        refused(BUDGET, "/spec/selector/matchLabels", json!({ "a": "b" })),
        "PodDisruptionBudget facts-shard: spec.selector.matchLabels: expected labels that some pods have, found \
         {\"a\":\"b\"}"
    );
}

#[test]
fn a_budget_has_one_bound() {
    assert_eq!(
        refused(BUDGET, "/spec/minAvailable", json!(1)).split(", found").next().unwrap(),
        "PodDisruptionBudget facts-shard: spec: expected one of minAvailable and maxUnavailable (there are 2)"
    );
    assert!(refused(BUDGET, "/spec/maxUnavailable", Value::Null).contains("(there are 0)"));
    assert!(refused(BUDGET, "/spec/maxUnavailable", json!(-1)).contains("found -1"));
}

#[test]
fn a_probe_has_one_handler() {
    let probe = "/spec/template/spec/containers/0/livenessProbe";
    let at = "StatefulSet facts-shard: spec.template.spec.containers[0].livenessProbe";
    let two = refused(SHARDS, &format!("{probe}/grpc"), json!({ "port": 7070 }));
    let handlers = "exec, grpc, httpGet, tcpSocket";
    assert!(
        two.starts_with(&format!("{at}: expected one of {handlers} (there is grpc and httpGet)")),
        "{two}"
    );
    let none = refused(SHARDS, &format!("{probe}/httpGet"), Value::Null);
    assert!(none.starts_with(&format!("{at}: expected one of {handlers} (there is none)")), "{none}");
    let never = refused(SHARDS, &format!("{probe}/periodSeconds"), json!(0));
    assert_eq!(never, format!("{at}.periodSeconds: expected a whole number from 1 to 2147483647, found 0"));
}

#[test]
fn restarts_fit_the_kind() {
    let policy = format!("{JOB}/template/spec/restartPolicy");
    let at = "JobSet facts: spec.replicatedJobs[0].template.spec";
    assert_eq!(
        refused(JOB_SET, &policy, json!("OnFailure")),
        format!("{at}.template.spec.restartPolicy: expected one of Never, found \"OnFailure\"")
    );
    assert_eq!(
        refused(SHARDS, "/spec/template/spec/restartPolicy", json!("Never")),
        "StatefulSet facts-shard: spec.template.spec.restartPolicy: expected one of Always, found \"Never\""
    );
    let without_policy = checked(|manifests| {
        let job = manifests[JOB_SET].pointer_mut(JOB).unwrap();
        job.as_object_mut().unwrap().remove("podFailurePolicy").unwrap();
        job["template"]["spec"]["restartPolicy"] = "Always".into();
    });
    let expected =
        format!("{at}.template.spec.restartPolicy: expected one of Never, OnFailure, found \"Always\"");
    assert_eq!(without_policy.unwrap_err(), expected);
    for (place, value, expected) in [
        ("completionMode", json!("Indexd"), "completionMode: expected one of Indexed, found \"Indexd\""),
        (
            "podReplacementPolicy",
            json!("Never"),
            "podReplacementPolicy: expected one of Failed, TerminatingOrFailed, found \"Never\"",
        ),
        ("parallelism", json!(2), "parallelism: expected all 3 of completions: they work together, found 2"),
        (
            "podFailurePolicy/rules/0/action",
            json!("Retry"),
            "podFailurePolicy.rules[0].action: expected one of Count, FailIndex, FailJob, Ignore, found \"Retry\"",
        ),
        (
            "podFailurePolicy/rules/0/onExitCodes/containerName",
            json!("main"),
            "podFailurePolicy.rules[0].onExitCodes.containerName: expected the name of a container of the template, found \"main\"",
        ),
        (
            "podFailurePolicy/rules/0/onExitCodes/values",
            json!([75, 1]),
            "podFailurePolicy.rules[0].onExitCodes.values: expected exit codes in ascending order, once each, and none of success, found [75,1]",
        ),
        (
            "podFailurePolicy/rules/0/onExitCodes/values",
            json!([0]),
            "podFailurePolicy.rules[0].onExitCodes.values: expected exit codes in ascending order, once each, and none of success, found [0]",
        ),
        (
            "podFailurePolicy/rules/1/onPodConditions/0/status",
            json!("true"),
            "podFailurePolicy.rules[1].onPodConditions[0].status: expected one of True, False, Unknown, found \"true\"",
        ),
    ] {
        assert_eq!(refused(JOB_SET, &format!("{JOB}/{place}"), value), format!("{at}.{expected}"));
    }
    let both = refused(
        JOB_SET,
        &format!("{JOB}/podFailurePolicy/rules/0/onPodConditions"),
        json!([{ "status": "True" }]),
    );
    assert!(both.contains("rules[0]: expected one of onExitCodes and onPodConditions"), "{both}");
    let none = refused(JOB_SET, "/spec/replicatedJobs", json!([]));
    assert_eq!(none, "JobSet facts: spec.replicatedJobs: expected one job at least, found []");
}

#[test]
fn references_that_lead_nowhere_are_refused() {
    let at = "StatefulSet facts-shard: spec.template.spec";
    let pod = "/spec/template/spec";
    for (place, value, expected) in [
        (
            "volumes/0/configMap/name",
            json!("other"),
            "volumes[0].configMap.name: expected the name of a ConfigMap of these manifests or of the site, found \"other\"",
        ),
        (
            "volumes/1/persistentVolumeClaim/claimName",
            json!("other"),
            "volumes[1].persistentVolumeClaim.claimName: expected the name of a PersistentVolumeClaim of these manifests or of the site, found \"other\"",
        ),
        (
            "volumes/3/secret/secretName",
            json!("other"),
            "volumes[3].secret.secretName: expected the name of a Secret of these manifests or of the site, found \"other\"",
        ),
        (
            "volumes/2/name",
            json!("work"),
            "volumes[2].name: expected another than that of spec.template.spec.volumes[1].name, found \"work\"",
        ),
        (
            "volumes/2/configMap",
            json!({ "name": "facts" }),
            "volumes[2]: expected one source (there are 2), found {\"name\":\"tmp\",\"emptyDir\":{},\"configMap\":{\"name\":\"facts\"}}",
        ),
        (
            "volumes/2/emptyDir/medium",
            json!("RAM"),
            "volumes[2].emptyDir.medium: expected one of Memory, found \"RAM\"",
        ),
        (
            "containers/0/volumeMounts/0/name",
            json!("conf"),
            "containers[0].volumeMounts[0].name: expected the name of a volume of the pod, found \"conf\"",
        ),
        (
            "containers/0/volumeMounts/0/mountPath",
            json!("etc"),
            "containers[0].volumeMounts[0].mountPath: expected an absolute path without a colon, not /, found \"etc\"",
        ),
        (
            "containers/0/volumeMounts/0/mountPath",
            json!("/tmp"),
            "containers[0].volumeMounts[2].mountPath: expected another than that of spec.template.spec.containers[0].volumeMounts[0].mountPath, found \"/tmp\"",
        ),
        (
            "containers/0/args/3",
            json!("$(INDEX)"),
            "containers[0].args[3]: expected variables of the container, which has no INDEX, found \"$(INDEX)\"",
        ),
        (
            "containers/0/env/1/name",
            json!("HOME"),
            "containers[0].env[1].name: expected another than that of spec.template.spec.containers[0].env[0].name, found \"HOME\"",
        ),
        (
            "containers/0/env/0/name",
            json!("MY HOME"),
            "containers[0].env[0].name: expected the name of a variable, found \"MY HOME\"",
        ),
        (
            "containers/0/env/0/value",
            Value::Null,
            "containers[0].env[0]: expected one of value and valueFrom, found {\"name\":\"HOME\"}",
        ),
        ("containers/0/image", json!(""), "containers[0].image: expected an image, found \"\""),
        (
            "topologySpreadConstraints/0/whenUnsatisfiable",
            json!("Ignore"),
            "topologySpreadConstraints[0].whenUnsatisfiable: expected one of ScheduleAnyway, DoNotSchedule, found \"Ignore\"",
        ),
        (
            "imagePullSecrets",
            json!([{ "name": "other" }]),
            "imagePullSecrets[0].name: expected the name of a Secret of these manifests or of the site, found \"other\"",
        ),
        (
            "tolerations",
            json!([{ "key": "a", "operator": "Is" }]),
            "tolerations[0].operator: expected one of Exists, Equal, found \"Is\"",
        ),
        (
            "tolerations",
            json!([{ "key": "a", "operator": "Exists", "effect": "No" }]),
            "tolerations[0].effect: expected one of NoSchedule, PreferNoSchedule, NoExecute, found \"No\"",
        ),
        (
            "nodeSelector",
            json!({ "a b": "c" }),
            "nodeSelector.a b: expected a label whose key is a name, perhaps after a DNS name and /, found \"c\"",
        ),
        (
            "priorityClassName",
            json!("High"),
            "priorityClassName: expected a DNS name (lower-case letters, digits, - and .), found \"High\"",
        ),
    ] {
        assert_eq!(refused(SHARDS, &format!("{pod}/{place}"), value), format!("{at}.{expected}"));
    }
    let claim = |key: &str, value: Value| {
        let mut spec = json!({
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "nvme",
            "resources": { "requests": { "storage": "1Ti" } },
        });
        spec[key] = value;
        let volume = json!({ "name": "scratch", "ephemeral": { "volumeClaimTemplate": { "spec": spec } } });
        refused(SHARDS, &format!("{pod}/volumes/-"), volume)
    };
    let at = format!("{at}.volumes[4].ephemeral.volumeClaimTemplate.spec");
    for (key, value, expected) in [
        (
            "accessModes",
            json!(["ReadWrite"]),
            "accessModes[0]: expected one of ReadOnlyMany, ReadWriteMany, ReadWriteOnce, ReadWriteOncePod, found \
             \"ReadWrite\"",
        ),
        (
            "storageClassName",
            json!("NVMe"),
            "storageClassName: expected a DNS name (lower-case letters, digits, - and .), found \"NVMe\"",
        ),
        ("resources", json!({}), "resources.requests.storage: expected a text, found nothing"),
    ] {
        assert_eq!(claim(key, value), format!("{at}.{expected}"));
    }
    assert_eq!(
        refused(SHARDS, "/spec/serviceName", json!("shards")),
        "StatefulSet facts-shard: spec.serviceName: expected a service of these manifests without an address \
         (clusterIP: None), found \"shards\""
    );
    assert_eq!(
        refused(SERVICE, "/spec/clusterIP", Value::Null),
        "StatefulSet facts-shard: spec.serviceName: expected a service of these manifests without an address \
         (clusterIP: None), found \"facts-shard\""
    );
    assert_eq!(
        refused(JOB_SET, "/spec/network/subdomain", json!("facts-shard")),
        "Service facts-shard: metadata.name: expected another name than the JobSet's service, facts-shard, found \
         \"facts-shard\""
    );
}
