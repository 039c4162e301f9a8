"""tpu_setup.sh against a gcloud that is not one: its VM's hosts are folders, where what ssh brings really runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shared.run.interruption import Interruption
from shared.run.lost_process import LOST_PROCESS
from tests.tpu_vm.cloud import PROJECT, Cloud, git

VM = ["--name", "circles", "--zone", "us-central2-b", "--type", "v4-8", "--poll_seconds", "0"]
STORAGE = ["--storage", "gs://my-bucket"]
OUTPUT = "--output_dir=/mnt/shared/run"
TRAINING = [OUTPUT, "--validation_prompt", "red circle with blue background", "it's $5 & 20% `more`"]
STOPPED = "Stopped by SIGTERM; continue with --resume_from_checkpoint latest"


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


# --- setting up -------------------------------------------------------------------------------------------------------


def test_a_single_host_is_created_installed_and_checked(cloud: Cloud) -> None:
    result = cloud.run(*VM)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == ["describe", "create", "scp", "install", "count"]
    (creation,) = (call for call in cloud.calls() if "create" in call)
    assert creation[4:] == [
        "circles",
        "--zone=us-central2-b",
        "--accelerator-type=v4-8",
        "--version=tpu-ubuntu2204-base",
    ]
    assert "JAX sees all 4 devices" in result.stdout
    installing = " ".join(cloud.changes()[-1])
    assert "-r requirements_flax.txt jax[tpu]" in installing
    host = cloud.folder / "hosts" / "0"
    assert (host / "controlnet" / "requirements_flax.txt").read_text() == (
        PROJECT / "requirements_flax.txt"
    ).read_text()
    for command in ("ssh circles --zone=us-central2-b", "delete circles --zone=us-central2-b"):
        assert f"gcloud compute tpus tpu-vm {command}\n" in result.stdout


@pytest.mark.parametrize(
    ("accelerator", "devices", "image"),
    [
        ("v2-8", 8, "tpu-ubuntu2204-base"),
        ("v3-32", 32, "tpu-ubuntu2204-base"),
        ("v4-32", 16, "tpu-ubuntu2204-base"),
        ("v5litepod-4", 4, "v2-alpha-tpuv5-lite"),
        ("v5p-8", 4, "v2-alpha-tpuv5"),
        ("v6e-8", 8, "v2-alpha-tpuv6e"),
    ],
)
def test_each_type_has_its_image_and_devices(cloud: Cloud, accelerator: str, devices: int, image: str) -> None:
    output = cloud.run(*VM, "--type", accelerator, "--dry_run").stdout
    assert f"a {accelerator} with {devices} devices" in output
    assert f"--accelerator-type={accelerator} --version={image}\n" in output


def test_image_project_and_spot_are_handed_on(cloud: Cloud) -> None:
    output = cloud.run(*VM, "--version=other", "--project", "mine", "--spot", "--dry_run").stdout
    assert "--zone=us-central2-b --project=mine --accelerator-type=v4-8 --version=other --spot\n" in output
    on_vm = [line for line in output.splitlines() if line.startswith("gcloud compute")]
    assert all("--project=mine" in line for line in on_vm)


def test_a_vm_that_is_there_is_used(cloud: Cloud) -> None:
    assert cloud.run(*VM).returncode == 0
    assert cloud.run(*VM).returncode == 0
    assert Counter(cloud.verbs())["create"] == 1
    assert Counter(cloud.verbs())["install"] == 2


def test_a_vm_in_the_making_is_waited_for(cloud: Cloud) -> None:
    cloud.make_vm("CREATING")
    cloud.plan["events"] = {"describe": {"3": "READY"}}
    assert cloud.run(*VM).returncode == 0
    assert cloud.verbs()[:4] == ["describe"] * 4


def test_a_vm_of_an_earlier_day_that_was_preempted_is_replaced(cloud: Cloud) -> None:
    cloud.make_vm("PREEMPTED")
    assert cloud.run(*VM).returncode == 0
    assert cloud.verbs()[:4] == ["describe", "delete", "describe", "create"]


def test_devices_that_are_missing_are_an_error(cloud: Cloud) -> None:
    cloud.plan["devices"] = 2
    result = cloud.run(*VM, *STORAGE, "--", *TRAINING)
    assert result.returncode == 1
    assert "jax.device_count() is 2, but a v4-8 has 4 devices" in result.stdout
    assert "delete circles" in result.stdout
    assert cloud.trainings() == []


def test_an_installation_that_fails_is_an_error(cloud: Cloud) -> None:
    cloud.plan["install"] = "fails"
    result = cloud.run(*VM)
    assert result.returncode == 1
    assert "circles could not be set up" in result.stderr
    assert "count" not in cloud.verbs()


def test_a_creation_that_fails_is_an_error(cloud: Cloud) -> None:
    cloud.plan["events"] = {"create": {"0": "fails"}}
    result = cloud.run(*VM)
    assert result.returncode == 1
    assert "no more capacity" in result.stderr
    assert "circles could not be created" in result.stderr
    assert "Delete it" not in result.stdout


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_training_gets_its_flags_as_they_were_given(cloud: Cloud) -> None:
    cloud.plan["trainings"] = [{"exit": 0, "says": "step 1: loss 0.5"}]
    result = cloud.run(*VM, *STORAGE, "--", *TRAINING)
    assert result.returncode == 0, result.stderr
    assert cloud.verbs()[2:] == ["scp", "install", "mount", "count", "train", "follow", "describe", "ask"]
    (training,) = cloud.trainings()
    assert training["arguments"] == ["train_flax.py", *TRAINING, "--resume_from_checkpoint=latest"]
    assert training["folder"] == str(cloud.folder / "hosts" / "0" / "controlnet")
    assert training["tokens"] == {}
    assert "step 1: loss 0.5" in result.stdout
    assert "The training is finished; its result is in /mnt/shared/run, which is run in gs://my-bucket" in result.stdout
    assert "--logdir /mnt/shared/run/logs' -- -L 6006:localhost:6006" in result.stdout


def test_a_bucket_is_mounted_by_systemd_so_that_a_shutdown_ends_the_training_first(cloud: Cloud) -> None:
    cloud.run(*VM, *STORAGE, "--", OUTPUT)
    (entry,) = (change[-1] for change in cloud.changes() if change[:2] == ["sudo", "tee"] and "/etc/fstab" in change)
    owner = f"uid={os.getuid()},gid={os.getgid()}"
    assert entry.startswith(f"my-bucket /mnt/shared gcsfuse _netdev,allow_other,{owner},metadata_cache_ttl_secs=0")
    assert ["sudo", "systemctl", "start", "mnt-shared.mount"] in cloud.changes()
    (service,) = (change for change in cloud.changes() if change[0] == "systemd-run")
    assert "--property=RequiresMountsFor=/mnt/shared" in service


def test_an_nfs_server_is_mounted(cloud: Cloud) -> None:
    result = cloud.run(*VM, "--storage", "10.0.0.2:/share", "--", OUTPUT)
    assert result.returncode == 0, result.stderr
    (entry,) = (change[-1] for change in cloud.changes() if "/etc/fstab" in change)
    assert entry == "10.0.0.2:/share /mnt/shared nfs _netdev 0 0\n"
    assert not any(call[0] == "storage" for call in cloud.calls())


def test_a_storage_that_is_mounted_already(cloud: Cloud) -> None:
    cloud.plan["mounted"] = "my-bucket\n"
    result = cloud.run(*VM, *STORAGE, "--", OUTPUT)
    assert result.returncode == 0, result.stderr
    assert not any(change[0] == "sudo" for change in cloud.changes())
    result = cloud.run(*VM, "--storage", "gs://other-bucket", "--", OUTPUT)
    assert result.returncode == 1
    assert "/mnt/shared is my-bucket already, and not other-bucket" in result.stderr


def test_all_hosts_of_a_pod_train(cloud: Cloud) -> None:
    cloud.plan |= {"hosts": 4, "devices": 16}
    result = cloud.run(*VM, "--type", "v4-32", *STORAGE, "--", *TRAINING)
    assert result.returncode == 0, result.stderr
    for host in range(4):
        (training,) = cloud.trainings(host)
        assert training["arguments"][1:-1] == TRAINING


def test_packages_that_flags_ask_for_are_installed(cloud: Cloud) -> None:
    flags = [OUTPUT, "--report_to", "wandb", "--evaluation_fidelity=edges"]
    result = cloud.run(*VM, *STORAGE, "--send_tokens", "--", *flags, WANDB_API_KEY="secret")
    assert result.returncode == 0, result.stderr
    (installing,) = (change for change in cloud.changes() if "pip" in change)
    assert installing[-3:] == ["jax[tpu]", "wandb", "opencv-python-headless"]


def test_tokens_reach_the_training_but_no_command_line(cloud: Cloud) -> None:
    tokens = {"HF_TOKEN": "hf_it's a secret", "WANDB_API_KEY": ""}
    result = cloud.run(*VM, *STORAGE, "--send_tokens", "--", OUTPUT, **tokens)
    assert result.returncode == 0, result.stderr
    assert cloud.trainings()[0]["tokens"] == {"HF_TOKEN": "hf_it's a secret"}
    assert "a secret" not in result.stdout + result.stderr + json.dumps(cloud.calls())
    assert (cloud.folder / "hosts" / "0" / "controlnet-tokens").stat().st_mode & 0o077 == 0
    assert not list((cloud.checkout / ".git").glob("tpu_setup*"))  # what was packed here is gone
    printed = cloud.run(*VM, *STORAGE, "--send_tokens", "--dry_run", "--", OUTPUT, **tokens).stdout
    assert "controlnet-tokens" in printed
    assert "a secret" not in printed


def test_a_training_that_fails_by_itself_is_not_repeated(cloud: Cloud) -> None:
    cloud.plan["trainings"] = [{"exit": 2, "says": "error: no such model"}]
    result = cloud.run(*VM, *STORAGE, "--spot", "--", OUTPUT)
    assert result.returncode == 1
    assert "error: no such model" in result.stdout
    assert "The training failed by itself (exit code 2), so it is not repeated" in result.stderr
    assert "delete circles" in result.stdout
    assert len(cloud.trainings()) == 1


def test_one_host_that_fails_is_enough(cloud: Cloud) -> None:
    cloud.plan |= {"hosts": 2, "devices": 8, "trainings": [{"exit": [0, 1]}]}
    result = cloud.run(*VM, "--type", "v4-16", *STORAGE, "--", OUTPUT)
    assert result.returncode == 1
    assert "failed by itself (exit code 1)" in result.stderr


def test_a_training_that_lost_a_process_is_started_again_on_all_hosts(cloud: Cloud) -> None:
    """As of the out-of-memory killer, with the others' own word for it or JAX's abort."""
    left = {"leaves": ["checkpoint-90", "checkpoint-100", "checkpoint-110.abandoned"]}
    trainings = [{"exit": [137, 75]} | left, {"exit": [0, 134]} | left, {"exit": 0}]
    cloud.plan |= {"hosts": 2, "devices": 8, "trainings": trainings}
    result = cloud.run(*VM, "--type", "v4-16", *STORAGE, "--", OUTPUT)
    assert result.returncode == 0, result.stderr
    assert len(cloud.trainings(0)) == len(cloud.trainings(1)) == 3
    assert "lost a process (exit code 134). It is started again on all hosts, from checkpoint-100" in result.stdout
    verbs = cloud.verbs()
    assert "delete" not in verbs
    ends = verbs.index("list")
    assert verbs[ends : ends + 2] == ["list", "stop"]
    assert "train" in verbs[ends:]


@pytest.mark.parametrize("exits", [[75, 2], [1, 134], [130, 75], [75, 143]])
def test_a_mistake_a_defect_or_a_wish_on_one_host_is_none_that_starting_again_mends(
    cloud: Cloud, exits: list[int]
) -> None:
    cloud.plan |= {"hosts": 2, "devices": 8, "trainings": [{"exit": exits}]}
    result = cloud.run(*VM, "--type", "v4-16", *STORAGE, "--", OUTPUT)
    assert result.returncode == 1
    assert f"failed by itself (exit code {min(exits, key=lambda code: code in (75, 134))})" in result.stderr
    assert len(cloud.trainings()) == 1


def test_processes_are_not_lost_for_ever(cloud: Cloud) -> None:
    """Three restarts in a row that bring no new checkpoint are enough."""
    reached = ["checkpoint-1", "checkpoint-2", "checkpoint-2", "checkpoint-2", "checkpoint-2"]
    cloud.plan["trainings"] = [{"exit": 75, "leaves": [name]} for name in reached]
    result = cloud.run(*VM, *STORAGE, "--", OUTPUT)
    assert result.returncode == 1
    assert "after 3 restarts that brought no new checkpoint" in result.stderr
    assert len(cloud.trainings()) == 5


def test_the_exit_code_for_a_lost_process_is_the_trainers() -> None:
    assert f"[[ $1 == {LOST_PROCESS} ]]" in (PROJECT / "tpu_setup.sh").read_text()


def test_a_training_that_somebody_stopped_is_not_repeated(cloud: Cloud) -> None:
    cloud.plan["trainings"] = [{"exit": 0, "says": STOPPED}]
    result = cloud.run(*VM, *STORAGE, "--", OUTPUT)
    assert result.returncode == 1
    assert "stopped by a signal" in result.stderr
    assert len(cloud.trainings()) == 1


def test_the_words_by_which_a_stopped_training_is_known_are_the_trainers(caplog: pytest.LogCaptureFixture) -> None:
    """Its exit code does not tell it from a finished one."""
    words = "continue with --resume_from_checkpoint latest"
    assert f"grep --quiet '{words}' log" in (PROJECT / "tpu_setup.sh").read_text()
    caplog.set_level("INFO")
    Interruption().say_stopped()
    assert words in caplog.text
    assert "interruption.say_stopped()" in (PROJECT / "flax_trainer" / "train.py").read_text()


# --- preemption -------------------------------------------------------------------------------------------------------

PREEMPTED_AND_RESUMED = ["describe", "delete", "describe", "create", "scp", "install", "mount", "count", "train"]


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "gone"])
def test_a_vm_that_was_preempted_is_replaced_and_the_training_resumed(cloud: Cloud, state: str) -> None:
    cloud.plan["trainings"] = [{"exit": 0, "says": STOPPED}, {"exit": 0}]
    cloud.plan["events"] = {"describe": {"1": state}}
    result = cloud.run(*VM, "--spot", *STORAGE, "--", *TRAINING)
    assert result.returncode == 0, result.stderr
    again = [verb for verb in PREEMPTED_AND_RESUMED if state != "gone" or verb != "delete"]
    assert " ".join(again[state == "gone" :]) in " ".join(cloud.verbs())
    assert [training["arguments"] for training in cloud.trainings()] == [
        ["train_flax.py", *TRAINING, "--resume_from_checkpoint=latest"]
    ] * 2
    assert "The training is finished" in result.stdout


@pytest.mark.parametrize("training", [{"exit": 0, "says": STOPPED}, {"exit": 1}])
def test_a_vm_may_seem_ready_for_a_while_after_its_training_was_ended(cloud: Cloud, training: dict[str, Any]) -> None:
    """On a pod, the hosts that go first make the others fail."""
    cloud.plan["trainings"] = [training, {"exit": 0}]
    cloud.plan["events"] = {"describe": {"3": "PREEMPTED"}}
    result = cloud.run(*VM, "--spot", *STORAGE, "--", OUTPUT)
    assert result.returncode == 0, result.stderr
    assert len(cloud.trainings()) == 2


def test_the_code_stays_the_same_through_preemptions(cloud: Cloud) -> None:
    """A commit made here in the meantime does not get into a run that began before it."""
    cloud.plan["trainings"] = [{"exit": 0, "says": STOPPED}, {"exit": 0, "until": "committed"}]
    cloud.plan |= {"events": {"describe": {"1": "PREEMPTED"}}}
    with cloud.start(*VM, "--spot", *STORAGE, "--", OUTPUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "# Starting the training.\n":
                break
        cloud.commit("later")
        (cloud.folder / "committed").touch()
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(cloud.trainings()) == 2
    assert not (cloud.folder / "hosts" / "0" / "controlnet" / "later").exists()


def test_capacity_that_is_lacking_after_a_preemption_is_waited_for(cloud: Cloud) -> None:
    cloud.plan["trainings"] = [{"exit": 0, "says": STOPPED}, {"exit": 0}]
    cloud.plan["events"] = {"describe": {"1": "PREEMPTED"}, "create": {"1": "fails", "2": "fails"}}
    result = cloud.run(*VM, "--spot", *STORAGE, "--", OUTPUT)
    assert result.returncode == 0, result.stderr
    assert Counter(cloud.verbs())["create"] == 4
    assert len(cloud.trainings()) == 2


def test_a_preemption_while_installing(cloud: Cloud) -> None:
    cloud.plan["events"] = {"ssh install": {"0": "drops"}, "describe": {"2": "PREEMPTED"}}
    result = cloud.run(*VM, "--spot", *STORAGE, "--", OUTPUT)
    assert result.returncode == 0, result.stderr
    assert Counter(cloud.verbs())["create"] == 2
    assert len(cloud.trainings()) == 1


def test_a_lost_connection_does_not_touch_the_training(cloud: Cloud) -> None:
    cloud.plan |= {"trainings_end_at_once": False, "trainings": [{"exit": 0, "until": "connected-again"}]}
    cloud.plan["events"] = {"ssh tail": {"0": "drops"}, "ssh ask": {"0": "drops"}}
    with cloud.start(*VM, *STORAGE, "--", OUTPUT) as process:
        assert process.stdout is not None
        seen = ""
        while "the training goes on" not in seen:
            seen += process.stdout.readline()
        (cloud.folder / "connected-again").touch()
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "circles cannot be reached" in seen
    assert "The training is finished" in output
    assert len(cloud.trainings()) == 1
    assert Counter(cloud.verbs())["install"] == 1


def test_ctrl_c_leaves_the_training_and_the_same_command_takes_it_up(cloud: Cloud) -> None:
    cloud.plan |= {"trainings_end_at_once": False, "trainings": [{"exit": 0, "says": "At work.", "until": "end"}]}
    command = [*VM, *STORAGE, "--", OUTPUT]
    output = interrupt_at_work(cloud, command)
    assert "what runs on circles, if it exists, goes on" in output
    assert "delete circles" in output
    assert cloud.exists()

    with cloud.start(*command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "At work.\n":
                break
        (cloud.folder / "end").touch()
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "The training is finished" in output
    assert len(cloud.trainings()) == 1
    assert Counter(cloud.verbs())["install"] == 1


def test_a_training_that_was_stopped_is_resumed_by_the_same_command(cloud: Cloud) -> None:
    """It is stopped by the command that is printed after Ctrl-C; systemd signals all of a service's processes."""
    trainings = [{"exit": 0, "says": "At work.", "until": "never"}, {"exit": 0}]
    cloud.plan |= {"trainings_end_at_once": False, "trainings": trainings}
    command = [*VM, *STORAGE, "--", OUTPUT]
    output = interrupt_at_work(cloud, command)
    (stop,) = (line.partition(": ")[2] for line in output.splitlines() if line.startswith("# Stop the training"))
    subprocess.run(["bash", "-c", stop], env=cloud.environment(), check=True, timeout=120)
    remains = cloud.folder / "hosts" / "0" / "controlnet-training"
    assert (remains / "exit_code").read_text() == "0\n"
    assert STOPPED in (remains / "log").read_text()
    result = cloud.run(*command)
    assert result.returncode == 0, result.stderr
    assert len(cloud.trainings()) == 2


