"""Two runs to compare, of which somebody else made one, and the page about them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import shared.compare.__main__ as command
import shared.compare.comparison
import shared.compare.page  # noqa: F401 (in the warm process, for its children)
from tests.hostile.case import Case
from tests.hostile.kinds import place_of
from tests.hostile.mutations.binary import mutated_safetensors
from tests.hostile.mutations.pictures import honest_picture, hostile_picture
from tests.hostile.mutations.places import displace, files_in, mutate_file, plant
from tests.hostile.mutations.values import (
    hostile_text,
    mutated_json,
    mutated_json_lines,
    mutated_yaml,
    pick,
    snippet,
    some,
)
from tests.hostile.outcome import Sign
from tests.hostile.signs import signs_in_files, signs_in_page
from tests.hostile.watched import Attempt
from tests.shared.compare.run_folders import make_run, write_picture

_WORKED = frozenset({0, 1})  # they agree, or not
_PAGE = "comparison.html"

Recipe = Callable[[Case, Path, Path], str]
"""Changes two honest runs; what is hostile about them, in words."""


def build(case: Case) -> Attempt:
    """A case of its recipe, whose number says which."""
    recipe = _RECIPES[place_of(case.number).rank % len(_RECIPES)]
    a, b = _honest_run(case.inputs / "a"), _honest_run(case.inputs / "b", backend="torch")
    what = recipe(case, a, b)
    if case.chance(0.5):
        a, b = b, a
    words = [str(a), str(b), "--output_dir", str(case.out)]
    return Attempt(
        what,
        lambda: command.main(words),
        lambda: _signs(case),
        _WORKED,
        is_honest=recipe is _nothing,
        private=(case.outside,),
    )


def _honest_run(folder: Path, backend: str = "flax") -> Path:
    make_run(
        folder,
        report={"backend": backend, "validation_loss": 0.2, "validation_loss_untrained": 0.4},
        evaluations=[{"step": 0, "validation_loss": 0.4}],
        validation_prompt=("a red circle",),
        validation_image=("c.png",),
        num_evaluation_samples=2,
    )
    for path in ("validation/step-2/0.png", "validation/step-3/0.png", "contact_sheet.png"):
        write_picture(folder / path, 100)
    checkpoint = folder / "checkpoint-2" / "controlnet"
    checkpoint.mkdir(parents=True)
    weights = folder / "diffusion_pytorch_model.safetensors"
    (checkpoint / weights.name).write_bytes(weights.read_bytes())
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    (checkpoint / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    return folder


def _signs(case: Case) -> Iterator[Sign]:
    page = case.out / _PAGE
    if page.is_file():
        yield from signs_in_page(case, page.read_text(encoding="utf-8"))
    yield from signs_in_files(case, case.out)


# --- recipes ---------------------------------------------------------------------------------------------------------


def _mutated(name: str, mutate: Callable[[Case, bytes], bytes]) -> Recipe:
    def change(case: Case, a: Path, b: Path) -> str:
        for run in (b,) if case.chance(0.7) else (a, b):
            (run / name).write_bytes(mutate(case, (run / name).read_bytes()))
        return f"{name} mutated"

    return change


def _values_of_the_report(case: Case, a: Path, b: Path) -> str:
    """Texts where the page shows some: in values, in names of figures, and in names of figures that both have."""
    text = hostile_text(case)
    report = json.loads((b / "report.json").read_text())
    key = pick(case, ("devices", "backend", "command", "versions", "weights", "name", "package"))
    changes: dict[str, dict[str, object]] = {
        "versions": {"versions": {"python": text, text: "1"}},
        "name": {text: 0.5, f"{text}_untrained": 0.25},
        "package": {"versions": {"python": "3.11", f"{text[:200]}": text[:200]}},
    }
    report |= changes.get(key, {key: text})
    (b / "report.json").write_text(json.dumps(report))
    if key == "name" and case.chance(0.8):
        _append_metrics(b, {"step": 1, text: 0.5}, {"step": 3, text: 0.25})
        other = json.loads((a / "report.json").read_text())
        (a / "report.json").write_text(json.dumps(other | changes["name"]))
        _append_metrics(a, {"step": 1, text: 0.5}, {"step": 3, text: 0.25})
    return f"report.json: {key} is {ascii(text)[:60]}"


def _append_metrics(run: Path, *entries: dict[str, object]) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + "".join(json.dumps(entry) + "\n" for entry in entries))


def _numbers_of_the_metrics(case: Case, a: Path, b: Path) -> str:
    entries = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    key = pick(
        case, ("step", "loss", "grad_norm", "learning_rate", "images_per_second", "data_wait", "validation_loss")
    )
    value = snippet(case).replace("\n", " ")
    chosen = pick(case, entries)
    chosen[key] = "@@"
    text = "".join(json.dumps(entry) + "\n" for entry in entries).replace('"@@"', value)
    for run in (b,) if case.chance(0.5) else (a, b):
        (run / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"metrics.jsonl: {key} is {value[:60]!a}"


def _settings(case: Case, a: Path, b: Path) -> str:
    """Texts among the settings that the page shows where they differ."""
    text = hostile_text(case)
    key = pick(
        case,
        (
            "validation_prompt",
            "tracker_project_name",
            "hub_model_id",
            "output_dir",
            "cache_dir",
            "logging_dir",
            "train_data_dir",
        ),
    )
    config = (b / "config.yaml").read_text()
    value = json.dumps(text)
    lines = [line for line in config.splitlines() if not line.startswith((f"{key}:", "- a red circle"))]
    lines.append(f"{key}: [{value}]" if key == "validation_prompt" else f"{key}: {value}")
    (b / "config.yaml").write_text("\n".join(lines) + "\n")
    return f"config.yaml: {key} is {ascii(text)[:60]}"


def _displaced(case: Case, a: Path, b: Path) -> str:
    path = pick(case, [path for path in files_in(b) if path.parent == b or case.chance(0.5)])
    return displace(case, path.parent if path.parent != b and case.chance(0.3) else path)


def _picture(case: Case, a: Path, b: Path) -> str:
    name, content = hostile_picture(case)
    for run in (a, b) if case.chance(0.4) else (b,):
        (run / pick(case, ("validation/step-3/0.png", "contact_sheet.png", "validation/step-2/0.png"))).write_bytes(
            content
        )
    return name


def _large_pictures(case: Case, a: Path, b: Path) -> str:
    side = pick(case, (4000, 9000, 9459, 13_000))
    picture = Image.fromarray(np.zeros((side, side), np.uint8))
    picture.save(a / "contact_sheet.png", compress_level=1)
    (b / "contact_sheet.png").write_bytes((a / "contact_sheet.png").read_bytes())
    return f"pictures of {side} px a side"


def _names_of_pictures(case: Case, a: Path, b: Path) -> str:
    for _ in range(1 + case.below(3)):
        text = hostile_text(case).replace("/", "∕").replace("\x00", "")
        name = os.fsdecode(text.encode("utf-8", "surrogatepass")[:200] + b".png")
        step = pick(case, ("step-3", "step-٣", "step-" + "9" * 30, "step-0003", "step--1", "step-1e3"))
        folder = pick(case, (a, b)) / "validation" / step
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(honest_picture(case))
    return "names of pictures that forge"


def _weights(case: Case, a: Path, b: Path) -> str:
    path = pick(case, (b, b / "checkpoint-2" / "controlnet")) / "diffusion_pytorch_model.safetensors"
    path.write_bytes(mutated_safetensors(case, path.read_bytes()))
    return "weights mutated"


def _index_of_weights(case: Case, a: Path, b: Path) -> str:
    honest = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model.safetensors"}}
    index = json.dumps(honest).encode()
    if case.chance(0.4):
        index = json.dumps(
            {
                "weight_map": {
                    "x": pick(
                        case,
                        ("../../outside/secret.txt", "/dev/zero", str(case.outside / "secret.txt"), "", ".", "pipe"),
                    )
                }
            }
        ).encode()
    (b / "diffusion_pytorch_model.safetensors.index.json").write_bytes(
        index if case.chance(0.4) else mutated_json(case, index)
    )
    return "an index of weights"


def _checkpoints_of_chance(case: Case, a: Path, b: Path) -> str:
    name = pick(
        case,
        (
            "checkpoint-2",
            "checkpoint-٣",
            "checkpoint-0002",
            "checkpoint-" + "9" * 40,
            "checkpoint-",
            "checkpoint--1",
            "checkpoint-2 ",
        ),
    )
    for run in (a, b):
        target = run / name
        if not target.exists():
            (run / "checkpoint-2").rename(target)
    return f"{name!a}; {plant(case, b / name)}"


def _many_entries(case: Case, a: Path, b: Path) -> str:
    lines = "".join(f'{{"step": {step}, "loss": 0.5, "grad_norm": 1}}\n' for step in range(1, 100_001))
    for run in (a, b):
        (run / "metrics.jsonl").write_text(lines)
        report = json.loads((run / "report.json").read_text())
        (run / "report.json").write_text(json.dumps(report | {"steps": 100_000}))
    return "100,000 logged steps"


def _any_file(case: Case, a: Path, b: Path) -> str:
    return ", ".join(mutate_file(case, path) for path in some(case, files_in(b), most=4))


def _nothing(case: Case, a: Path, b: Path) -> str:
    return "nothing"


_REPORT = _mutated("report.json", mutated_json)
_METRICS = _mutated("metrics.jsonl", mutated_json_lines)
_CONFIG = _mutated("config.yaml", mutated_yaml)
_RECIPES: Sequence[Recipe] = (
    _REPORT,
    _values_of_the_report,
    _METRICS,
    _displaced,
    _picture,
    _weights,
    _CONFIG,
    _REPORT,
    _numbers_of_the_metrics,
    _settings,
    _any_file,
    _values_of_the_report,
    _names_of_pictures,
    _displaced,
    _checkpoints_of_chance,
    _METRICS,
    _picture,
    _index_of_weights,
    _REPORT,
    _numbers_of_the_metrics,
    _CONFIG,
    _weights,
    _displaced,
    _large_pictures,
    _values_of_the_report,
    _any_file,
    _many_entries,
    _nothing,
)
