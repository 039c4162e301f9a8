"""What README.md and docs/ say holds: commands parse, links and paths lead somewhere, imports are as drawn."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from tests.docs.commands import PROGRAMS, check, commands, existing, known_flags
from tests.docs.flags_page import flags_page
from tests.docs.pages import ROOT, Page, page, pages

PAGES = pages()
IDS = [str(page.path) for page in PAGES]
every_page = pytest.mark.parametrize("document", PAGES, ids=IDS)

_PACKAGES = ("shared", "flax_trainer", "torch_trainer", "tests", "benchmarks")
_MODULE = re.compile(rf"((?:{'|'.join(_PACKAGES)})(?:\.\w+)+)(?:\(.*\))?")
_FILE = re.compile(r"[\w.*/-]+(?:\.(?:py|sh|yaml|toml|css|j2)|/)|requirements\w*\.txt|Makefile")
# Files of others' and of runs.
_FOREIGN = {"train_controlnet_flax.py", "train_controlnet.py", "train_controlnet_sdxl.py", "config.yaml", "run.yaml"}
_FOREIGN_FLAGS = {"--flag", "--no_", "--xla_cpu_enable_concurrency_optimized_scheduler", "--xla_dump_to"}


def inline_commands(document: Page) -> list[list[str]]:
    """Commands in backticks, but not those that are only mentioned: `accelerate launch`, `python3 -m module`."""
    found = [command for text in document.inline() if text.split()[0] in PROGRAMS for command in commands(text)]
    return [command for command in found if len(command) > 1 and not _is_mention(command)]


def _is_mention(command: list[str]) -> bool:
    return command in (["accelerate", "launch"], ["sky", "jobs", "launch"]) or (
        command[1] == "-m" and len(command) == 3
    )


BLOCKS = [(document, command) for document in PAGES for block in document.blocks("sh") for command in commands(block)]
INLINE = [(document, command) for document in PAGES for command in inline_commands(document)]


@pytest.mark.parametrize(
    "command",
    [command for _, command in BLOCKS + INLINE],
    ids=[f"{document.path.stem}: {' '.join(command)[:60]}" for document, command in BLOCKS + INLINE],
)
def test_command_is_understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(command)


@every_page
def test_links_lead_somewhere(document: Page) -> None:
    for target in document.links():
        path, _, anchor = target.partition("#")
        file = (ROOT / document.path).parent / path if path else ROOT / document.path
        assert file.exists(), target
        if anchor:
            assert anchor in page(file.resolve()).anchors(), target


@every_page
def test_paths_exist(document: Page) -> None:
    for text in document.inline():
        if text.partition("/")[0] in _PACKAGES or text.startswith("docs/"):
            assert existing(text), f"`{text}` is not in the repository"
        elif _FILE.fullmatch(text) and not text.startswith(("OUTPUT_DIR", "/", "-")) and text not in _FOREIGN:
            places = [text, *(f"{package}/**/{text}" for package in _PACKAGES)]
            assert any(existing(place) for place in places), f"`{text}` is nowhere in the repository"


@every_page
def test_modules_and_their_names_exist(document: Page) -> None:
    for text in document.inline():
        if (named := _MODULE.fullmatch(text.removeprefix("python3 -m "))) is not None:
            _resolve(named[1])


@every_page
def test_flags_exist(document: Page) -> None:
    checked_above = {flag for block in document.blocks("sh") for words in commands(block) for flag in _flags(words)}
    known = known_flags() | checked_above | _FOREIGN_FLAGS
    for text in document.inline():
        if text.startswith("--"):
            assert _flags(text.split()) <= known, text


@every_page
def test_python_imports_what_exists(document: Page) -> None:
    for block in document.blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                module = importlib.import_module(node.module)
                assert {alias.name for alias in node.names} <= set(dir(module)), ast.unparse(node)


@every_page
def test_blocks_are_of_a_kind_that_is_checked(document: Page) -> None:
    assert document.languages() <= {"sh", "python", "json", ""}
    for block in document.blocks("json"):
        json.loads(block)


def test_page_of_flags_is_that_of_the_declarations() -> None:
    written = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert written == flags_page(), "python3 -m tests.docs.flags_page > docs/flags.md"


def test_readme_is_read_in_three_minutes_and_leads_to_every_page() -> None:
    readme, *others = PAGES
    assert len(readme.text.splitlines()) <= 125
    assert {str(other.path) for other in others} <= set(readme.links())


@pytest.mark.parametrize(("place", "package"), list(enumerate(("shared", "flax_trainer", "torch_trainer"))))
def test_imports_run_down_the_drawings(place: int, package: str) -> None:
    drawing = page(ROOT / "docs" / "architecture.md").blocks("")[place]
    height = {
        part.removesuffix("/").removesuffix(".py"): line
        for line, text in enumerate(reversed(drawing.splitlines()))
        for part in re.findall(r"[\w]+(?:/|\.py)", text)
    }
    for file in (ROOT / package).rglob("*.py"):
        part = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for imported in _imported_parts(file, package) - {part}:
            assert height[imported] < height[part], f"{file} imports {package}.{imported}"


@pytest.mark.parametrize(
    "mistake",
    [
        "python3 train_flax.py … --resolutoin 512",
        "python3 train_torch.py … --parallelism mesh",
        "python3 train_jax.py …",
        "python3 -m shared.prepare_everything",
        "python3 -m benchmarks.tpu_blocks resnet --image 2",
        "python3 -m flax_trainer.compile_report --target v4-7 --model sd15",
        "python3 -m shared.compare --output_dir COMPARISON … --push_to_hub",
        "accelerate launch --config_file torch_trainer/accelerate_configs/none.yaml train_torch.py …",
        "accelerate launch --gpus 2 train_torch.py …",
        "python3 -m flax_trainer.generate --controlnet_model_name_or_path A --conditioning_image B --promt C",
        "python3 -m shared.prepare_data pack --train_data_dir DIR --output_dri SHARDS",
        "make everything",
        "pip install -r requirements_jax.txt",
        "./tpu_setup.sh --name circles --zone us-central2-b",
        'gcloud compute tpus tpu-vm ssh NAME --command="cd x && .venv/bin/python train_flax.py … --resolutoin=8"',
        "sky jobs launch cloud/sky.yaml",
        "kubectl apply -f cloud/gke/v5e.yaml",
        "xpk workload create --command='exec cloud/train.sh python3 train_flax.py … --resolutoin=8'",
        "gcloud storage buckets create gs://my-bucket",
        "conda install jax",
    ],
)
def test_mistakes_are_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = commands(mistake)
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(command)


def test_a_block_is_read_as_a_shell_reads_it() -> None:
    block = 'FLAGS="--a 1\n  --b"\nA=1 python3 x.py $FLAGS \\\n  [--c] "d e"    # said\'s\ncd x && make y > z | head\n'
    assert list(commands(block)) == [
        ["python3", "x.py", "--a", "1", "--b", "--c", "d e"],
        ["cd", "x"],
        ["make", "y"],
        ["head"],
    ]


def _imported_parts(file: Path, package: str) -> set[str]:
    """The files and folders of the package that a module of it imports."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    names = [module.split(".") for module in modules]
    return {name[1] for name in names if name[0] == package and len(name) > 1}


def _flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--") and word != "--"}


def _resolve(dotted: str) -> None:
    """A module, or something in one."""
    module, attributes = dotted, list[str]()
    while not _is_module(module):
        module, _, name = module.rpartition(".")
        attributes.insert(0, name)
    found: object = importlib.import_module(module)
    for name in attributes:
        assert hasattr(found, name), f"{dotted}: {found} has no {name}"
        found = getattr(found, name)


def _is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()
