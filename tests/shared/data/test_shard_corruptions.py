"""The short form of `python3 -m tests.shared.data.shard_corruptions`."""

from pathlib import Path

from tests.shared.data.shard_corruptions import run_cases

SEVERAL_ENDS = {"refused", "as it was", "named"}


def test_of_damaged_shards_and_caches_nothing_is_lost_unsaid(tmp_path: Path) -> None:
    ends = run_cases(tmp_path, range(250))
    for target, counts in ends.items():
        assert counts.total() == 50
        if target == "a cache's captions":
            assert counts.keys() == {"as it was"}, "what is damaged is encoded anew"
        elif target == "a cache's record and index":
            assert counts.keys() <= {"refused", "as it was"}
        else:
            assert counts.keys() >= SEVERAL_ENDS
