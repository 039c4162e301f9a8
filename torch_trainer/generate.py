"""Draw pictures with a ControlNet in PyTorch: `python3 -m torch_trainer.generate --help` lists every flag."""

import sys

from shared.generate.command import print_help, read_command, wants_help
from shared.outgoing.messages import explain
from shared.run.interruption import forgiving_output

INTERRUPTED = 130


def main(words: list[str]) -> int:
    """0: the pictures are there; 2: a mistake of the user, told in a sentence; 130: Ctrl-C; 1: a defect."""
    with forgiving_output():
        try:
            return _generate(words)
        except ValueError as error:
            return explain(error)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return INTERRUPTED


def _generate(words: list[str]) -> int:
    if wants_help(words):
        print_help("torch")
        return 0
    config = read_command(words)
    from shared.generate.pictures import generate  # here, so that mistakes in flags need not wait for libraries
    from shared.generate.preparation import prepare_job
    from shared.run.setup import set_up_logging

    set_up_logging("torch_trainer")
    job = prepare_job(config, "torch")
    from torch_trainer.evaluation.artist import make_artist  # here, so that other mistakes need not wait for PyTorch

    generate(job, make_artist(job))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
