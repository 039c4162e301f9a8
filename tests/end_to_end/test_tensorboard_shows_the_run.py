"""What a user sees who profiles a run and starts TensorBoard on its logs."""

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from xprof.convert import raw_to_tool_data

from tests.end_to_end.support.browser import NAMES, chromium, new_page
from tests.end_to_end.support.running import losses, metrics, train_flax
from tests.end_to_end.support.tensorboard_server import TensorBoard, tensorboard, trace_viewer
from tests.end_to_end.support.tiny_runs import PROMPT, STEPS, arguments

PROFILED = 2
ON_THE_HOST = {"data_wait", "host_to_device", "wait_for_step"}
ON_THE_DEVICE = {
    *("vae", "text_encoder", "controlnet", "unet"),
    *("unet backward", "controlnet backward", "optimizer"),
}


@pytest.fixture(scope="module")
def run(base_model: Path, condition: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("profiled") / "run"
    validation = ["--validation_image", condition, "--validation_prompt", PROMPT, "--num_validation_images", 1]
    profiling = [f"--profile_steps=={PROFILED}", "--profile_validation", "--profile_memory"]
    # On one device: traces of eight are eight times as long.
    output = train_flax(arguments(base_model, output_dir, *validation, *profiling, "--checkpointing_steps", 100))
    (output_dir / "output.txt").write_text(output)
    return output_dir


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[TensorBoard]:
    with tensorboard(run / "logs") as running:
        yield running


def _events(trace: dict[str, Any]) -> set[str]:
    return {event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"}


def test_the_log_says_where_the_time_went_and_where_to_look(run: Path) -> None:
    output = (run / "output.txt").read_text()
    assert "The training step is compiled" in output
    assert "The first step is done" in output
    assert f"{STEPS - 1} steps of " in output
    assert f"tensorboard --logdir {run / 'logs'}" in output
    assert "pprof" in output
    assert {path.name for path in run.glob("*.prof")} == {"memory_initial.prof", "memory_final.prof"}
    entries = metrics(run)
    assert all(entry["host_to_device"] > 0 and entry["model_tflops_per_second"] > 0 for entry in entries)
    assert "mfu" not in entries[0], "nobody knows the peak of a CPU"
    report = json.loads((run / "report.json").read_text())
    assert 0 < report["seconds_to_first_step"] < report["seconds_total"]
    assert report["model_tflops_per_second"] == entries[-1]["model_tflops_per_second"]


def test_scalars_and_images_are_served(run: Path, server: TensorBoard) -> None:
    (name,) = server.get_json("data/plugin/scalars/tags")
    points = server.get_json("data/plugin/scalars/scalars", run=name, tag="loss")
    assert [step for _, step, _ in points] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([loss for _, _, loss in points], losses(run), rtol=1e-6)
    tags = server.get_json("data/plugin/images/tags")[name]
    (listed,) = server.get_json("data/plugin/images/images", run=name, tag="validation/0/1", sample="0")
    assert "validation/0/1" in tags
    assert listed["step"] == STEPS
    picture = server.get(f"data/plugin/images/individualImage?{listed['query']}&")
    assert PIL.Image.open(io.BytesIO(picture)).size == (64, 64)


def test_the_profile_tab_has_both_traces_with_our_scopes(run: Path, server: TensorBoard) -> None:
    assert server.get_json("data/plugins_listing")["profile"]["enabled"]
    traces = {name.partition("/")[0]: name for name in server.get_json("data/plugin/profile/runs")}
    assert traces.keys() == {"profile_steps", "profile_validation"}
    tools = server.get_json("data/plugin/profile/run_tools", run=traces["profile_steps"])
    assert "trace_viewer@" in tools
    hosts = server.get_json("data/plugin/profile/hosts", run=traces["profile_steps"], tag="trace_viewer@")
    served = server.get_json(
        "data/plugin/profile/data", run=traces["profile_steps"], tag="trace_viewer@", hosts=hosts[0]["hostname"]
    )
    assert _events(served) >= ON_THE_HOST | ON_THE_DEVICE


def test_xprof_itself_finds_the_same_in_the_files(run: Path) -> None:
    (file,) = (run / "logs" / "profile_steps").rglob("*.xplane.pb")
    converted, _ = raw_to_tool_data.xspace_to_tool_data([str(file)], "trace_viewer", {})
    trace = json.loads(converted)
    assert _events(trace) >= ON_THE_HOST | ON_THE_DEVICE
    steps = [event for event in trace["traceEvents"] if event.get("name", "").startswith("train ")]
    assert [event["args"]["step_num"] for event in steps] == ["3", "4"]


def test_a_browser_shows_them(run: Path, server: TensorBoard) -> None:
    program = chromium()
    if program is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    (trace,) = (name for name in server.get_json("data/plugin/profile/runs") if name.startswith("profile_steps"))

    async def look() -> None:
        async with new_page(program) as page:
            await page.open(f"{server.address}/#scalars")
            await page.text_once_it_has("loss", "images_per_second", "host_to_device")
            await page.open(trace_viewer(server, trace))
            # The rows have their names in the page; what is in them is drawn.
            await page.text_once_it_has("Trace Viewer", trace, "parts of the model", "python")

    asyncio.run(look())
