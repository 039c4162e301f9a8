"""ControlNet's fill50k layout: `prompt.json` with a line {"source", "target", "prompt"} per pair.

Reference: Zhang et al., ControlNet repository, docs/train.md. `source` is the condition, `target` the image.
"""

from pathlib import Path

from shared.data.sources.json_lines import JsonLinesSource, Keys
from shared.data.sources.named_files import NamedFiles
from shared.untrusted import shown
from shared.user_errors import UserError

KEYS = Keys(image="target", conditioning_image="source", caption="prompt")


def open_prompt_json(folder: Path, files: NamedFiles) -> JsonLinesSource:
    """The pairs of `folder/prompt.json`. UserError when the list is malformed, empty, or has other keys."""
    source = JsonLinesSource("prompt_json", folder / "prompt.json", KEYS, files)
    first = source[0]
    if not first.defect and (first.image is None or first.conditioning_image is None):
        raise UserError(
            f'the first line of {shown(folder / "prompt.json")} lacks "source" or "target"; expected lines like '
            '{"source": "source/0.png", "target": "target/0.png", "prompt": "a caption"}'
        )
    return source
