"""The TPU slices that can be rented, and what their chips can do."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from shared.outgoing.redaction import described
from shared.profiling.device_peaks import peak_tflops
from shared.user_errors import UserError

# What the TPU compiler must be told where there is no TPU: not to look for one, and that it may be loaded twice. It
# warns unless it is given a type, which has no effect on the topologies it is asked for.
_WITHOUT_TPU = {
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CHIPS_PER_HOST = 4


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs.

    Memory and its bandwidth are those of Google's documentation ("TPU v4" to "TPU v6e"), per chip. The clock follows
    from the peak FLOPs and the number of multipliers. A link between chips carries `link_gb_per_s` in each direction
    (Austin et al. 2025, "How to Scale Your Model", chapter 2).
    """

    name: str
    device_kind: str  # as JAX calls it
    hbm_gib: float
    hbm_gb_per_s: float
    clock_ghz: float
    link_gb_per_s: float
    dimensions: int  # of the grid that the chips form
    closing_side: int  # sides of a multiple of so many chips are closed to rings; in three dimensions, all or none
    multiplier: int  # sides of the matrices that are multiplied at a time
    named_by_cores: bool  # v4-8 has 8 cores in 4 chips

    @property
    def peak_tflops(self) -> float:
        """bfloat16 products, summed in float32."""
        peak = peak_tflops(self.device_kind, "bfloat16")
        assert peak is not None, self.device_kind
        return peak


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 32, 1228, 1.05, 45, 3, 4, 128, True),
        Chip("v5e", "TPU v5 lite", 16, 819, 1.5, 45, 2, 16, 128, False),
        Chip("v5p", "TPU v5", 95, 2765, 1.75, 90, 3, 4, 128, True),
        Chip("v6e", "TPU v6 lite", 32, 1640, 1.75, 90, 2, 16, 256, False),
    )
}
_SPELLINGS = {"v5litepod": "v5e"}
# Slices that Cloud TPU offers, by the number of chips; larger ones double the smallest side.
_SHAPES_3D = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}
_SHAPES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}


@dataclass(frozen=True)
class Target:
    """A slice of chips, which are JAX's devices."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        return max(1, self.chips // _CHIPS_PER_HOST)

    def links(self, group: Sequence[int]) -> float:
        """Links over which a chip of a group sends at the same time, when all such groups of the slice do.

        Along each side of the slice that the group spans, a ring has both directions of its links for two halves of a
        message; a line, there and back, makes one ring of both. Groups that take turns along a side share its links.

        Args:
            group: the chips' places in `devices()`.
        """
        devices = self.devices()
        return sum(
            self._links_along(axis, sorted({devices[chip].coords[axis] for chip in group}))
            for axis in range(len(self.shape))
        )

    def _links_along(self, axis: int, places: list[int]) -> float:
        if len(places) == 1:
            return 0
        spacing = places[1] - places[0]
        is_whole = len(places) * spacing == self.shape[axis]
        return (2 if is_whole and self._closes(axis) else 1) / spacing

    def _closes(self, axis: int) -> bool:
        """Whether the ends of a side are linked: v4 and v5p come in cubes, of which none or all sides are."""
        sides = self.shape if self.chip.dimensions == 3 else (self.shape[axis],)
        return all(side % self.chip.closing_side == 0 for side in sides)

    def devices(self) -> list[jax.Device]:
        """Devices that can be compiled for and are not there.

        Raises:
            UserError: the TPU compiler is not installed.
        """
        os.environ.update(_WITHOUT_TPU)
        shape = "x".join(map(str, self.shape))
        try:
            return topologies.get_topology_desc(f"{self.chip.name}:{shape}", platform="tpu", **self._options()).devices
        except RuntimeError as error:
            raise UserError(
                f"The TPU compiler cannot be loaded ({str(error).splitlines()[0]}). "
                "Install it with: pip install 'jax[tpu]'"
            ) from error

    def _options(self) -> dict[str, Any]:
        on_host = {"chips_per_host_bounds": (1, 1, 1) if self.chips == 1 else (2, 2, 1)}
        if self.chip.name == "v4":
            return on_host | {"chip_config_name": "megacore", "num_slices": 1}
        return on_host if self.chips == 1 else {}


def parse_target(name: str) -> Target:
    """A slice by the name that Cloud TPU gives its type: v4-8, v5litepod-16 (or v5e-16), v5p-8, v6e-4.

    Raises:
        UserError: there is no such type.
    """
    match = re.fullmatch(r"(v[a-z0-9]+)-([0-9]{1,6})", name)
    generation = match and _SPELLINGS.get(match[1], match[1])
    chip = CHIPS.get(generation or "")
    if match is None or chip is None:
        raise UserError(f"--target is {described(name)}; expected {', '.join(CHIPS)} and a size, as v4-8 or v5e-4.")
    shapes: dict[int, tuple[int, ...]] = dict(_SHAPES_3D if chip.dimensions == 3 else _SHAPES_2D)
    per_chip = 2 if chip.named_by_cores else 1
    sizes = {chips * per_chip: shape for chips, shape in shapes.items()}
    if int(match[2]) not in sizes:
        raise UserError(
            f"--target is {name!r}; the sizes of {chip.name} here are {', '.join(f'{chip.name}-{n}' for n in sizes)}."
        )
    return Target(name, chip, sizes[int(match[2])])
