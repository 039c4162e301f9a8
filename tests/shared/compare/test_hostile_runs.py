"""Run folders that others wrote are data: whatever is in them, a page of text or one sentence comes out, soon."""

import os
import time
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shared.compare.__main__ import main
from shared.compare.comparison import compare
from shared.compare.page import render
from shared.compare.page.charts import _means
from shared.compare.page.pictures import Allowance
from shared.compare.page.tables import readable
from shared.untrusted import shown
from shared.untrusted.text import harmless
from tests.shared.compare.hostile_runs import (
    HOSTILE_TEXTS,
    HostileRun,
    as_a_flag,
    bomb,
    call_everything,
    hostile_runs,
    in_its_place,
)
from tests.shared.compare.run_folders import make_run, write_picture

VOID = {"meta", "img", "br"}
_TAGS = """html head title style body main section div h1 h2 h3 p a span i b strong table thead tbody tr th td details
    summary pre figure figcaption code svg g path defs clippath rect use text"""
_ATTRIBUTES = """lang charset name content http-equiv class style id href src alt loading viewbox role aria-label d
    clip-path x y width height transform type"""
TAGS, ATTRIBUTES = VOID | set(_TAGS.split()), set(_ATTRIBUTES.split())
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Structure(HTMLParser):
    """Fails on whatever the page has no use for."""

    def __init__(self, html: str):
        super().__init__()
        self.words: list[str] = []
        self.labels: list[str] = []
        self.policy = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        values = {name: value or "" for name, value in attrs}
        assert values.keys() <= ATTRIBUTES, (tag, values)
        assert len(values) == len(attrs)
        address = values.get("href", "") + values.get("src", "")
        assert address.startswith(("#", "data:image/png;base64,", "data:image/webp;base64,")) or not address
        self.labels += [values[name] for name in ("aria-label", "alt") if name in values]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(data)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


