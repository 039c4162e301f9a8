"""The configuration as YAML: what --config reads, --print_config prints and a run keeps as its config.yaml."""

import dataclasses
import re
from typing import Any

import yaml

from shared.config.arguments import Assignment, suggestion, told_name
from shared.config.flags import Flag
from shared.config.options import SECRETS, TrainConfig
from shared.outgoing.redaction import redacted
from shared.untrusted import MIB, read_file, shown
from shared.user_errors import UserError

_NULL_TAG = "tag:yaml.org,2002:null"
_TEXT_TAG = "tag:yaml.org,2002:str"

_LARGEST = MIB  # a file with every flag has 4 KiB, one with a thousand long prompts 300
_DEEPEST = 8  # collections in collections: a configuration has 2; what is a little deeper is told as a wrong value
_MOST_NODES = 50_000  # a configuration has 200, and one for each prompt


class _Dumper(yaml.SafeDumper):
    """Quotes texts with line breaks and control characters so that all of them read back as they were."""

    def write_double_quoted(self, text: str, split: bool = True) -> None:
        """Escaped, where PyYAML would leave what turns the direction of a line for people to be misled by."""
        self.allow_unicode = text.isprintable()
        super().write_double_quoted(text, split)
        self.allow_unicode = True


# PyYAML writes U+0085 into single quotes unescaped, where reading folds it into a space.
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(_TEXT_TAG, text, style=None if text.isprintable() else '"')
)


class _BoundedLoader(yaml.SafeLoader):
    """Composing is recursive and slow: this one goes neither deep nor long."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > _DEEPEST or self.nodes > _MOST_NODES:
            problem = "nested more deeply" if self.depth > _DEEPEST else "longer"
            raise yaml.MarkedYAMLError(problem=f"it is {problem} than any configuration", problem_mark=self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


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
        UserError: for a file that cannot be read, is not YAML, or is not one flat mapping of flags to values.
    """
    root = _composed(path)
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{_told(path)} must hold one `flag: value` per line.")
    assignments: dict[str, Assignment] = {}
    for key, value in root.value:
        place = f"{_told(path)}, line {key.start_mark.line + 1}"
        name = _known_name(key, flags, place)
        origin = f"{place}: {name}"
        if name in assignments:
            raise UserError(f"{origin} is given twice: remove one of the two.")
        assignments[name] = Assignment(name, _texts_of(value, flags[name], origin), origin)
    return list(assignments.values())


def _known_name(key: yaml.Node, flags: dict[str, Flag], place: str) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise UserError(f"{place}: a nested key is not a flag; the keys are the flags that --help lists.")
    name: str = key.value
    if name not in flags:
        told = told_name(name, flags)
        closest = suggestion(told, flags)
        hint = f"did you mean {closest}?" if closest else "the keys are the flags that --help lists."
        raise UserError(f"{place}: {told} is not a flag; {hint}")
    return name


def _composed(path: str) -> yaml.Node | None:
    """The nodes of a document: scalars and collections as written; nothing is constructed, whatever its tag."""
    text = _text_of(path)
    try:
        return yaml.compose(text, Loader=_BoundedLoader)
    except yaml.reader.ReaderError as error:
        raise UserError(
            f"--config '{_told(path)}' is not valid YAML: it holds the control character "
            f"{shown(chr(error.character))} at character {error.position + 1}. Take it out."
        ) from None
    except yaml.MarkedYAMLError as error:
        # The whole message would quote the line, which may hold a token; a token that begins with * or ! is an alias
        # or a tag to YAML, and named in the problem itself.
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = shown(re.sub(r"'[\w!-]{2,}'", "", str(error.problem)).strip())
        raise UserError(f"--config '{_told(path)}' is not valid YAML{line}: {problem}.") from None
    except (ValueError, OverflowError):  # of PyYAML's scanner, at versions of thousands of digits and at "\\UFFFFFFFF"
        raise UserError(
            f"--config '{_told(path)}' is not valid YAML: a number or a character's code in it is too large."
        ) from None


def _text_of(path: str) -> str:
    try:
        return read_file(path, _LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--config '{_told(path)}' cannot be read: byte {error.start + 1} of it is not UTF-8. Give a YAML file."
        ) from None
    except ValueError as error:
        raise UserError(
            f"--config '{_told(path)}'{str(error).removeprefix(shown(path))} Give the path of a YAML file."
        ) from error


def _told(path: str) -> str:
    return shown(redacted(path))


def _texts_of(node: yaml.Node, flag: Flag, origin: str) -> tuple[str, ...] | None:
    if isinstance(node, yaml.ScalarNode):
        # YAML's infinity has a dot that Python's has not.
        text = node.value.lower().replace(".inf", "inf") if flag.kind is float else node.value
        return None if node.tag == _NULL_TAG else (text,)
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if not flag.is_list or not items or not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise UserError(f"{origin} must be of type {flag.type_name}, but it is a nested or an empty collection.")
    return tuple(item.value for item in items)
