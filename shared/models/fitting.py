"""The weights of a folder held against the model that its configuration describes, for both backends."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.models.weight_files import WeightNames, stored_tensors
from shared.untrusted import shown
from shared.user_errors import UserError

Shape = tuple[int, ...]


@dataclass
class _Differences:
    missing: set[str]
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    no_floats: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        groups = {
            "missing": sorted(self.missing),
            "unexpected": self.unexpected,
            "of another shape": self.misshapen,
            "of another dtype": self.no_floats,
        }
        return "; ".join(
            f"{len(names)} {what}: {', '.join(map(shown, names[:5]))}{', …' if len(names) > 5 else ''}"
            for what, names in groups.items()
            if names
        )


def fitting_weights(
    folder: Path,
    names: WeightNames,
    variant: str | None,
    expected: Mapping[str, Shape],
    model: str,
    published_name: Callable[[str], str | None],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) for every expected parameter, one at a time, in PyTorch's layout and the file's dtype.

    What does not fit is not read, so a file cannot fill more memory than the model that is expected.

    Args:
        expected: the shape of every parameter in PyTorch.
        model: what to call the kind of model.
        published_name: the name in `expected` for one in a file; None for a tensor to be ignored.

    Raises:
        UserError: as `stored_tensors`; or, at the end, parameters are missing, unexpected, of another shape, or no
            floating-point numbers, all of which the message names.
    """
    found = _Differences(missing=set(expected))
    for published, tensor in stored_tensors(folder, names, variant):
        name = published_name(published)
        if name is None:
            continue
        if name not in expected:
            found.unexpected.append(published)
            continue
        found.missing.discard(name)
        wanted = expected[name]
        # Older files store linears as 1x1 convolutions.
        if tensor.shape != wanted and not (len(wanted) == 2 and tensor.shape == (*wanted, 1, 1)):
            shape, described = list(tensor.shape), list(wanted)
            found.misshapen.append(f"{published} is {shape}, the configuration makes it {described}")
        elif not tensor.is_float:
            found.no_floats.append(f"{published} is {tensor.dtype}, expected numbers of 16, 32 or 64 bits with a point")
        else:
            yield name, tensor.read().reshape(wanted)
    if differences := str(found):
        raise UserError(
            f"The weights in {shown(folder)} are not those of the {model} that their config.json describes: "
            f"{differences}. Check that the folder holds this kind of model and that its config.json and its "
            "weights belong together."
        )
