#!/usr/bin/env python3
"""Train a ControlNet in PyTorch. `--help` lists every flag."""

import sys

from shared.config import parse_command_line


def main(arguments: list[str]) -> int:
    parse_command_line(arguments, "torch")
    print("error: the PyTorch backend is not supported yet; use train_flax.py with the same flags.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
