"""Every flag as a page: `python3 -m tests.docs.flags_page > docs/flags.md`, which a test compares with the page."""

import itertools
from collections.abc import Iterator, Mapping

from shared.config.flags import Backend, Equivalent, Flag, Missing
from shared.config.help_text import default_text
from shared.config.options import FLAGS
from shared.config.support import BACKEND_NAMES
from shared.evaluate.options import EVALUATE_FLAGS
from shared.generate.options import GENERATE_FLAGS
from shared.prepare_data.command import SUBCOMMANDS

_PLACEHOLDERS = {int: "INT", float: "FLOAT", str: "TEXT"}

_HEAD = """# Every flag

Flags of `train_flax.py` and `train_torch.py`, which `--help` prints too. Names, types and meanings are those of
diffusers' scripts, underscored. Write `--flag value` or `--flag=value`; a switch is turned off again by `--no_` before
its name. Where a flag is repeated, the last one counts. A step is an optimizer step. `--config FILE` reads flags from a
YAML file with one `flag: value` per line, over which the command line wins; `--print_config` prints the configuration
that a command line means, in that form, and starts nothing.

[docs/running.md](running.md), [docs/data.md](data.md), [docs/evaluation.md](evaluation.md) and
[docs/checkpoints.md](checkpoints.md) tell how they are used together. This page is made from the flags' declarations:
`python3 -m tests.docs.flags_page > docs/flags.md`.
"""

_HEAD_OF_GENERATE = """## Flags of the command that draws

Those of `python3 -m flax_trainer.generate` and `python3 -m torch_trainer.generate`, which
[docs/generating.md](generating.md) is about.
"""

_HEAD_OF_EVALUATION = """## Flags of the command that measures

Those of `python3 -m flax_trainer.evaluate` and `python3 -m torch_trainer.evaluate`, which
[docs/evaluation.md](evaluation.md#measure-a-trained-controlnet) is about, beside those that they share with a training
and with the command that draws: the models', the data's, `--seed`, and how pictures are drawn.
"""

_HEAD_OF_PREPARATION = """## Flags of the command that prepares data

Those of `python3 -m shared.prepare_data`, which [docs/preparing_data.md](preparing_data.md) is about, beside those that
name data in a training.
"""


def flags_page() -> str:
    """All flags by group: what they take, their default and meaning, and what a backend does otherwise."""
    tables = [_HEAD, *_tables(FLAGS, "## "), _HEAD_OF_GENERATE, *_tables(GENERATE_FLAGS, "### Generate: ")]
    own = {
        name: flag for name, flag in EVALUATE_FLAGS.items() if flag not in (FLAGS.get(name), GENERATE_FLAGS.get(name))
    }
    tables += [_HEAD_OF_EVALUATION, *_tables(own, "### Measure: "), _HEAD_OF_PREPARATION]
    for name, subcommand in SUBCOMMANDS.items():
        own = {flag.name: flag for flag in subcommand.flags.values() if flag != FLAGS.get(flag.name)}
        tables += _tables(own, f"### Prepare data, {name}: ")
    return "\n".join(tables)


def _tables(declared: Mapping[str, Flag], heading: str) -> Iterator[str]:
    for group, flags in itertools.groupby(declared.values(), key=lambda flag: flag.group):
        rows = "\n".join(f"| {_heading(flag)} | {_default(flag)} | {_meaning(flag)} |" for flag in flags)
        title = group.capitalize() if heading == "## " else group
        yield f"{heading}{title}\n\n| flag | default | |\n|---|---|---|\n{rows}\n"


def _heading(flag: Flag) -> str:
    if flag.kind is bool:
        return f"`--{flag.name}`"
    return f"`--{flag.name} {_PLACEHOLDERS[flag.kind]}{' …' * flag.is_list}`"


def _default(flag: Flag) -> str:
    if flag.kind is bool:
        return "off"
    return "" if flag.default is None else default_text(flag)


def _meaning(flag: Flag) -> str:
    choices = f" One of {', '.join(flag.choices)}." if flag.choices else ""
    return (flag.help + choices + "".join(_support(flag, backend) for backend in BACKEND_NAMES)).replace("|", "\\|")


def _support(flag: Flag, backend: Backend) -> str:
    match flag.in_backend(backend):
        case Missing(advice=_, value=None):
            return f" Not supported yet in {BACKEND_NAMES[backend]}."
        case Missing(advice=_, value=value):
            return f" {value} is not supported yet in {BACKEND_NAMES[backend]}."
        case Equivalent(notice=notice):
            return f" In {BACKEND_NAMES[backend]}, {notice}."
        case None:
            return ""


if __name__ == "__main__":
    print(flags_page(), end="")
