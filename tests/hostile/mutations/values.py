"""Values in the place of others: texts that forge, numbers that overflow, types that nobody expects, JSON and YAML."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.hostile.case import FORGED, Case

Json = Any
_LONG = 300_000
_DEEP = 100_000
_RAW = "@@raw-{}@@"


def hostile_text(case: Case) -> str:
    """A text for a name, a caption, a prompt, a key: none of it may reach a terminal or a page as it is."""
    return pick(case, _TEXTS)(case)


_TEXTS: tuple[Callable[[Case], str], ...] = (
    lambda case: f"a\n{FORGED} line",
    lambda case: f"a\r\n{FORGED} line",
    lambda case: f"a\r{FORGED} line",
    lambda case: f"\x1b[2J\x1b[31m{FORGED}",
    lambda case: f"\x1b]0;{FORGED}\x07",
    lambda case: f"\x9b31m{FORGED}",
    lambda case: f"a\u2028{FORGED} line\u2029{FORGED}",
    lambda case: f"a\x0b{FORGED}\x0c{FORGED}\x85{FORGED}",
    lambda case: f"\u202egnp.{FORGED}\u2066",
    lambda case: f"a\x00{FORGED}",
    lambda case: "half a dog \ud83d",
    lambda case: "\udc80\udcff",
    lambda case: "\ufeff\u200b\u00ad",
    lambda case: "".join(map(chr, range(32))),
    lambda case: "<script>alert(1)</script>",
    lambda case: "</style></svg></title><script>alert(1)</script>",
    lambda case: '"><img src=x onerror=alert(1)>',
    lambda case: "' onload='alert(1)' x='",
    lambda case: '" onmouseover="alert(1)',
    lambda case: "javascript:alert(1)//",
    lambda case: "![x](https://host.example/x.png) [x](javascript:alert(1))",
    lambda case: "](https://host.example/) <https://host.example/> <b>",
    lambda case: "```\n# FORGED\n```python\nimport os",
    lambda case: "a trailing backslash \\",
    lambda case: "`` ` ``` ~~~ | * _ # > - + 1. &lt; &#60;script&#62;",
    lambda case: '"); import os; os.mkdir("' + str(case.executed) + '"); ("',
    lambda case: "{0.__class__.__mro__} {name} {} %s %(x)s ${HOME} $(id) `id` {{7*7}} {% raw %}",
    lambda case: "../" * 12 + "etc/passwd",
    lambda case: str(case.outside / "secret.txt"),
    lambda case: "x" * _LONG,
    lambda case: "猫" * 3000,
    lambda case: " ",
    lambda case: "",
    lambda case: "\t\n ",
    lambda case: "-",
    lambda case: "--seed",
    lambda case: "nan",
    lambda case: "null",
    lambda case: "True",
    lambda case: "0",
    lambda case: "-1",
    lambda case: "1e309",
    lambda case: "٣",
    lambda case: "1_000",
    lambda case: "__class__",
    lambda case: "__reduce__",
)

# As they stand in a file.
_SNIPPETS: tuple[Callable[[Case], str], ...] = (
    lambda case: "null",
    lambda case: "true",
    lambda case: "false",
    lambda case: "0",
    lambda case: "1",
    lambda case: "-1",
    lambda case: "2",
    lambda case: "3",
    lambda case: "7",
    lambda case: "0.5",
    lambda case: "-0.0",
    lambda case: "1e-320",
    lambda case: "1e308",
    lambda case: "1e400",
    lambda case: "-1e400",
    lambda case: "NaN",
    lambda case: "Infinity",
    lambda case: "-Infinity",
    lambda case: "100000",
    lambda case: "1000000000",
    lambda case: "-1000000000",
    lambda case: "2147483648",
    lambda case: "9223372036854775808",
    lambda case: "1" + "0" * 400,
    lambda case: "1" + "0" * 5000,
    lambda case: '""',
    lambda case: '"text"',
    lambda case: '"0"',
    lambda case: '"1"',
    lambda case: '"true"',
    lambda case: json.dumps(str(case.outside)),
    lambda case: json.dumps(str(case.outside / "secret.json")),
    lambda case: json.dumps("../outside/secret.txt"),
    lambda case: json.dumps(f"file://{case.outside}/secret.txt"),
    lambda case: '"/dev/zero"',
    lambda case: '"https://host.example/x.json"',
    lambda case: json.dumps(hostile_text(case)),
    lambda case: json.dumps(hostile_text(case)),
    lambda case: json.dumps(hostile_text(case)),
    lambda case: "[]",
    lambda case: "[[]]",
    lambda case: "[null]",
    lambda case: "[0]",
    lambda case: "[-1, -1]",
    lambda case: "[1, 2, 3]",
    lambda case: "[32, 64, 128]",
    lambda case: "[32]",
    lambda case: '["a", 1, null, {}]',
    lambda case: '["text"]',
    lambda case: "[1.5, 2.5]",
    lambda case: "[1000000000, 1000000000]",
    lambda case: "[" + "8," * 200_000 + "8]",
    lambda case: "{}",
    lambda case: '{"a": {"b": 1}}',
    lambda case: '{"0": 0}',
    lambda case: '{"": ""}',
    lambda case: "[" * _DEEP + "]" * _DEEP,
    lambda case: '{"a":' * _DEEP + "1" + "}" * _DEEP,
    lambda case: "[" * 900 + "]" * 900,
    lambda case: "[" * _DEEP,
    lambda case: '"' + "x" * 4_000_000 + '"',
    lambda case: "0x10",
    lambda case: "01",
    lambda case: "undefined",
    lambda case: "'text'",
    lambda case: '"\\ud83d"',
    lambda case: '"\\u0000"',
    lambda case: '"\x1b[31m"',
)


def pick(case: Case, choices: Sequence[Any]) -> Any:
    return choices[case.below(len(choices))]


def some(case: Case, choices: Sequence[Any], most: int) -> list[Any]:
    """One of them, or, less often, up to `most` different ones."""
    count = 1 if case.chance(0.7) else 1 + case.below(most)
    return list(dict.fromkeys(pick(case, choices) for _ in range(count)))


def snippet(case: Case) -> str:
    """JSON, or nearly, of a value that was not expected."""
    return pick(case, _SNIPPETS)(case)


def number(case: Case) -> str:
    """As a text that may be a number."""
    return pick(
        case,
        (
            "0",
            "-1",
            "1",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "1e-400",
            "10" * 200,
            "1000000000",
            "1.5",
            "",
            " 1",
            "1_0",
            "٣",
            "0x10",
            "1e5",
            "2147483648",
            "18446744073709551616",
            "1" + "0" * 5000,
            "--1",
            "+1",
            "=1",
            "==1",
        ),
    )


# --- JSON ------------------------------------------------------------------------------------------------------------


def mutated_json(case: Case, content: bytes, extra_keys: Sequence[str] = ()) -> bytes:
    """A JSON document of which a key, an element or everything is something else; `extra_keys` are worth adding."""
    if case.chance(0.12):
        return _mutated_as_text(case, content)
    if case.chance(0.06):
        return snippet(case).encode("utf-8", "surrogatepass")
    tree = _Raw(json.loads(content))
    for _ in range(1 + case.below(2) * case.below(3)):
        _mutate_once(case, tree, extra_keys)
    return tree.text(indent=2 if case.chance(0.5) else None).encode("utf-8", "surrogatepass")


class _Raw:
    """A JSON tree in which texts stand for pieces of JSON that no tree can hold."""

    def __init__(self, root: Json):
        self.root = root
        self._pieces: dict[str, str] = {}

    def piece(self, text: str) -> str:
        name = _RAW.format(len(self._pieces))
        self._pieces[name] = text
        return name

    def text(self, indent: int | None) -> str:
        written = json.dumps(self.root, indent=indent)
        for name, piece in self._pieces.items():
            written = written.replace(f'"{name}"', piece)
        return written


def _is_json_inside(text: str) -> bool:
    """An object or a list, and not "[PAD]"."""
    try:
        return text.startswith(("{", "[")) and isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _mutate_once(case: Case, tree: _Raw, extra_keys: Sequence[str]) -> None:
    holder, key = _somewhere(case, tree.root)
    if holder is None:
        tree.root = tree.piece(snippet(case))
        return
    action = case.rng.random()
    value = holder[key]
    if isinstance(value, str) and _is_json_inside(value) and action < 0.8:
        holder[key] = mutated_json(case, value.encode(), extra_keys).decode("utf-8", "replace")
    elif action < 0.62:
        holder[key] = tree.piece(snippet(case))
    elif action < 0.74:
        del holder[key]
    elif action < 0.84 and isinstance(holder, dict):
        name = pick(case, extra_keys) if extra_keys and case.chance(0.7) else hostile_text(case)
        holder[name] = tree.piece(snippet(case))
    elif action < 0.90 and isinstance(holder, dict):
        holder[tree.piece(json.dumps(key))] = tree.piece(snippet(case))  # the same key twice
    elif action < 0.96 and isinstance(holder, dict):
        holder[hostile_text(case)] = holder.pop(key)
    else:
        holder[key] = [value]


def _somewhere(case: Case, root: Json) -> tuple[Any, Any]:
    """A place in a tree, nearer to its root than not: (dict or list, key or index)."""
    holder, key, value = None, None, root
    while isinstance(value, dict | list) and value and not (holder is not None and case.chance(0.35)):
        holder = value
        key = pick(case, list(value)) if isinstance(value, dict) else case.below(len(value))
        value = holder[key]
    return holder, key


def _mutated_as_text(case: Case, content: bytes) -> bytes:
    text = content.decode("utf-8")
    return pick(
        case,
        (
            lambda: content[: case.below(len(content) + 1)],
            lambda: b"\xef\xbb\xbf" + content,
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-32"),
            lambda: content + content,
            lambda: content + b"\x00" * 100,
            lambda: content.replace(b",", b",,", 1),
            lambda: content.replace(b'"', b"'"),
            lambda: b"// a comment\n" + content,
            lambda: content.replace(b'"', b'"\xff\xfe', 1),
            lambda: content.replace(b"\n", b"\r\n"),
            lambda: b"",
            lambda: b"\x00" * len(content),
            lambda: content + b" " * 70_000_000,
            lambda: bytes(case.rng.integers(0, 256, 200, np.uint8)),
        ),
    )()


# --- lines of JSON ---------------------------------------------------------------------------------------------------


def mutated_json_lines(case: Case, content: bytes, extra_keys: Sequence[str] = ()) -> bytes:
    """As `mutated_json`, of one line or of how they follow each other."""
    lines = content.splitlines()
    if not lines or case.chance(0.1):
        return _mutated_as_text(case, content)
    chosen = 0 if case.chance(0.4) else case.below(len(lines))
    action = case.rng.random()
    if action < 0.75:
        lines[chosen] = mutated_json(case, lines[chosen], extra_keys).replace(b"\n", b" ")
    elif action < 0.8:
        lines.insert(chosen, lines[chosen])
    elif action < 0.85:
        lines[chosen] = b""
    elif action < 0.9:
        del lines[chosen]
    else:
        case.rng.shuffle(lines)
    return b"\n".join(lines) + b"\n" * case.below(2)


# --- YAML ------------------------------------------------------------------------------------------------------------

_YAML: tuple[Callable[[Case], str], ...] = (
    lambda case: "",
    lambda case: "null",
    lambda case: "~",
    lambda case: "!!null x",
    lambda case: "!!int x",
    lambda case: "!!binary 8J+Q",
    lambda case: "!!python/object/apply:os.mkdir ['" + str(case.executed) + "']",
    lambda case: "!!python/name:os.system",
    lambda case: "&a [*a]",
    lambda case: "*nobody",
    lambda case: "[" * _DEEP + "]" * _DEEP,
    lambda case: "[" * 1500 + "]" * 1500,
    lambda case: "{a: " * 3000 + "1" + "}" * 3000,
    lambda case: "{a: 1}",
    lambda case: "[]",
    lambda case: "[[a], b]",
    lambda case: "[a, [], {}]",
    lambda case: "2026-01-01",
    lambda case: "1:30:00",
    lambda case: "0o17",
    lambda case: ".nan",
    lambda case: "-.inf",
    lambda case: "|\n  a\n  b",
    lambda case: '"\\x1b[31m' + FORGED + '"',
    lambda case: '"a\\n' + FORGED + '"',
    lambda case: '"\\ud83d"',
    lambda case: '"\\0"',
    lambda case: "a\x00b",
    lambda case: "'unclosed",
    lambda case: "x" * 3_000_000,
    lambda case: "1" + "0" * 5000,
    lambda case: json.dumps(hostile_text(case)),
    lambda case: json.dumps(hostile_text(case), ensure_ascii=False),
    lambda case: number(case),
)


def mutated_yaml(case: Case, content: bytes) -> bytes:
    """A flat YAML mapping of which a line, or everything, is something else."""
    if case.chance(0.15):
        return _mutated_as_text(case, content)
    if case.chance(0.1):
        return pick(
            case, (_many_aliases, lambda: pick(case, _YAML)(case), lambda: "- a\n- b\n", lambda: "--- 1\n--- 2\n")
        )().encode("utf-8", "surrogatepass")
    lines = content.decode("utf-8").splitlines()
    for _ in range(1 + case.below(2)):
        chosen = case.below(len(lines))
        key, colon, value = lines[chosen].partition(":")
        action = case.rng.random()
        if action < 0.7:
            lines[chosen] = f"{key}: {pick(case, _YAML)(case)}"
        elif action < 0.8:
            lines.insert(chosen, lines[chosen])
        elif action < 0.9:
            lines[chosen] = f"{json.dumps(hostile_text(case))}{colon}{value}"
        else:
            lines[chosen] = pick(case, ("? [a, b]\n: c", "<<: {seed: 1}", "\tseed: 1", "%YAML 9.9", "...", "{", "seed"))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _many_aliases() -> str:
    """A billion laughs."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
    return "\n".join(lines) + "\nseed: *a9\n"
