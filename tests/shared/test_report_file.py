"""report.json: always JSON, whole or not at all."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.run_folder import write_report


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
