"""`python3 -m shared.prepare_data`: see `shared.prepare_data.command.SUBCOMMANDS`."""

import sys

from shared.prepare_data.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
