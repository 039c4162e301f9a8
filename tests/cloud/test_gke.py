"""cloud/gke/: manifests that Kubernetes and JobSet know, with a command that the trainer knows."""

import copy
import os
import socket
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import jax
import kubernetes_validate
import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster
from jax._src.clusters.cluster import ClusterEnv
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from flax_trainer.distributed.joining import join_processes
from shared.config import TrainConfig
from tests.cloud.commands import CLOUD, MOUNT, flax_config, goes_on

SLICES = {"v6e": "tpu-v6e-slice", "tpu7x": "tpu7x"}
KUBERNETES = ("1.33", "1.37")  # of GKE when this was written, and after
CHIPS_OF_A_HOST = 4

Manifest = dict[str, Any]


def documents(name: str) -> tuple[Manifest, Manifest]:
    account, jobset = yaml.safe_load_all((CLOUD / "gke" / f"{name}.yaml").read_text(encoding="utf-8"))
    return account, jobset


@pytest.fixture(params=SLICES)
def jobset(request: pytest.FixtureRequest) -> Manifest:
    return documents(request.param)[1]


def check_jobset(jobset: Manifest) -> None:
    """Every field is one of JobSet's, and of the right kind; and its jobs are Kubernetes'."""
    assert JobsetV1alpha2JobSet.from_dict(copy.deepcopy(jobset)).to_dict() == jobset
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}} | replicated["template"]
        for version in KUBERNETES:
            kubernetes_validate.validate(job, version, strict=True)


def job_of(jobset: Manifest) -> Manifest:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1, "a slice; several are another matter"
    return replicated["template"]["spec"]


def pod_of(jobset: Manifest) -> Manifest:
    return job_of(jobset)["template"]["spec"]


def container_of(jobset: Manifest) -> Manifest:
    (container,) = pod_of(jobset)["containers"]
    return container


def test_it_is_a_jobset(jobset: Manifest) -> None:
    check_jobset(jobset)


@pytest.mark.parametrize("name", SLICES)
def test_its_account_is_there(name: str) -> None:
    account, jobset = documents(name)
    for version in KUBERNETES:
        kubernetes_validate.validate(account, version, strict=True)
    assert pod_of(jobset)["serviceAccountName"] == account["metadata"]["name"]


def _rename(part: Callable[[Manifest], Manifest], name: str, other: str) -> Callable[[Manifest], None]:
    def mistake(jobset: Manifest) -> None:
        place = part(jobset)
        place[other] = place.pop(name)

    return mistake


@pytest.mark.parametrize(
    "mistake",
    [
        _rename(lambda jobset: jobset["spec"]["failurePolicy"], "maxRestarts", "maxRestart"),
        _rename(lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0], "action", "do"),
        _rename(job_of, "backoffLimit", "backofLimit"),
        _rename(pod_of, "nodeSelector", "nodeSelectors"),
        _rename(container_of, "args", "arg"),
        lambda jobset: jobset["spec"]["failurePolicy"].update(maxRestarts="100"),
        lambda jobset: job_of(jobset).update(completions="4"),
    ],
)
def test_mistakes_are_found(mistake: Callable[[Manifest], None]) -> None:
    _, jobset = documents("v6e")
    mistake(jobset)
    with pytest.raises((AssertionError, ValueError, kubernetes_validate.ValidationError)):
        check_jobset(jobset)


def test_its_hosts_are_those_of_the_slice(jobset: Manifest) -> None:
    job, selector = job_of(jobset), pod_of(jobset)["nodeSelector"]
    chips = prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"] == chips // CHIPS_OF_A_HOST
    assert container_of(jobset)["resources"]["limits"] == {"google.com/tpu": str(CHIPS_OF_A_HOST)}


def test_the_slices_differ_in_nothing_else() -> None:
    ways = []
    for name, accelerator in SLICES.items():
        account, jobset = documents(name)
        assert pod_of(jobset)["nodeSelector"].pop("cloud.google.com/gke-tpu-accelerator") == accelerator
        del pod_of(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        ways.append((account, jobset))
    assert ways[0] == ways[1]


def test_its_command_goes_on_where_it_was(jobset: Manifest) -> None:
    container = container_of(jobset)
    script, *words = container["command"]
    assert os.access(CLOUD.parent / script, os.X_OK)
    config = flax_config([*words, *container["args"]])
    assert goes_on(config)
    (mount,) = container["volumeMounts"]
    (volume,) = pod_of(jobset)["volumes"]
    assert (mount["mountPath"], mount["name"]) == (MOUNT, volume["name"])
    attributes = volume["csi"]["volumeAttributes"]
    assert config.ccache == f"gs://{attributes['bucketName']}/compiled"
    assert set(attributes["mountOptions"].split(",")) == {
        "metadata-cache:ttl-secs:0",
        "metadata-cache:negative-ttl-secs:0",
    }


def test_a_lost_host_begins_all_anew_and_a_mistake_does_not(jobset: Manifest) -> None:
    job, policy = job_of(jobset), jobset["spec"]["failurePolicy"]
    assert job["backoffLimit"] == 0, "a pod that fails has failed the job"
    assert pod_of(jobset)["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container_of(jobset)["name"], "operator": "In", "values": [2]}
    assert policy["rules"][0] | {"name": ""} == {
        "name": "",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    assert policy["maxRestarts"] > 0


@pytest.fixture
def on_gke(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX on a TPU host of GKE, up to what it would be initialised with."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda _: None)
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.0")
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.usefixtures("on_gke")
def test_its_hosts_find_each_other(jobset: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variables that GKE gives the pods of an indexed job with names in the network."""
    found = []

    def initialize(address: str | None, count: int | None, number: int | None, **_: object) -> None:
        found.append(ClusterEnv.auto_detect_unset_distributed_params(address, count, number, None, None, 10)[:3])

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    name, count = jobset["metadata"]["name"], job_of(jobset)["completions"]
    hosts = [f"{name}-slice-0-{number}.{name}" for number in range(count)]
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(hosts))
    for number in range(count):
        monkeypatch.setenv("TPU_WORKER_ID", str(number))
        join_processes(TrainConfig())
    assert found == [(f"{hosts[0]}:8482", count, number) for number in range(count)]


def test_the_image_has_what_the_flax_backend_needs() -> None:
    lines = (CLOUD / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (installing,) = [line for line in lines if line.startswith("RUN")]
    assert "requirements_flax.txt" in installing
    assert "'jax[tpu]'" in installing
    assert lines[-1] == "COPY . ."
