"""Run folders as somebody might make them who wants a comparison to fail, to hang, to leak or to run code.

Each builder changes a finished run (see `run_folders.make_run`), so that a fuzzer can use them too.
"""

import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from tests.shared.compare.run_folders import WEIGHTS, make_run, write_picture

WEIGHT_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHT_FILE}.index.json"

HOSTILE_TEXTS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    '" onload="alert(1)" x="',
    "</style></title></pre></svg><svg onload=alert(1)>",
    "<!-- --><iframe src=javascript:alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac$ $x^$ \\$",
    "]]><![CDATA[ &lt;b&gt; &#x3c;",
    'id="text_1" href="#x" url(#y) #0000a1 font: 10px x',
    "猫 🐈 \u202eevil\u2028line",
    "\x1b[31mred\x1b[0m\x07",
    "line\nbreak\r\ttab",
)
"""Texts for every place where a run says something."""

OTHER_VALUES: tuple[tuple[str, Any], ...] = (
    ("null", None),
    ("true", True),
    ("negative", -1),
    ("zero", 0),
    ("a fraction", 0.5),
    ("a huge whole number", 10**30),
    ("a huge number", 1e308),
    ("a small number", 5e-324),
    ("a text", "3"),
    ("an empty text", ""),
    ("a list", [1]),
    ("an object", {"a": {"b": [None]}}),
)
"""A value of every kind, to stand in another's place."""

NO_JSON = (
    b"",
    b"null",
    b"[]",
    b"3",
    b'"text"',
    b"{",
    b"{}",
    b"\xff\xfe\x00",
    b"\x00" * 64,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"steps": NaN}',
    b'{"steps": 1e999}',
    b'{"steps": 1' + b"0" * 400 + b"}",
    b'{"command": "half \\ud83d"}',
)
"""Content that is not the JSON that is expected."""


def change_report(run: Path, **values: Any) -> None:
    path = run / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_metrics(run: Path, lines: list[bytes]) -> None:
    (run / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def write_safetensors(path: Path, header: object, data: bytes = b"") -> None:
    """A file with any header; a lie in it is not found out here."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def one_tensor(shape: list[int], kind: str = "F32", data: bytes = b"\0" * 4) -> Callable[[Path], None]:
    """A weight file that says to hold one tensor of this shape and kind."""

    def build(run: Path) -> None:
        tensor = {"dtype": kind, "shape": shape, "data_offsets": [0, len(data)]}
        write_safetensors(run / WEIGHT_FILE, {"conv_in.weight": tensor}, data)

    return build


def bomb(path: Path, side: int) -> None:
    """A PNG of one grey with many pixels and few bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), 128).save(path)


def in_its_place(name: str, kind: str) -> Callable[[Path], None]:
    """Something else than a file under a file's name: a `pipe`, a `folder`, a `loop`, a `link out`, …"""

    def build(run: Path) -> None:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            kept = path.read_bytes()
            path.unlink()
        else:
            kept = b"private"
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "loop":
                path.symlink_to(path.name)
            case "link to nowhere":
                path.symlink_to("nowhere")
            case "link out":
                outside = run.parent / f"{run.name} private {path.name}"
                outside.write_bytes(kept)
                path.symlink_to(outside)
            case "device":
                path.symlink_to("/dev/zero")
            case _:
                raise AssertionError(kind)

    return build


KINDS_OF_NO_FILE = ("pipe", "folder", "loop", "link to nowhere", "link out", "device")
FILES = ("report.json", "config.yaml", "metrics.jsonl", WEIGHT_FILE)


@dataclass(frozen=True)
class HostileRun:
    """A change of a finished run, by a name for a report of what it did."""

    name: str
    build: Callable[[Path], None]

    @property
    def is_in_charts(self) -> bool:
        """Whether what is changed is drawn as well as written."""
        return self.name.startswith(("metrics", "everything", "report.json: very", "report.json: a very"))


def hostile_runs() -> list[HostileRun]:
    """One of each kind; all are small, and quick to build."""
    return [*_reports(), *_metrics(), *_configurations(), *_weights(), *_no_files(), *_pictures(), *_texts()]


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    def build(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)

    return build


