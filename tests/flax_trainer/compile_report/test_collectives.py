"""XLA's notations for the groups of chips that exchange messages."""

import pytest

from flax_trainer.compile_report.collectives import Message, group_of, message_of
from flax_trainer.compile_report.hlo import parse_program


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


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("f32[64] all-reduce(%x), to_apply=%add", Message(256, 2, (0, 1, 2, 3))),
        ("f32[16] reduce-scatter(%x), to_apply=%add", Message(256, 1, (0, 1, 2, 3))),
        ("f32[256] all-gather(%x), dimensions={0}", Message(1024, 1, (0, 1, 2, 3))),
        ("(f32[64], f32[256]) all-gather-start(%x), dimensions={0}", Message(1024, 1, (0, 1, 2, 3))),
        ("f32[64] collective-permute(%x), source_target_pairs={{0,1},{1,0}}", Message(512, 1, (0, 1))),
        ("(f32[64], f32[64]) collective-permute-start(%x), source_target_pairs={{0,1}}", Message(512, 1, (0, 1))),
        ("f32[64] negate(%x)", None),
    ],
)
def test_a_message_is_as_large_as_the_array_that_is_shared(instruction: str, message: Message | None) -> None:
    """Of four chips; the two of a permutation send one another a half each, of an array of twice the size."""
    program = parse_program(
        f"ENTRY %main (x: f32[64]) -> f32[64] {{\n  %x = f32[64] parameter(0)\n  %y = {instruction}\n}}\n"
    )
    assert message_of(program, program.computations["main"]["y"], 4) == message


def test_a_notation_that_is_not_known_is_not_taken_for_all_chips() -> None:
    with pytest.raises(AssertionError, match="replica_groups=new"):
        group_of("%x = f32[8] all-reduce(%y), replica_groups=new(8)", 8)
