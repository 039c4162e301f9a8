"""The facts of a flag, where it is declared."""

import dataclasses
import math
from functools import partial

import pytest

from shared.checkpoints.policy import checkpoint_record
from shared.compare.comparability import MUST_MATCH
from shared.config import TrainConfig
from shared.config.flags import BELOW_ONE, FROM_ZERO, Facts, Flag, Rule, at_least, at_most, flag, flags_of, within
from shared.config.options import FLAGS, SECRETS

_of_trial = partial(flag, "trial")


@dataclasses.dataclass(frozen=True)
class _Trial:
    bare: bool = _of_trial(False, "Says nothing.")
    token: str | None = _of_trial(None, "Says too much.", secret=True)
    count: int = _of_trial(1, "Says how many.", must_be=[at_least(1), at_most(9)], must_match=["resume"])


def test_what_is_declared_is_found_at_the_flag() -> None:
    flags = flags_of(_Trial)
    assert [flag.group for flag in flags.values()] == ["trial"] * 3
    assert {name: getattr(flags["bare"], name) for name in vars(Facts())} == vars(Facts())
    assert flags["token"].secret
    assert "token" not in repr(_Trial(token="hf_secret"))
    assert [rule.words for rule in flags["count"].must_be] == ["1 or more", "at most 9"]
    assert flags["count"].must_match == ["resume"]


def test_an_unknown_fact_is_an_error_at_once() -> None:
    with pytest.raises(TypeError, match="must_mach"):
        _of_trial(1, "Says how many.", must_mach=["resume"])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (FROM_ZERO, [0, 1e308], [-1, -5e-324, math.inf]),
        (BELOW_ONE, [0, 1 - 2**-53], [-5e-324, 1]),
        (at_least(1), [1, 2**63], [0, -1]),
        (at_most(8), [8, -1], [9]),
        (within(0, 1), [0, 0.5, 1], [-5e-324, 1 + 2**-52]),
    ],
    ids=lambda value: value.words if isinstance(value, Rule) else "",
)
def test_rules(rule: Rule, right: list[float], wrong: list[float]) -> None:
    assert all(map(rule.is_kept_by, right))
    assert not any(map(rule.is_kept_by, [*wrong, math.nan]))


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_facts_fit_their_flag(flag: Flag) -> None:
    defaults = flag.default if flag.is_list and flag.default is not None else (flag.default,)
    assert all(default is None or rule.is_kept_by(default) for rule in flag.must_be for default in defaults)
    assert not flag.must_be or flag.kind in (int, float)
    assert flag.only_with is None or FLAGS[flag.only_with].default is None
    assert not (flag.of_one_start and flag.must_match), "another value at every start cannot be compared"
    assert not (flag.secret and flag.must_match), "what must match is written into checkpoints and messages"


def test_facts_decide_where_their_flags_are_asked_for() -> None:
    config = TrainConfig()
    kept = checkpoint_record(config, {}, 1)["configuration"]
    assert list(kept) == [flag.name for flag in FLAGS.values() if "resume" in flag.must_match]
    assert [flag.name for flag in MUST_MATCH] == [flag.name for flag in FLAGS.values() if "compare" in flag.must_match]
    assert {"hub_token"} == SECRETS
