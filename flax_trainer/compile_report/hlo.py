"""A compiled TPU program in XLA's text notation, read as far as counting its costs needs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", re.DOTALL)
_BEGINS = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
    r"(condition|body|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.-]+)"
)

Shape = tuple[str, tuple[int, ...]]
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}


@dataclass(frozen=True)
class Instruction:
    """One line of a program. `cycles` is the compiler's estimate, 0 where it makes none."""

    name: str
    shapes: tuple[Shape, ...]  # of its results
    opcode: str
    operands: tuple[str, ...]
    cycles: int
    op_name: str
    called: dict[str, tuple[str, ...]]
    text: str = field(repr=False)

    @property
    def result_bytes(self) -> int:
        return sum(bytes_of(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Program:
    """Computations by name; their instructions by name and in order."""

    entry: str
    computations: dict[str, dict[str, Instruction]]

    def operands(self, computation: str, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results it takes."""
        return [self.computations[computation][name] for name in instruction.operands]


def parse_program(text: str) -> Program:
    """Read `jax.stages.Compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = None
    for is_entry, name, lines in _blocks(text):
        computations[name] = {instruction.name: instruction for instruction in map(_instruction, lines)}
        entry = name if is_entry else entry
    assert entry is not None, text[:200]
    return Program(entry, computations)


def bytes_of(shape: Shape) -> int:
    """Without the padding of tiles."""
    dtype, sizes = shape
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
    count = 1
    for size in sizes:
        count *= size
    return count * bits // 8


def _blocks(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    """(whether it is the entry, name, instructions) of every computation; an instruction may span several lines."""
    lines: list[str] = []
    header: re.Match[str] | None = None
    for line in text.splitlines():
        if header is None:
            header, lines = _COMPUTATION.match(line), []
        elif line == "}":
            yield bool(header[1]), header[2], lines
            header = None
        elif _BEGINS.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line


def _instruction(line: str) -> Instruction:
    match = _INSTRUCTION.match(line)
    assert match is not None, line[:200]
    name, result, opcode, rest = match.groups()
    arguments = rest[: _closing(rest)]
    cycles, op_name = _CYCLES.search(rest), _OP_NAME.search(rest)
    called = {kind: tuple(_OPERAND.findall(names)) for kind, names in _CALLED.findall(rest)}
    shapes = tuple((dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in _SHAPE.findall(result))
    return Instruction(
        name,
        shapes,
        opcode,
        tuple(_OPERAND.findall(arguments)),
        int(cycles[1]) if cycles else 0,
        op_name[1] if op_name else "",
        called,
        line,
    )


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened just before `text`."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return index
    return len(text)
