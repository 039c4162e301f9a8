"""What `python3 -m shared.prepare_data` hands to PyTorch: the same words, `annotate …` or `caption …`."""

import sys

from torch_trainer.prepare_data.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