def is_harmless_on_a_terminal(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


def ends_well(run: Path, other: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Whether a comparison ends with a clean page, or with one sentence; returns the exit code."""
    code = main([str(run), str(other), "--output_dir", str(out)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert is_harmless_on_a_terminal(said.out + said.err)
    assert len(said.out + said.err) < 5000
    if code == 2:
        assert said.out == ""
        assert said.err.startswith("error: ")
        return code
    assert code in (0, 1)
    assert said.err == ""
    assert Structure((out / "comparison.html").read_text(encoding="utf-8")).policy.startswith(POLICY)
    return code


@pytest.mark.parametrize("hostile", hostile_runs(), ids=lambda hostile: hostile.name.encode("ascii", "replace"))
def test_a_page_or_one_sentence(
    hostile: HostileRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    hostile.build(run)
    if not hostile.is_in_charts:  # they take most of the time
        for name in ("curves_chart", "difference_chart"):
            monkeypatch.setattr(f"shared.compare.page.html.{name}", lambda *_, **__: "<svg></svg>")
    start = time.monotonic()
    ends_well(run, other, tmp_path / "out", capsys)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_whatever_a_run_says_is_text(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = text.replace("/", "∕")
    runs = [tmp_path / f"{letter} {name}" for letter in ("a", "bb")]
    for run in runs:
        call_everything(run, text)
    assert ends_well(*runs, tmp_path / "out", capsys) == 1
    page = Structure((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    shown_text = " ".join(harmless(text).split())
    for expected in (
        f"a {harmless(name)} and bb {harmless(name)} do not agree",  # the names of the folders
        f"Devices {shown_text} {shown_text}",
        f"Versions {shown_text} {shown_text} {shown_text} {shown_text}",
        f"--validation_prompt {as_a_flag(text)} a",
        f"--tracker_project_name {as_a_flag(text)} a",
        f"Step 3, {harmless(name)}.png",
        f"broken {harmless(name)}.png",
    ):
        assert " ".join(expected.split()) in page.text, expected
    assert shown(readable(text), 100) in page.labels, "of a chart"
    assert shown(readable(text), 100) in page.words, "in a chart"


@pytest.mark.parametrize("name", ["validation/step-3/0.png", "validation/step-1/0.png", "contact_sheet.png"])
@pytest.mark.parametrize("target", ["file", "folder"])
def test_pictures_outside_of_a_runs_folder_are_not_on_the_page(tmp_path: Path, name: str, target: str) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for run in (a, b):
        write_picture(run / "validation" / "step-3" / "1.png", 5)
    private = write_picture(tmp_path / "private" / Path(name).name, 77)
    link = a / name if target == "file" or name == "contact_sheet.png" else (a / name).parent
    if link.is_dir():
        link = link.parent
        (a / "validation").rename(tmp_path / "moved")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(private if target == "file" or name == "contact_sheet.png" else private.parent)
    html = render(compare(a, b))
    assert b64encode(private.read_bytes()).decode() not in html
    assert "a link that leads out of the run&#39;s folder" in html
    link.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    write_picture(a / name, 77)
    assert "leads out" not in render(compare(a, b)), "it would have been there"


def test_what_cannot_be_shown_is_said_in_its_place(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    pictures = [(a if index % 2 else b) / "validation" / "step-3" / f"{index}.png" for index in range(4)]
    for path in pictures:
        write_picture(path, 3)
    pictures[0].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n{} loop\n")
    bomb(pictures[1], 13_000)
    pictures[2].write_bytes(pictures[2].read_bytes()[:40])
    in_its_place("validation/step-3/3.png", "pipe")(a)
    text = Structure(render(compare(a, b))).text
    for expected in ("it is EPS, which is not opened", "it has 13000x13000 pixels", "3.png is a named pipe"):
        assert f"not shown: {expected}" in text or expected in text
    assert text.count("not shown: ") == 4


def test_only_so_many_pictures_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for index in range(120):
        write_picture(a / "validation" / "step-3" / f"{index:03}.png", index)
    text = Structure(render(compare(a, b))).text
    assert "100 of the 120 pictures of step 3 are shown." in text
    assert "099.png" in text
    assert "100.png" not in text
    monkeypatch.setattr(
        "shared.compare.page.page_pictures.Allowance", lambda: Allowance(pixels=24 * 30, characters=10**6)
    )
    assert Structure(render(compare(a, b))).text.count("too many and too large pictures to look at") == 70
    monkeypatch.setattr("shared.compare.page.page_pictures.Allowance", lambda: Allowance(pixels=10**6, characters=500))
    assert "the page has too many and too large pictures already" in Structure(render(compare(a, b))).text


def test_more_figures_than_memory_should_hold_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.compare.run._MOST_FIGURES", 17)
    a = make_run(tmp_path / "a")  # three lines of six figures
    assert main([str(a), str(a)]) == 2
    assert "has more than 17 figures" in capsys.readouterr().err
    monkeypatch.setattr("shared.compare.run._MOST_FIGURES", 18)
    assert main([str(a), str(a)]) == 0


def test_metrics_of_64_gib_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a")
    os.truncate(a / "metrics.jsonl", 64 * 2**30)
    assert main([str(a), str(a)]) == 2
    assert "metrics.jsonl has more than 512 MiB" in capsys.readouterr().err


def test_a_link_in_the_pages_place_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    private = tmp_path / "private.txt"
    private.write_text("mine")
    (tmp_path / "comparison_a_b.html").symlink_to(private)
    assert main([str(a), str(b)]) == 0
    assert private.read_text() == "mine"
    assert not (tmp_path / "comparison_a_b.html").is_symlink()


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a")
    (tmp_path / "out" / "comparison.html").mkdir(parents=True)
    assert main([str(a), str(a), "--output_dir", str(tmp_path / "out")]) == 2
    assert "cannot be written: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("a\0b", "a"),
        ("loop", "a"),
        ("a", "/dev/null"),
        ("a", "x" * 5000),
        ("a", "\x1b[2J"),
        ("a", "half \udcff"),
        ("a", "b", "--hub_token:hf_SECRET"),
        ("a", "b", "--hub_token", "hf_SECRET"),
    ],
)
def test_words_that_are_no_folders(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    (tmp_path / "loop").symlink_to("loop")
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert is_harmless_on_a_terminal(said)
    assert len(said) < 1000
    assert "SECRET" not in said


def test_a_million_steps_are_drawn_soon() -> None:
    generator = np.random.default_rng(0)
    values_N = generator.normal(size=150_000)
    values_N[77] = np.nan
    means = _means(values_N, 100)
    expected = np.convolve(values_N, np.full(100, 0.01), mode="valid")
    np.testing.assert_allclose(means, expected, atol=1e-9)
    start = time.monotonic()
    _means(generator.normal(size=10**6), 25_000)
    assert time.monotonic() - start < 5
