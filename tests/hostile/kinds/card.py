"""The model card of a run whose names, prompts and data are hostile, and what a reader's program makes of it."""

import ast
import re
from collections.abc import Iterator
from typing import Any

import yaml
from markdown_it import MarkdownIt

from shared.config import TrainConfig
from shared.models.configs import UNet2DConditionConfig
from shared.run.licence import Licence
from shared.run.model_card import CardContent, data_description, kind_of, write_model_card
from tests.hostile.case import Case
from tests.hostile.mutations.addresses import hostile_address
from tests.hostile.mutations.values import hostile_text, pick
from tests.hostile.outcome import Outcome, Sign
from tests.hostile.signs import signs_in_files, signs_in_page, signs_in_text
from tests.hostile.watched import Attempt

_PICTURES = re.compile(r"validation/step-\d+/\d+\.png")
_HEADINGS = {"Use", "Training", "Validation", "Configuration"}
_SNIPPETS = 1  # of Python on a card
_OTHER_BLOCKS = 2  # the command, the configuration


def build(case: Case) -> Attempt:
    """Every name that a card takes over is one that nobody expects."""
    prompts = tuple(hostile_text(case) for _ in range(1 + case.below(3)))
    config = _config(case, prompts)
    name = pick(case, ("me/circles", hostile_text(case), hostile_address(case)))
    facts: dict[str, Any] = {
        "Optimizer steps": 12,
        "Hardware": pick(case, ("1 × cpu", hostile_text(case))),
        "Data": data_description(config) if case.chance(0.3) else "circles",
    }
    command = f"python3 {hostile_text(case)}"
    kind = kind_of(UNet2DConditionConfig())
    licence = Licence("other", hostile_text(case), hostile_address(case)) if case.chance(0.3) else kind.licence
    pictures = [(case.out / "validation" / "step-3" / f"{index}.png", prompt) for index, prompt in enumerate(prompts)]

    def run() -> int:
        write_model_card(case.out, config, name, CardContent(facts, command, pictures, kind, licence))
        return 0

    return Attempt(f"names {ascii((name, prompts))[:200]}", run, lambda: _signs(case))


def _config(case: Case, prompts: tuple[str, ...]) -> TrainConfig:
    values: dict[str, Any] = {
        "pretrained_model_name_or_path": pick(
            case,
            ("some/model", hostile_text(case), hostile_address(case), f"https://user:{case.secret}@host.example/x"),
        ),
        "validation_prompt": prompts,
        "validation_image": ("c.png",),
        "sd_unlocked": case.chance(0.3),
        "tracker_project_name": pick(case, ("x", hostile_text(case))),
        "hub_token": case.secret,
        "push_to_hub": True,
    }
    source = pick(case, ("dataset_name", "train_data_dir", "train_shards"))
    location = pick(
        case,
        (
            hostile_text(case),
            hostile_address(case),
            f"https://user:{case.secret}@host.example/x.tar?token={case.secret}",
        ),
    )
    values[source] = (location,) if source == "train_shards" else location
    return TrainConfig(**values)


def _signs(case: Case) -> Iterator[Sign]:
    yield from signs_in_files(case, case.out)
    path = case.out / "README.md"
    if not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    yield from signs_in_text(case, card, "the card")
    front, end, body = card.removeprefix("---\n").partition("\n---\n")
    if not end:
        yield Sign(Outcome.FORGED, "the card is cut off")
        return
    yield from _signs_of_metadata(front)
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    yield from (sign for sign in signs_in_page(case, page, policy=False, where="the card") if not _is_our_picture(sign))
    yield from _signs_of_headings(page)
    yield from _signs_of_code(body)


def _is_our_picture(sign: Sign) -> bool:
    return "src=" in sign.reason and _PICTURES.search(sign.reason) is not None


def _signs_of_metadata(front: str) -> Iterator[Sign]:
    keys = {"base_model", "library_name", "license", "license_name", "license_link", "tags", "inference"}
    try:
        metadata = yaml.safe_load(front)
    except yaml.YAMLError as error:
        yield Sign(Outcome.FORGED, f"the card's metadata are no YAML: {ascii(str(error))[:100]}")
        return
    if not isinstance(metadata, dict) or not metadata.keys() <= keys:
        yield Sign(Outcome.FORGED, f"the card's metadata have other keys: {ascii(metadata)[:100]}")


def _signs_of_headings(page: str) -> Iterator[Sign]:
    headings = re.findall(r"<h[2-6]>(.*?)</h[2-6]>", page, re.DOTALL)
    for heading in headings:
        if heading not in _HEADINGS:
            yield Sign(Outcome.FORGED, f"the card has a heading of the input's: {ascii(heading)[:100]}")


def _signs_of_code(body: str) -> Iterator[Sign]:
    """The Python on it is one that compiles and does nothing but what it did."""
    blocks = [token for token in MarkdownIt("commonmark").parse(body) if token.type == "fence"]
    snippets = [token.content for token in blocks if token.info.strip() == "python"]
    if len(snippets) != _SNIPPETS or len(blocks) != _SNIPPETS + _OTHER_BLOCKS:
        yield Sign(Outcome.FORGED, f"the card has {len(blocks)} blocks of code, {len(snippets)} of them Python")
    for snippet in snippets:
        try:
            calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
        except (SyntaxError, ValueError) as error:
            yield Sign(Outcome.FORGED, f"the card's Python is none: {ascii(str(error))[:100]}")
            continue
        names = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
        if not names <= {"from_pretrained", "pipeline", "load_image"}:
            yield Sign(Outcome.FORGED, f"the card's Python calls {ascii(sorted(names))[:100]}")
