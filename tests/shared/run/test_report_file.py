"""report.json: always JSON, whole or not at all."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.run.folder import is_finished, write_report


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.floats(), max_size=5))
def test_the_report_is_json_whatever_was_measured(
    tmp_path_factory: pytest.TempPathFactory, report: dict[str, int | str | float]
) -> None:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, report)

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=no_constants)
    finite_values = {k: v for k, v in report.items() if not (isinstance(v, float) and not math.isfinite(v))}
    assert {name: read[name] for name in finite_values} == finite_values
    assert all(read[name] is None for name in report.keys() - finite_values.keys())
    assert [path.name for path in folder.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    write_report(tmp_path, {"loss": 1.0})
    with pytest.raises(TypeError):
        write_report(tmp_path, {"loss": object()})
    assert json.loads((tmp_path / "report.json").read_text()) == {"loss": 1.0}


@pytest.mark.parametrize(
    ("reported", "last_step", "resumed_at", "finished"),
    [
        (10, 10, 10, True),
        (10, 10, 8, False),  # an earlier checkpoint was asked for
        (10, 20, 10, False),  # the run was prolonged
        (10, 20, 20, False),  # and stopped after its last step, before its report
        (20, 10, 20, False),  # it is of another length
        (None, 10, 10, False),
        (None, 10, 0, False),
    ],
)
def test_a_run_is_finished_where_its_report_says_so(
    tmp_path: Path, reported: int | None, last_step: int, resumed_at: int, finished: bool
) -> None:
    if reported is not None:
        write_report(tmp_path, {"steps": reported, "loss": 0.5})
    assert is_finished(tmp_path, last_step, resumed_at) is finished


def test_a_report_that_is_not_whole_finishes_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.json.tmp").write_text('{"steps": 10}')
    assert not is_finished(tmp_path, 10, 10)
    write_report(tmp_path, {"loss": 0.5})
    assert not is_finished(tmp_path, 10, 10)
