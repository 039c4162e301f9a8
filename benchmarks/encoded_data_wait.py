"""How long a training waits for batches from a cache, beside steps that leave the processors alone, as those of an
accelerator do.

    python3 -m benchmarks.encoded_data_wait --cached_data CACHE --resolution 64 [--step_ms 10 30 130] [--threads 0 1]

CACHE was made of --pretrained_model_name_or_path. In place of a step stands a sleep. All lengths and numbers of threads
take turns, --rounds times.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import islice, product

from shared.config import TrainConfig
from shared.config.demo import BASE_MODEL
from shared.data.batches import BatchLoader, BatchSpec
from shared.data.sources import open_source
from shared.data.sources.base import RandomAccessSource, latents_of
from shared.data.tokenization import PromptInputs
from shared.precomputed_text.precomputing import ALONE, TextEncoder, precompute_text
from shared.run.setup import prompt_inputs_of

_BATCH = 8
_WARM_UP = 10  # steps that do not count


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached_data", required=True)
    parser.add_argument("--pretrained_model_name_or_path", default=BASE_MODEL)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--step_ms", type=float, nargs="+", default=[10, 30, 130])
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=200, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(words)
    config = TrainConfig(
        pretrained_model_name_or_path=arguments.pretrained_model_name_or_path,
        cached_data=arguments.cached_data,
        resolution=arguments.resolution,
    )
    source = open_source(config)
    assert isinstance(source, RandomAccessSource)
    tokens = prompt_inputs_of(config, is_xl=False)
    encoded = precompute_text(config, "flax", [source], tokens, _no_encoder, ALONE)
    sides = list(product(arguments.step_ms, arguments.threads))
    waits: dict[tuple[float, int], list[float]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for step_ms, threads in sides:
            loader = _loader(config, source, PromptInputs(tokens.tokenize, encoded=encoded), threads)
            waits[step_ms, threads].append(mean_wait(loader, step_ms, arguments.steps))
            loader.close()
    print("| step | threads | waiting for a batch | of the whole |\n|---|---|---|---|")
    for (step_ms, threads), means in waits.items():
        wait = statistics.median(means)
        print(f"| {step_ms:g} ms | {threads} | {wait:.2f} ms | {wait / (wait + step_ms):.1%} |")


def mean_wait(loader: BatchLoader, step_ms: float, steps: int) -> float:
    """Milliseconds, of a step."""
    waited, batches = [], iter(loader)
    for _ in range(_WARM_UP + steps):
        since = time.perf_counter()
        next(batches)
        waited.append(1000 * (time.perf_counter() - since))
        time.sleep(step_ms / 1000)
    return statistics.fmean(islice(waited, _WARM_UP, None))


def _loader(config: TrainConfig, source: RandomAccessSource, inputs: PromptInputs, threads: int) -> BatchLoader:
    latents = latents_of(source)
    assert latents is not None
    return BatchLoader(source, config, inputs, BatchSpec(_BATCH), latents.shape, 1000, default_workers=threads)


def _no_encoder() -> TextEncoder:
    raise SystemExit("The cache lacks captions encoded by JAX for this model: make it with --backend flax.")


if __name__ == "__main__":
    main()