def test_a_training_with_other_flags_is_not_taken_for_this_one(cloud: Cloud) -> None:
    """Nor its end for the end of what was asked for, which would never have begun."""
    cloud.plan |= {"trainings_end_at_once": False, "trainings": [{"exit": 0, "says": "At work.", "until": "end"}]}
    interrupt_at_work(cloud, [*VM, *STORAGE, "--", OUTPUT])
    result = cloud.run(*VM, *STORAGE, "--", OUTPUT, "--learning_rate=1e-4")
    (cloud.folder / "end").touch()
    assert result.returncode == 1
    assert "circles trains already, with other flags than these" in result.stderr
    assert "systemctl stop" in result.stderr
    assert len(cloud.trainings()) == 1


def interrupt_at_work(cloud: Cloud, command: list[str]) -> str:
    """Press Ctrl-C when the log says `At work.`; returns what is printed after it."""
    with cloud.start(*command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "At work.\n":
                break
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    return output


# --- the dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_what_a_run_executes(cloud: Cloud) -> None:
    """To the letter: its output, run as a script, makes the same calls."""
    arguments = [*VM, "--spot", *STORAGE]
    printed = cloud.run(*arguments, "--dry_run", "--", *TRAINING)
    assert printed.returncode == 0, printed.stderr
    assert printed.stderr == ""
    assert cloud.calls() == []
    assert not list((cloud.checkout / ".git").glob("tpu_setup*"))
    assert cloud.run(*arguments, "--", *TRAINING).returncode == 0
    real = cloud.calls()
    shutil.rmtree(cloud.folder)
    cloud.folder.mkdir()
    (cloud.folder / "plan.json").write_text(json.dumps(cloud.plan))
    script = cloud.folder / "commands.sh"
    script.write_text(printed.stdout)
    subprocess.run(
        ["bash", script], cwd=cloud.checkout, env=cloud.environment(), check=True, capture_output=True, timeout=120
    )
    assert cloud.calls() == real
    assert cloud.trainings()[0]["arguments"][1:-1] == TRAINING


def test_a_dry_run_needs_no_gcloud_and_says_what_follows_a_preemption(cloud: Cloud) -> None:
    cloud.without("gcloud")
    result = cloud.run(*VM, "--spot", *STORAGE, "--dry_run", "--", OUTPUT)
    assert result.returncode == 0, result.stderr
    assert "# gcloud compute tpus tpu-vm delete circles --zone=us-central2-b --quiet\n" in result.stdout


def test_help(cloud: Cloud) -> None:
    result = cloud.run("--help")
    assert result.returncode == 0
    for flag in ("--name", "--zone", "--type", "--spot", "--storage", "--dry_run", "--send_tokens", "--version"):
        assert flag in result.stdout


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--name is ''"),
        (["--name"], "--name needs a value, but none follows it"),
        (["--name", "--spot"], "--name needs a value, but none follows it"),
        (["--name="], "--name is ''"),
        (["--nane", "circles"], "'--nane' is not known here; --help lists what is"),
        (["circles"], "'circles' is not known here"),
        (["--spot=yes"], "--spot takes no value, but was given 'yes'"),
        ([*VM, "--name", "My_VM"], "--name is 'My_VM'; give one of lower-case letters"),
        ([*VM, "--zone", "us-central2"], "--zone is 'us-central2'; give one such as us-central2-b"),
        ([*VM, "--type", "v4"], "--type is 'v4'; give one such as v2-8"),
        ([*VM, "--type", "v4-7"], "--type is 'v4-7'; give one such as v2-8"),
        ([*VM, "--type", "v9-8"], "--type is 'v9-8'; give one such as v2-8"),
        ([*VM, "--type", "v5e-8"], "give v5litepod-8"),
        ([*VM, "--type", "tpu7x-8"], "TPU7x needs Compute Engine or GKE"),
        ([*VM, "--poll_seconds", "soon"], "--poll_seconds is 'soon'; give a whole number"),
        ([*VM, "--storage", "my-bucket"], "--storage is 'my-bucket'; give gs://BUCKET"),
        ([*VM, "--storage", "gs://bucket/folder"], "without a folder"),
        ([*VM, "--send_tokens"], "export one of them"),
        ([*VM, "--", OUTPUT], "--storage is missing"),
        ([*VM, *STORAGE, "--", "--report_to=none"], "--output_dir is ''"),
        ([*VM, *STORAGE, "--", "--output_dir", "run"], "--output_dir is 'run', which no later VM would find"),
        ([*VM, *STORAGE, "--", "--output_dir=/mnt/shared/{timestamp}"], "without {timestamp}"),
        ([*VM, *STORAGE, "--", OUTPUT, "--output_dir=run"], "--output_dir is 'run'"),
        ([*VM, *STORAGE, "--", OUTPUT, "--resume_from_checkpoint", "checkpoint-5"], "leave it out"),
        ([*VM, *STORAGE, "--", OUTPUT, "--hub_token", "hf_x"], "export HF_TOKEN and give --send_tokens"),
        ([*VM, *STORAGE, "--", OUTPUT, "--report_to", "wandb"], "export WANDB_API_KEY and give --send_tokens"),
        ([*VM, *STORAGE, "--", OUTPUT, "--push_to_hub"], "export HF_TOKEN and give --send_tokens"),
    ],
)
def test_mistakes_are_told_before_anything_is_created(cloud: Cloud, arguments: list[str], message: str) -> None:
    result = cloud.run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("tpu_setup.sh: error: ")
    assert result.stderr.count("\n") == 1
    assert "hf_x" not in result.stderr
    assert cloud.calls() == []


