"""What others wrote (models, checkpoints, data, the folders of runs) is data: read within bounds, never executed, never
followed out of its folder, escaped wherever it is shown."""

from shared.untrusted.border import foreign_library, unpickling
from shared.untrusted.documents import parse_json, read_json
from shared.untrusted.files import (
    MIB,
    check_plain_files,
    check_plain_tree,
    is_inside,
    open_file,
    read_file,
    sha256_from,
)
from shared.untrusted.text import shown

__all__ = [
    "MIB",
    "check_plain_files",
    "check_plain_tree",
    "foreign_library",
    "is_inside",
    "open_file",
    "parse_json",
    "read_file",
    "read_json",
    "sha256_from",
    "shown",
    "unpickling",
]
