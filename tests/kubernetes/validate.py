"""Manifests before the validators of others; a manifest made wrong must not pass them."""

import copy
import sys

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

VERSIONS = [f"1.{minor}" for minor in range(28, 38)]


def by_schema(manifest):
    """Fails on a manifest that is not of the schemas of every version."""
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def lost(manifest, again, path=""):
    """The first place of a manifest that the model does not know, or takes for something else."""
    if isinstance(manifest, dict) and isinstance(again, dict):
        keys = manifest.items()
        return next(filter(None, (lost(value, again.get(key), f"{path}.{key}") for key, value in keys)), None)
    if isinstance(manifest, list) and isinstance(again, list) and len(manifest) == len(again):
        items = enumerate(zip(manifest, again))
        return next(filter(None, (lost(*pair, f"{path}[{i}]") for i, pair in items)), None)
    return None if manifest == again else f"{path}: {manifest!r} became {again!r}"


def by_model(manifest):
    """Fails on a JobSet that is not of the published model."""
    place = lost(manifest, JobsetV1alpha2JobSet.from_dict(manifest).to_dict())
    if place:
        raise ValueError(place)
    # The schemas know its jobs.
    for job in manifest["spec"]["replicatedJobs"]:
        by_schema({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]})


def check(manifest):
    by_model(manifest) if manifest["kind"] == "JobSet" else by_schema(manifest)


def put(manifest, path, value):
    """A copy with a value at a path."""
    changed = copy.deepcopy(manifest)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


POD = ["spec", "template", "spec"]
JOB = ["spec", "replicatedJobs", 0, "template"]
WRONG = {
    "JobSet": [
        (["spec", "typo"], 1),
        (["spec", "network", "typo"], 1),
        (["spec", "replicatedJobs", 0, "replicas"], "one"),
        ([*JOB, "spec", "completions"], "2"),
        ([*JOB, *POD, "containers", 0, "typo"], 1),
    ],
    "ConfigMap": [(["data", "number"], 1), (["immutable"], "yes")],
    "Service": [(["spec", "port"], 1)],
    "StatefulSet": [([*POD, "containers", 0, "livenessProbe", "httpget"], {}), (["spec", "replicas"], "2")],
    "PodDisruptionBudget": [(["spec", "maxunavailable"], 1)],
}


def main():
    for path in sys.argv[1:]:
        with open(path) as file:
            manifests = [manifest for manifest in yaml.safe_load_all(file) if manifest]
        kinds = [manifest["kind"] for manifest in manifests]
        assert kinds == ["JobSet", "ConfigMap", "Service", "StatefulSet", "PodDisruptionBudget"], kinds
        for manifest in manifests:
            check(manifest)
            name = f"{manifest['kind']} {manifest['metadata']['name']}"
            refused = 0
            for place, value in WRONG[manifest["kind"]]:
                try:
                    check(put(manifest, place, value))
                except Exception:
                    refused += 1
                else:
                    sys.exit(f"error: {name} passes with {value!r} at {place}")
            print(f"{name}: passes; {refused} wrong ones do not")
    print(f"{len(sys.argv) - 1} jobs, Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}")


main()
