#!/usr/bin/env python3
"""Train a ControlNet in JAX/Flax. `--help` lists every flag; without flags the built-in demo runs."""

import sys

from shared.config import parse_command_line


def main(arguments: list[str]) -> int:
    from flax_trainer.demo import prepare_demo
    from flax_trainer.train import train
    from shared.user_errors import explain

    try:
        config = parse_command_line(arguments or prepare_demo(), "flax")
        return train(config)
    except ValueError as error:
        return explain(error)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
