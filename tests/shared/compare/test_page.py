"""The page: everything is in it, nothing is fetched, and what is missing shows as such."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shared.compare.comparison import compare
from shared.compare.page import render
from tests.shared.compare.run_folders import LOSSES, WEIGHTS, make_run, scaled, write_picture

VOID = {"meta", "img", "br", "link", "input", "hr"}
ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}


class Page(HTMLParser):
    """What the page is made of; fails on tags that are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ADDRESSES]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)


def inlined(page: Page) -> list[bytes]:
    found = [address for address in page.addresses if address.startswith("data:image/")]
    return [base64.b64decode(address.partition(",")[2], validate=True) for address in found]


EVALUATIONS = [
    {"step": 0, "validation_loss": 0.3, "validation_loss_t000-249": 0.31, "circle_iou": 0.1},
    {"step": 3, "validation_loss": 0.2, "validation_loss_t000-249": 0.21, "circle_iou": 0.7},
]


def full_run(folder: Path, backend: str, grey: int, circle_iou: float = 0.7) -> Path:
    """A run with everything that a run can have."""
    report = {
        **{name: value for name, value in EVALUATIONS[1].items() if name != "step"},
        **{f"{name}_untrained": value for name, value in EVALUATIONS[0].items() if name != "step"},
        "circle_iou": circle_iou,
        "convergence_step": 2,
        "backend": backend,
        "command": f"python3 train_{backend}.py --validation_prompt '<script>alert(1)</script>'",
    }
    write_picture(folder / "validation" / "step-2" / "0.png", 10)
    write_picture(folder / "validation" / "step-3" / "0.png", grey)
    write_picture(folder / "contact_sheet.png", grey + 100)
    return make_run(folder, evaluations=EVALUATIONS, report=report)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return full_run(folder / "flax", "flax", 50), full_run(folder / "torch", "torch", 53, circle_iou=0.65)


@pytest.fixture(scope="module")
def html(runs: tuple[Path, Path]) -> str:
    return render(compare(*runs))


def test_nothing_is_fetched(html: str) -> None:
    page = Page(html)
    assert {"script", "link", "iframe", "object"} & set(page.tags) == set()
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", html) is None


def test_names_within_the_page_are_unique_and_known(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    used = [address[1:] for address in page.addresses if address.startswith("#")]
    used += re.findall(r"url\(#([^)]+)\)", html)
    assert set(used) <= set(page.ids)


def test_the_pictures_of_both_runs_are_in_it(html: str, runs: tuple[Path, Path]) -> None:
    pictures = inlined(Page(html))
    for run in runs:
        for name in ("validation/step-3/0.png", "contact_sheet.png"):
            assert (run / name).read_bytes() in pictures
    assert sum(picture.startswith(b"RIFF") for picture in pictures) == 2  # the small ones of step 2


def test_the_differences_of_pictures_are_in_it(html: str) -> None:
    text = Page(html).text
    assert "mean difference 3.00 of 255, largest 3" in text
    assert "the same pixel for pixel" in text


def test_the_figures_are_in_it(html: str) -> None:
    text = Page(html).text
    for expected in (
        "Flax and PyTorch agree",
        "worst of 3 logged steps",
        "Both runs logged exactly the same numbers.",
        "controlnet_mid_block",
        "1 min 15 s",  # the whole run
        "83.3 ms",  # the median of 2 images at 20 and at 30 per second: 100 and 66.7 ms
        "25.0",  # the median of those rates
        "1.50 GiB",
        "circle IoU 0.100 0.700 0.650 −0.050",
        "validation loss, timesteps 0–249 0.310 0.210 0.210 0",
        "follows its condition since step 2 2 +0",
    ):
        assert expected in text, expected


def test_charts_have_both_axes_named(html: str) -> None:
    page = Page(html)
    names = ("loss", "gradient norm", "step time in seconds", "images per second", "validation loss", "circle IoU")
    for name in ("relative difference", *names):
        assert name in page.words
    assert page.words.count("optimizer step") == page.tags.count("svg") == 2 * 2 + 2 + 2


def test_what_users_wrote_is_text(html: str) -> None:
    assert "<script>alert(1)</script>" in Page(html).text


def test_missing_figures_are_dashes(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("devices", "seconds_total", "images_seen", "versions", "command", "peak_host_memory_gib"))
    a, b = make_run(tmp_path / "a", losses=[0.5], report=nothing), make_run(tmp_path / "b", losses=[0.5])
    text = Page(render(compare(a, b))).text
    for expected in (
        "Devices – 1 × cpu",
        "Total time – 1 min 15 s",
        "Peak memory, host – 1.50 GiB –",
        "Step time, median – – –",  # the only step holds the compilation
    ):
        assert expected in text, expected
    assert "Held-out samples" not in text
    assert "Pictures" not in text


def test_a_picture_that_one_run_lacks_is_a_dash(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    picture = write_picture(a / "validation" / "step-3" / "0.png", 9)
    page = Page(render(compare(a, b)))
    assert inlined(page) == [picture.read_bytes()]
    assert "nothing to compare" in page.text


def test_many_validations_are_not_all_shown(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for run in (a, b):
        for step in range(0, 210, 10):
            write_picture(run / "validation" / f"step-{step}" / "0.png", step)
    text = Page(render(compare(a, b))).text
    assert "8 of 20 earlier validations" in text
    assert "Step 0 " in text
    assert "Step 190 " in text


def test_a_damaged_picture_is_said_in_its_place(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for run in (a, b):
        write_picture(run / "contact_sheet.png", 9)
    (b / "contact_sheet.png").write_bytes(b"no picture")
    text = Page(render(compare(a, b))).text
    assert "Contact sheets nothing to compare" in text
    assert "not shown: it is no picture of a known format (it begins with b'no pictu')" in text


def test_disagreement_names_the_first_step_and_the_worst_tensors(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", losses=[LOSSES[0], LOSSES[1] * 1.01, LOSSES[2] * 1.1], weights=scaled(WEIGHTS, 1.01))
    text = Page(render(compare(a, b))).text
    assert "a and b do not agree" in text
    assert "at step 3; first beyond the tolerance at step 2" in text
    assert "The 5 tensors that differ most" in text


def test_thousands_of_steps_make_a_page_that_opens(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    losses = generator.uniform(0.1, 0.2, 20_000)
    a = make_run(tmp_path / "a", losses=losses.tolist())
    b = make_run(tmp_path / "b", losses=(losses * generator.uniform(1 - 1e-4, 1 + 1e-4, losses.size)).tolist())
    html = render(compare(a, b))
    assert len(html) < 3e6
    assert "Bold lines are means over 500 logged steps." in Page(html).text
