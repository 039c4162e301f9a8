"""A backend that paints what it is told, and remembers which pictures it was asked for."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.config import Backend
from shared.evaluate.command import read_command
from shared.evaluate.evaluating import evaluate
from shared.evaluate.preparation import prepare_evaluation
from shared.generate.pictures import Artist
from shared.generate.preparation import Commission

SIDE = 64

Pixels = npt.NDArray[np.uint8]


class Brush:
    """Paints picture `number` by `paint(number)`, two at once, and drops out before a number."""

    def __init__(self, paint: Callable[[int], Pixels], *, until: int | None = None) -> None:
        self._paint, self._until = paint, until
        self.drawn: list[int] = []
        self.prompts: list[str] = []

    def run(self, *words: object, into: Path, backend: Backend = "flax") -> None:
        """The command, its exceptions not yet told in words."""
        given = [*map(str, words)]
        metrics = [] if "--metrics" in given else ["--metrics", "edges"]
        config = read_command([*given, *metrics, "--output_dir", str(into)])
        evaluate(prepare_evaluation(config, backend), self._make_artist)

    def _make_artist(self, commission: Commission) -> Artist:
        return Artist("flax", "1 × brush", self._draw, at_once=2)

    def _draw(self, prompts: list[str], conditions_RHWC: np.ndarray, numbers: list[int]) -> np.ndarray:
        assert len(prompts) == len(conditions_RHWC) == len(numbers)
        if self._until is not None and max(numbers) >= self._until:
            raise KeyboardInterrupt
        self.drawn += numbers
        self.prompts += prompts
        return np.stack([self._paint(number) for number in numbers])


def never(number: int) -> Pixels:
    raise AssertionError(f"picture {number} is there already")


def of_list(pictures: Sequence[Pixels]) -> Callable[[int], Pixels]:
    return lambda number: pictures[number]


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return content


def figures(folder: Path, metric: str = "edges") -> dict[str, float]:
    found = record(folder)["metrics"][metric]["found"]["figures"]
    return {name: figure["value"] for name, figure in found.items()}
