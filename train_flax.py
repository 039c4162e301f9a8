#!/usr/bin/env python3
"""Train a ControlNet in JAX/Flax. `--help` lists every flag; without flags the built-in demo runs."""

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
    config = parse_command_line(arguments, "flax")

    from flax_trainer.distributed.processes import end_after_error
    from flax_trainer.train import train  # here, so that --help and mistakes in flags need not wait for JAX

    try:
        return train(config)
    except ValueError as error:
        return end_after_error(explain(error))
    except SystemExit:  # nobody reads what it says, and there is nothing to save yet
        return end_after_error(0)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return end_after_error(130)


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
