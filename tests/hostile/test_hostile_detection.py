"""What the fuzzer is there to find, it finds: targets that are bad on purpose, one for every way to be."""

import dataclasses
from pathlib import Path

import pytest

from tests.hostile import report
from tests.hostile.campaign import Campaign, run
from tests.hostile.kinds import KINDS, numbers_of, place_of
from tests.hostile.kinds.proofs import PROOFS
from tests.hostile.outcome import Outcome, Result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Of all targets, in their order."""
    numbers = [-1 - rank for rank in range(len(PROOFS))]
    keep = tmp_path_factory.mktemp("kept")
    found = run(Campaign(seed=0, numbers=numbers, seconds=1, mib=200, keep=keep))
    return found[::-1]


@pytest.mark.parametrize("rank", range(len(PROOFS)), ids=[proof.name for proof in PROOFS])
def test_what_is_bad_is_found(results: list[Result], rank: int) -> None:
    assert results[rank].outcome == PROOFS[rank].expected, results[rank]
    assert results[rank].what == PROOFS[rank].name or results[rank].outcome == Outcome.BROKEN


def test_there_is_a_target_for_every_outcome() -> None:
    assert {proof.expected for proof in PROOFS} == set(Outcome)


def test_failures_are_told_with_how_to_see_them_again(results: list[Result]) -> None:
    text = report.as_text(results)
    assert "traceback proofs --replay 0:-4  (raises) KeyError: 'layers'" in text
    assert "0:-30" not in text, "what was handled is no failure"


def test_one_whose_place_is_known_is_told_with_it(results: list[Result]) -> None:
    (refused,) = (result for result in results if result.what == "refuses")
    assert refused.reason.startswith("error: ")


def test_a_case_is_the_same_whenever_it_is_run() -> None:
    again = run(Campaign(seed=0, numbers=[-4], seconds=1))[0]
    assert (again.outcome, again.what) == (Outcome.TRACEBACK, "raises")


def test_the_files_of_failures_are_kept(tmp_path: Path) -> None:
    run(Campaign(seed=5, numbers=[-4, -31], seconds=1, keep=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["5:-4"]
    assert "KeyError" in (tmp_path / "5:-4" / "output.txt").read_text()


def test_the_number_alone_says_the_kind() -> None:
    places = [place_of(number) for number in range(200)]
    for name in KINDS:
        ranks = [place.rank for place in places if place.kind.name == name]
        assert ranks == list(range(len(ranks)))
    assert [place_of(number).kind.name for number in numbers_of(["card", "data"], 50)].count("data") > 30


def test_the_tables_count_every_case_once(results: list[Result]) -> None:
    counted = [dataclasses.replace(result, kind="data") for result in results]
    table = report.as_markdown(counted)
    header, _, of_data, of_all = (line.strip("| ").split(" | ") for line in table.splitlines()[:4])
    assert set(header[2:]) == set(Outcome)
    assert of_data[1] == of_all[1] == str(len(results))
    assert sum(map(int, of_all[2:])) == len(results)
