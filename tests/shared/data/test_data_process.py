"""What only a process of its own can show."""

import signal
import subprocess
import sys
import time

WITHOUT_FRAMEWORKS = """
import sys
sys.modules["torch"] = sys.modules["jax"] = sys.modules["flax"] = None
import shared.data.batches, shared.data.sources.huggingface, shared.data.sources.shards, shared.data.sources.circles
import webdataset.gopen, webdataset.tariterators
print("imported")
"""

HANGING = """
import time
from tests.shared.data.pictures import config, loader

class Hanging:
    manifest = {"location": "a mount that never answers"}
    def __len__(self):
        return 4
    def __getitem__(self, index):
        print("reading\\n", end="", flush=True)  # in one write: two threads print
        time.sleep(3600)

next(iter(loader(config(dataloader_num_workers=2), source=Hanging())))
"""


def test_the_data_layer_needs_neither_torch_nor_jax() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_FRAMEWORKS], capture_output=True, text=True, check=True)
    assert done.stdout == "imported\n"


def test_ctrl_c_ends_a_process_whose_workers_hang() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        time.sleep(0.5)  # until the main thread waits for the workers
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert "KeyboardInterrupt" in errors
