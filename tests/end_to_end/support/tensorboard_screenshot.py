"""TensorBoard's trace viewer, `python3 -m tests.end_to_end.support.tensorboard_screenshot OUTPUT_DIR FILE.png`."""

import argparse
import asyncio
from pathlib import Path

from tests.end_to_end.support.browser import chromium, new_page
from tests.end_to_end.support.tensorboard_server import tensorboard, trace_viewer


async def photograph(output_dir: Path, file: Path) -> None:
    """Of the first trace of a run on a CPU that was profiled."""
    program = chromium()
    assert program is not None, "no Chromium is installed"
    with tensorboard(output_dir / "logs") as server:
        async with new_page(program) as page:
            await page.open(trace_viewer(server, server.get_json("data/plugin/profile/runs")[0]))
            await page.text_once_it_has("parts of the model", "python")
            await asyncio.sleep(2)  # for the drawing, which is no text
            file.write_bytes(await page.screenshot())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    asyncio.run(photograph(arguments.output_dir, arguments.file))