def _reports() -> list[HostileRun]:
    names = ("backend", "steps", "global_batch_size", "images_seen", "seconds_total", "devices", "versions", "command")
    names += ("peak_host_memory_gib", "peak_device_memory_gib", "convergence_step", "loss", "loss_untrained")
    found = [
        HostileRun(
            f"report.json: {name} is {what}", lambda run, name=name, value=value: change_report(run, **{name: value})
        )
        for name in names
        for what, value in OTHER_VALUES
    ]
    found += [HostileRun(f"report.json is {content[:20]!r}", _file("report.json", content)) for content in NO_JSON]
    many = {f"figure {index}{ending}": 0.1 for index in range(2000) for ending in ("", "_untrained")}
    long = {f"{'x_t1-2' * 500}{ending}": 0.1 for ending in ("", "_untrained")}
    return [
        *found,
        HostileRun("report.json: versions of lists", lambda run: change_report(run, versions={"a": [1]})),
        HostileRun("report.json: another backend", lambda run: change_report(run, backend="mxnet")),
        HostileRun("report.json: very many figures", lambda run: change_report(run, **many)),
        HostileRun("report.json: a very long name", lambda run: change_report(run, **long)),
        HostileRun("report.json: a very long command", lambda run: change_report(run, command="<b>" * 10**6)),
    ]


def _metrics() -> list[HostileRun]:
    end = b'{"step": 3, "loss": 0.1}'
    lines: tuple[bytes, ...] = (
        *NO_JSON,
        b'{"step": null, "loss": 1}',
        b'{"step": "3", "loss": 1}',
        b'{"step": -1, "loss": 1}',
        b'{"step": 1.5, "loss": 1}',
        b'{"step": true, "loss": 1}',
        b'{"step": 1000000000000000, "loss": 1}',
        b'{"step": 1' + b"0" * 400 + b', "loss": 1}',
        b'{"loss": 1}',
        b'{"step": 2, "loss": "1"}',
        b'{"step": 2, "loss": [1]}',
        b'{"step": 2, "loss": 1e308, "grad_norm": -1e308, "images_per_second": 5e-324, "data_wait": 1e308}',
        b'{"step": 2, "loss": 0, "grad_norm": null, "images_per_second": 0, "data_wait": 0}',
        b'{"step": 2, "loss": -1, "images_per_second": -1}',
    )
    return [
        HostileRun("metrics.jsonl: no line", _file("metrics.jsonl", b"")),
        HostileRun("metrics.jsonl: only the last", lambda run: change_metrics(run, [end])),
        HostileRun("metrics.jsonl: backwards", lambda run: change_metrics(run, [end, b'{"step": 1, "loss": 0.5}'])),
        HostileRun("metrics.jsonl: a very long line", _file("metrics.jsonl", b'{"step": 1, "x": ' + b"1" * 10**7)),
        *(
            HostileRun(f"metrics.jsonl has {line[:50]!r}", lambda run, line=line: change_metrics(run, [line, end]))
            for line in lines
        ),
    ]


def _configurations() -> list[HostileRun]:
    contents = (
        b"",
        b"null",
        b"[]",
        b"3",
        b"[" * 10_000,
        b"seed: " + b"[" * 10_000,
        b"a: &a [x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (index, index) for index in range(50)),
        b"seed: {a: {b: c}}",
        b"seed: null",
        b"seed: 1\nseed: 2",
        b"seed: one",
        b"seed: 1" + b"0" * 5000,
        b'seed: "1\\0"',
        b"seed: 1\0",
        b"\xff\xfe\xfa",
        b"mixed_precision: fp8",
        b"mixed_precision: true",
        b"snr_gamma: .nan",
        b"logging_steps: -1",
        b"logging_steps: 0",
        b"gradient_accumulation_steps: 9999999999999999999999",
        b'pretrained_model_name_or_path: "/a\\0b"',
        b"pretrained_model_name_or_path: /" + b"x" * 5000,
        b'validation_prompt: "half an emoji \\ud83d"',
        b"? [a, b]\n: c",
        b"!!python/object/apply:os.system [true]",
        b"unknown_flag: 3",
        b"x" * 10**6,
    )
    return [HostileRun(f"config.yaml is {content[:40]!r}", _file("config.yaml", content)) for content in contents]


