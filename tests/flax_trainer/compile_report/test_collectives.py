"""XLA's notations for the groups of chips that exchange messages."""

import pytest

from flax_trainer.compile_report.collectives import group_of


@pytest.mark.parametrize(
    ("notation", "group"),
    [
        ("to_apply=%add", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups={}, to_apply=%add", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", (0, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}", (0, 4)),
    ],
)
def test_the_first_group_of_every_notation(notation: str, group: tuple[int, ...]) -> None:
    assert group_of(f"%x = f32[8] all-reduce(%y), channel_id=1, {notation}", 8) == group


def test_a_notation_that_is_not_known_is_not_taken_for_all_chips() -> None:
    with pytest.raises(AssertionError, match="replica_groups=new"):
        group_of("%x = f32[8] all-reduce(%y), replica_groups=new(8)", 8)
