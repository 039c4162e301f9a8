"""The configuration as YAML: what --config reads, --print_config prints and a run keeps as its config.yaml."""

import dataclasses
import pathlib
import re

import yaml

from shared.config.arguments import Assignment, suggestion
from shared.config.flags import Flag
from shared.config.options import SECRETS, TrainConfig

_NULL_TAG = "tag:yaml.org,2002:null"
_TEXT_TAG = "tag:yaml.org,2002:str"


class _Dumper(yaml.SafeDumper):
    """Quotes texts with line breaks and control characters so that all of them read back as they were."""


# PyYAML writes U+0085 into single quotes unescaped, where reading folds it into a space.
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(_TEXT_TAG, text, style=None if text.isprintable() else '"')
)


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML, one line per flag in the order of --help, secrets left out.

    Read back with --config, it gives an equal configuration, apart from the secrets.
    """
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in SECRETS}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_yaml(path: str, flags: dict[str, Flag]) -> list[Assignment]:
    """The assignments that a YAML file makes, as if each key were a flag of the command line.

    Scalars are taken as they are written, so `mixed_precision: no` is a text and `learning_rate: 1e-5` a number,
    whatever YAML 1.1 makes of them.

    Raises:
        ValueError: for a file that cannot be read, is not YAML, or is not one flat mapping of flags to values.
    """
    root = _composed(path)
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold one `flag: value` per line.")
    assignments: dict[str, Assignment] = {}
    for key, value in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "a nested key"
        origin = f"{path}, line {key.start_mark.line + 1}: {name}"
        if name not in flags:
            closest = suggestion(name, flags)
            hint = f"did you mean {closest}?" if closest else "the keys are the flags that --help lists."
            raise ValueError(f"{origin} is not a flag; {hint}")
        if name in assignments:
            raise ValueError(f"{origin} is given twice: remove one of the two.")
        assignments[name] = Assignment(name, _texts_of(value, flags[name], origin), origin)
    return list(assignments.values())


def _composed(path: str) -> yaml.Node | None:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path!r} cannot be read: {error}. Give the path of a YAML file.") from error
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        # The whole message would quote the line, which may hold a token; a token that begins with * or ! is an alias
        # or a tag to YAML, and named in the problem itself.
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = re.sub(r"'[\w!-]{2,}'", "", str(error.problem)).strip()
        raise ValueError(f"--config {path!r} is not valid YAML{line}: {problem}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path!r} is not valid YAML: {error}") from error


def _texts_of(node: yaml.Node, flag: Flag, origin: str) -> tuple[str, ...] | None:
    if isinstance(node, yaml.ScalarNode):
        # YAML's infinity has a dot that Python's has not.
        text = node.value.lower().replace(".inf", "inf") if flag.kind is float else node.value
        return None if node.tag == _NULL_TAG else (text,)
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if not flag.is_list or not items or not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise ValueError(f"{origin} must be of type {flag.type_name}, but it is a nested or an empty collection.")
    return tuple(item.value for item in items)