def _weights() -> list[HostileRun]:
    def with_index(index: object) -> Callable[[Path], None]:
        return _file(INDEX_FILE, index if isinstance(index, bytes) else json.dumps(index).encode())

    def sparse(run: Path) -> None:
        size = 2**40
        tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
        write_safetensors(run / WEIGHT_FILE, {"conv_in.weight": tensor})
        os.truncate(run / WEIGHT_FILE, (run / WEIGHT_FILE).stat().st_size + size)

    def many(run: Path) -> None:
        save_file({f"block{index}.weight": np.zeros(1, np.float32) for index in range(30_000)}, run / WEIGHT_FILE)

    def truncated(run: Path) -> None:
        os.truncate(run / WEIGHT_FILE, (run / WEIGHT_FILE).stat().st_size - 1)

    whole = io.BytesIO(b"\x80\x04\x95")  # the beginning of a pickle
    return [
        HostileRun("weights: empty", _file(WEIGHT_FILE, b"")),
        HostileRun("weights: a pickle", _file(WEIGHT_FILE, whole.getvalue() * 100)),
        HostileRun("weights: random bytes", _file(WEIGHT_FILE, np.random.default_rng(0).bytes(5000))),
        HostileRun("weights: truncated", truncated),
        HostileRun("weights: a header of 2^63 bytes", _file(WEIGHT_FILE, struct.pack("<Q", 2**63) + b"{}")),
        HostileRun("weights: a header of 64 MiB", _file(WEIGHT_FILE, struct.pack("<Q", 2**26) + b"{}" * 100)),
        HostileRun("weights: a header that is a list", lambda run: write_safetensors(run / WEIGHT_FILE, [])),
        HostileRun("weights: no tensors", lambda run: write_safetensors(run / WEIGHT_FILE, {})),
        HostileRun("weights: half an emoji", lambda run: write_safetensors(run / WEIGHT_FILE, b'{"\\ud83d": 1}')),
        HostileRun("weights: a huge shape", one_tensor([2**40, 2**40])),
        HostileRun("weights: a huge shape of nothing", one_tensor([2**40, 0], data=b"")),
        HostileRun("weights: a shape beyond what is counted in", one_tensor([2**63, 0], data=b"")),
        HostileRun("weights: 70 dimensions", one_tensor([1] * 70)),
        HostileRun("weights: no numbers", one_tensor([0], data=b"")),
        HostileRun("weights: a scalar", one_tensor([])),
        HostileRun("weights: whole numbers", one_tensor([1], "I64", b"\1" * 8)),
        HostileRun("weights: complex numbers", one_tensor([1], "C64", b"\1" * 8)),
        HostileRun("weights: bfloat16", one_tensor([2], "BF16", b"\1" * 4)),
        HostileRun("weights: 8 bits", one_tensor([4], "F8_E4M3", b"\1" * 4)),
        HostileRun("weights: 4 bits", one_tensor([8], "F4", b"\1" * 4)),
        HostileRun("weights: an unknown kind", one_tensor([1], "XYZ")),
        HostileRun("weights: a terabyte of nothing", sparse),
        HostileRun("weights: very many tensors", many),
        *(HostileRun(f"index: {content[:20]!r}", with_index(content)) for content in NO_JSON),
        HostileRun("index: a list", with_index({"weight_map": ["a.safetensors"]})),
        HostileRun("index: numbers", with_index({"weight_map": {"conv_in.weight": 1}})),
        HostileRun("index: empty", with_index({"weight_map": {}})),
        *(
            HostileRun(f"index: a shard called {shard!r}", with_index({"weight_map": {"conv_in.weight": shard}}))
            for shard in (
                *("", ".", "..", "../other/x.safetensors", "/etc/passwd", "a\0b.safetensors", "missing.safetensors"),
                *("report.json", INDEX_FILE, "x" * 300 + ".safetensors", "\x1b[31m.safetensors"),
            )
        ),
    ]


