"""Nothing but the steps and validations that are asked for is in a trace."""

import logging
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from flax_trainer.profiling.profiler import Profiler
from shared.config import TrainConfig
from shared.profiling.profiled_steps import profiled_steps

CONFIG = TrainConfig()


def test_no_flag_no_profile(tmp_path: Path) -> None:
    profiler = Profiler(replace(CONFIG, output_dir=str(tmp_path)), range(0), 5, lambda: "")
    for step in range(1, 6):
        profiler.before_step(step, None)
        profiler.after_step(step, None)
    profiler.before_validation(5)
    profiler.after_validation(5)
    profiler.profile_memory("initial")
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def _annotations(trace: Path) -> list[str]:
    return [
        event.name
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("work of step")
    ]


def test_a_trace_of_several_programs_is_written_without_a_word_of_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path), profile_steps=1)
    profiler = Profiler(config, range(1, 2), 1, lambda: "")
    profiler.before_step(1, None)
    profiler.after_step(1, None)
    assert len(list((tmp_path / "logs" / "profile_steps").rglob("*.xplane.pb"))) == 1
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == []


def test_a_trace_holds_its_steps_and_no_others(tmp_path: Path) -> None:
    step_of = jax.jit(lambda x: jnp.sin(x @ x)).lower(jnp.ones((300, 300))).compile()
    config = replace(CONFIG, output_dir=str(tmp_path), profile_steps=2)
    profiler = Profiler(config, profiled_steps(config, 0, 6), 6, step_of.as_text)
    state = jnp.ones((300, 300))
    for step in range(1, 7):
        profiler.before_step(step, state)
        with jax.profiler.TraceAnnotation(f"work of step {step}"):
            state = step_of(state)
        profiler.after_step(step, state)
    profiler.close()
    (trace,) = (tmp_path / "logs" / "profile_steps" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert sorted(_annotations(trace)) == ["work of step 3", "work of step 4"]
    # The devices are behind the host: what ran, ran to its end, and as often as there are steps.
    events = [
        (event.name, dict(event.stats).get("run_id"))
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if "hlo_op" in dict(event.stats)
    ]
    assert len({execution for _, execution in events}) == 2


def test_the_last_validation_has_a_trace_of_its_own(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path), profile_validation=True)
    profiler = Profiler(config, range(0), 4, lambda: "")
    for step in (2, 4):
        profiler.before_validation(step)
        with jax.profiler.TraceAnnotation(f"work of step {step}"):
            jnp.ones(3).block_until_ready()
        profiler.after_validation(step)
    (trace,) = (tmp_path / "logs" / "profile_validation" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert _annotations(trace) == ["work of step 4"]


def test_an_interrupted_trace_is_ended(tmp_path: Path) -> None:
    config = replace(CONFIG, output_dir=str(tmp_path), profile_steps=3)
    profiler = Profiler(config, range(1, 4), 6, lambda: "")
    profiler.before_step(1, None)
    profiler.close()
    assert list(tmp_path.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(tmp_path / "next")):  # would fail if one were still going on
        pass


def test_memory_profiles_are_pprof_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    profiler = Profiler(replace(CONFIG, output_dir=str(tmp_path), profile_memory=True), range(0), 1, lambda: "")
    with caplog.at_level(logging.INFO):
        for moment in ("initial", "final"):
            profiler.profile_memory(moment)
            assert (tmp_path / f"memory_{moment}.prof").read_bytes()[:2] == b"\x1f\x8b"  # pprof's are gzipped
    assert "pprof" in caplog.text