def test_training_flags_that_the_trainer_would_not_accept(cloud: Cloud) -> None:
    """Where there is a Python that can ask it; without one, the other tests go on."""
    shutil.copy(PROJECT / "train_flax.py", cloud.checkout)
    git(cloud.checkout, "add", "train_flax.py")
    git(cloud.checkout, "commit", "--quiet", "--message", "trainer")
    cloud.add_program("python3", f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} "$@"\n')
    model = ["--pretrained_model_name_or_path=model", "--dataset_name=data"]
    result = cloud.run(*VM, *STORAGE, "--", OUTPUT, *model, "--learning_rat=1e-5")
    assert result.returncode == 2
    assert "train_flax.py would not accept its flags: unknown flag --learning_rat" in result.stderr
    assert cloud.verbs() == []
    assert cloud.run(*VM, *STORAGE, "--", OUTPUT, *model, "--learning_rate=1e-5").returncode == 0


def test_changes_that_are_not_committed(cloud: Cloud) -> None:
    (cloud.checkout / "requirements_flax.txt").write_text("jax\n")
    result = cloud.run(*VM)
    assert result.returncode == 2
    assert "has changes that are not committed" in result.stderr


def test_no_git_checkout(cloud: Cloud) -> None:
    shutil.rmtree(cloud.checkout / ".git")
    result = cloud.run(*VM, GIT_CEILING_DIRECTORIES=str(cloud.checkout.parent))
    assert result.returncode == 2
    assert "is not a git checkout" in result.stderr


