"""Which weights a model has, told by their content."""

import hashlib
import json

from shared.models.source import CONFIG_FILE, ModelSource
from shared.models.weight_files import WeightNames, weight_files
from shared.untrusted import open_file, sha256_from


def digests_of_model(source: ModelSource, names: WeightNames) -> dict[str, str]:
    """SHA-256 of `config.json` and of every weight file, by name.

    Raises:
        UserError: one is missing, or cannot be read.
    """
    folder = source.folder(names)
    digests = {}
    for path in (folder / CONFIG_FILE, *weight_files(folder, names, source.variant)):
        with open_file(path) as file:
            digests[path.name] = sha256_from(file.fileno())
    return digests


def digest_of(facts: object) -> str:
    """One for anything that JSON can tell, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
