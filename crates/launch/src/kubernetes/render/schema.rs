//! The form of what is rendered, by the types of the API: a field that these do not know would be lost on the
//! way through them.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::batch::v1::JobTemplateSpec;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tests::{site, site_with};
use crate::kubernetes::Job;

/// A JobSet as far as it is used here, by the custom resource definition `jobset.x-k8s.io/v1alpha2`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct JobSet {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: JobSetSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct JobSetSpec {
    ttl_seconds_after_finished: i32,
    network: Network,
    replicated_jobs: Vec<ReplicatedJob>,
    #[serde(skip_serializing_if = "Option::is_none")]
    suspend: Option<bool>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Network {
    #[serde(rename = "enableDNSHostnames")]
    enable_dns_hostnames: bool,
    publish_not_ready_addresses: bool,
    subdomain: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReplicatedJob {
    name: String,
    replicas: i32,
    template: JobTemplateSpec,
}

fn through<T: DeserializeOwned + Serialize>(manifest: &Value) -> Result<Value, String> {
    let typed: T = serde_json::from_value(manifest.clone()).map_err(|error| error.to_string())?;
    Ok(serde_json::to_value(typed).unwrap())
}

/// Whether a manifest is of the types of the API, all of it.
fn is_of_schema(manifest: &Value) -> Result<(), String> {
    let again = match manifest["kind"].as_str() {
        Some("JobSet") => through::<JobSet>(manifest),
        Some("ConfigMap") => through::<ConfigMap>(manifest),
        Some("Service") => through::<Service>(manifest),
        Some("StatefulSet") => through::<StatefulSet>(manifest),
        Some("PodDisruptionBudget") => through::<PodDisruptionBudget>(manifest),
        kind => Err(format!("{kind:?}")),
    }?;
    if &again == manifest { Ok(()) } else { Err(format!("{again}\nis not\n{manifest}")) }
}

#[test]
fn manifests_have_the_form_of_the_api() {
    let queued = site_with(|section| {
        for key in ["queue", "pull_secret", "store_secret", "service_account", "priority_class"] {
            section.insert(key.into(), "some".into());
        }
        for (key, value) in [("scratch", "1Ti"), ("scratch_class", "nvme"), ("token", "tokens")] {
            for pods in ["worker", "shard"] {
                section[pods].as_table_mut().unwrap().insert(key.into(), value.into());
            }
        }
    });
    for (site, store_is_here) in [(site(), true), (queued, false)] {
        let job = Job { name: "facts", workers: 3, shards: 2, site: &site };
        for manifest in job.manifests("[run]\n", store_is_here).unwrap() {
            is_of_schema(&manifest).unwrap();
        }
    }
}

#[test]
fn fields_that_no_type_knows_are_found_at_any_depth() {
    let site = site();
    let manifests = Job { name: "facts", workers: 3, shards: 2, site: &site }.manifests("", true).unwrap();
    let job = "/spec/replicatedJobs/0/template/spec";
    for (i, place, value) in [
        (0, "/spec".to_owned(), Value::Null),
        (0, format!("{job}/template/spec/containers/0"), Value::Null),
        (0, format!("{job}/podFailurePolicy/rules/0"), Value::Null),
        (3, "/spec/template/spec/containers/0/livenessProbe".to_owned(), "x".into()),
        (4, "/spec".to_owned(), "x".into()),
    ] {
        let mut bad = manifests[i].clone();
        bad.pointer_mut(&place).unwrap()["typo"] = if value.is_null() { 1.into() } else { value };
        is_of_schema(&bad).unwrap_err();
    }
    let mut bad = manifests[0].clone();
    bad.pointer_mut(job).unwrap()["completions"] = "3".into();
    is_of_schema(&bad).unwrap_err();
}