def test_no_gcloud(cloud: Cloud) -> None:
    cloud.without("gcloud")
    result = cloud.run(*VM)
    assert result.returncode == 2
    assert "gcloud is not installed; see https://cloud.google.com/sdk/docs/install" in result.stderr


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"account": ""}, "gcloud is not logged in: run gcloud auth login"),
        ({"hierarchical_namespace": ""}, "--enable-hierarchical-namespace"),
    ],
)
def test_an_account_or_a_bucket_that_will_not_do(cloud: Cloud, plan: dict[str, str], message: str) -> None:
    cloud.plan |= plan
    result = cloud.run(*VM, *STORAGE, "--", OUTPUT)
    assert result.returncode == 2
    assert message in result.stderr
    assert not cloud.exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("STOPPED", "circles is stopped. Start it: gcloud compute tpus tpu-vm start circles"),
        ("no answer", "cannot say"),
    ],
)
def test_a_vm_that_will_not_do(cloud: Cloud, state: str, message: str) -> None:
    cloud.make_vm(state)
    result = cloud.run(*VM)
    assert result.returncode == 1
    assert message in result.stderr
    assert cloud.verbs() == ["describe"]


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    assert shellcheck is not None
    result = subprocess.run([shellcheck, PROJECT / "tpu_setup.sh"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