def _no_files() -> list[HostileRun]:
    return [
        HostileRun(f"{name} is a {kind}", in_its_place(name, kind))
        for name in (*FILES, INDEX_FILE, "unet", "checkpoint-1/controlnet/" + WEIGHT_FILE, "checkpoint-1", "validation")
        for kind in KINDS_OF_NO_FILE
    ] + [HostileRun(f"{name} is gone", lambda run, name=name: (run / name).unlink()) for name in FILES]


def _pictures() -> list[HostileRun]:
    names = ("validation/step-3/0.png", "validation/step-1/0.png", "contact_sheet.png")
    png = io.BytesIO()
    Image.new("RGB", (6, 4)).save(png, "PNG")
    contents = (
        *(b"", b"no picture", png.getvalue()[:-20], png.getvalue()[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n{} loop\n"),
        *(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", b"%PDF-1.4", b"\x00\x00\x01\x00" * 10),
        *(b"P6\n1000000 1000000\n255\n", b"P6\n0 0\n255\n", b"P5\n-1 5\n255\n", b"GIF89a\xff\xff\xff\xff\x00\x00\x00"),
    )

    def deep(run: Path) -> None:
        path = write_picture(run / names[0], 3)
        Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(path, "PNG")

    def many_steps(run: Path) -> None:
        for name in ("step-007", "step-٣", "step-" + "9" * 200, "step--1", "step-1e3", "step-2\n"):
            write_picture(run / "validation" / name / "0.png", 3)
        for step in ("checkpoint-" + "9" * 200, "checkpoint-007", "checkpoint-٣"):
            (run / step / "controlnet").mkdir(parents=True)

    def folder_out(run: Path) -> None:
        outside = run.parent / f"{run.name} private pictures"
        write_picture(outside / "secret name.png", 77)
        (run / "validation").mkdir(exist_ok=True)
        (run / "validation" / "step-3").symlink_to(outside)

    return [
        *(HostileRun(f"{name} is {content[:20]!r}", _file(name, content)) for name in names for content in contents),
        *(HostileRun(f"{name} is a {kind}", in_its_place(name, kind)) for name in names for kind in KINDS_OF_NO_FILE),
        HostileRun("a picture of 16 bits", deep),
        HostileRun("steps in strange digits", many_steps),
        HostileRun("a step's folder leads out", folder_out),
        HostileRun("a picture of 170 million pixels", lambda run: bomb(run / names[0], 13_000)),
    ]


def _texts() -> list[HostileRun]:
    return [
        HostileRun(f"everything is called {text!r}", lambda run, text=text: call_everything(run, text))
        for text in HOSTILE_TEXTS
    ]


def as_a_flag(text: str) -> str:
    """Without control characters, with which no run begins."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def call_everything(run: Path, text: str) -> None:
    """The text wherever a run has one: values, names of figures, tensors, pictures, flags."""
    from shared.config import TrainConfig, to_yaml

    figures = {text: 0.3, f"{text}_untrained": 0.1, f"{text}_t000-249": 0.2, f"{text}_t000-249_untrained": 0.2}
    report = {"devices": text, "versions": {text: text}, "command": text, **figures}
    file_name = text.replace("/", "∕").replace("\0", "")
    make_run(
        run,
        report=report,
        evaluations=[{"step": 1, text: 0.2}, {"step": 2, text: 0.3}],
        weights=WEIGHTS
        | {f"{text}.weight": np.full(3, float(len(run.name)), np.float32), text: np.ones(2, np.float32)},
    )
    settings = {
        "generated_circles": 8,
        "train_batch_size": 2,
        "validation_prompt": (as_a_flag(text), as_a_flag(run.name)),
        "tracker_project_name": as_a_flag(f"{text} {run.name}"),
    }
    (run / "config.yaml").write_text(to_yaml(TrainConfig(**settings)), encoding="utf-8")
    for step in (1, 3):
        write_picture(run / "validation" / f"step-{step}" / f"{file_name}.png", len(run.name))
        (run / "validation" / f"step-{step}" / f"broken {file_name}.png").write_bytes(b"no picture")
