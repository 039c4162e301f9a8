#!/usr/bin/env python3
"""Train a ControlNet in PyTorch. `--help` lists every flag; without flags the built-in demo runs."""

import sys

from shared.config import parse_command_line
from shared.outgoing.messages import explain
from shared.run.interruption import forgiving_output
from shared.threads import end_process


def main(arguments: list[str]) -> int:
    with forgiving_output():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    if not arguments:
        from shared.config.demo import demo_arguments

        arguments = demo_arguments()
    config = parse_command_line(arguments, "torch")

    from shared.run.lost_process import LostProcessError, end_after_lost_process
    from torch_trainer.train import train  # here, so that --help and mistakes in flags need not wait for PyTorch

    try:
        return train(config)
    except ValueError as error:
        return explain(error)
    except LostProcessError as error:
        end_after_lost_process(error)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
