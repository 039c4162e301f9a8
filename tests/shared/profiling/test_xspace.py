"""What is written is what JAX's reader of the same format finds."""

from hypothesis import given
from hypothesis import strategies as st
from jax.profiler import ProfileData

from shared.profiling.xspace import Line, Plane, Slice, encode

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SLICES = st.builds(Slice, NAMES, st.integers(0, 10**12), st.integers(0, 10**12))
LINES = st.lists(st.builds(Line, st.integers(1, 2**31), NAMES, st.lists(SLICES, max_size=5)), max_size=3)
PLANES = st.lists(st.builds(Plane, NAMES, LINES), max_size=3)


@given(PLANES)
def test_planes_lines_and_slices_are_found_again(planes: list[Plane]) -> None:
    read = ProfileData.from_serialized_xspace(encode(planes))
    found = [
        Plane(
            plane.name,
            [
                Line(0, line.name, [Slice(event.name, *nanoseconds(event)) for event in line.events])
                for line in plane.lines
            ],
        )
        for plane in read.planes
    ]
    assert found == [
        Plane(plane.name, [Line(0, line.name, list(line.slices)) for line in plane.lines]) for plane in planes
    ]


def nanoseconds(event: object) -> tuple[int, int]:
    return round(event.start_ns), round(event.duration_ns)  # type: ignore[attr-defined]
