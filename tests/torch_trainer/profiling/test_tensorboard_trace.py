"""What TensorBoard's Profile tab will show: xprof's own converter reads the files, and so does JAX."""

import json
from pathlib import Path
from typing import Any

import pytest
from jax.profiler import ProfileData
from xprof.convert import raw_to_tool_data

from shared.profiling.parts import PLANE
from tests.torch_trainer.profiling.cuda_trace import a_step
from torch_trainer.profiling.kineto import read_trace
from torch_trainer.profiling.tensorboard_trace import write_for_tensorboard


@pytest.fixture
def file(tmp_path: Path) -> Path:
    exported = tmp_path / "trace.json"
    exported.write_text(json.dumps(a_step()))
    return write_for_tensorboard(read_trace(exported), tmp_path / "profile_steps")


def test_a_profile_lies_where_tensorboard_looks(file: Path) -> None:
    moment = file.parent
    assert file.name.endswith(".xplane.pb")
    assert moment.parent.parts[-3:] == ("profile_steps", "plugins", "profile")
    assert [path.name for path in moment.iterdir()] == [file.name]


def test_xprof_draws_the_parts_beside_the_streams_and_the_threads(file: Path) -> None:
    converted, _ = raw_to_tool_data.xspace_to_tool_data([str(file)], "trace_viewer", {})
    events = json.loads(converted)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    assert sorted(names.values()) == ["/device:CUSTOM:GPU 0", PLANE, "/host:CPU"]
    rows = {
        (names[event["pid"]], event["args"]["name"]): (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name"
    }
    assert set(rows) == {
        *(("/host:CPU", "thread 4242 (python3)"), ("/host:CPU", "thread 4300 (pt_autograd_0)")),
        *(("/device:CUSTOM:GPU 0", "stream 7"), ("/device:CUSTOM:GPU 0", "stream 20")),
        (PLANE, "GPU 0 stream 7"),
    }
    parts = drawn_in(events, rows[PLANE, "GPU 0 stream 7"])
    assert [(event["name"], event["ts"], event["dur"]) for event in parts] == [
        ("vae", 14, 14),
        ("controlnet", 30, 20),
        ("unet", 50, 40),
        ("unet backward", 110, 80),
        ("controlnet backward", 195, 47),
        ("optimizer", 265, 16),
    ]
    assert len(drawn_in(events, rows["/device:CUSTOM:GPU 0", "stream 7"])) == 16
    assert drawn_in(events, rows["/host:CPU", "thread 4242 (python3)"])[0]["name"] == "train 3"


def drawn_in(events: list[dict[str, Any]], row: tuple[int, int]) -> list[dict[str, Any]]:
    drawn = [event for event in events if event.get("ph") == "X" and (event["pid"], event["tid"]) == row]
    return sorted(drawn, key=lambda event: event["ts"])


def test_jax_reads_the_same(file: Path) -> None:
    plane = ProfileData.from_file(str(file)).find_plane_with_name(PLANE)
    assert plane is not None
    (line,) = plane.lines
    first, *_ = line.events
    assert (first.name, first.start_ns, first.end_ns) == ("vae", 14_000, 28_000)
