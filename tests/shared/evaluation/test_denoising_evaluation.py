from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.decoded_pairs import DecodedPair
from shared.data.preprocessing import preprocess
from shared.data.sample import RawSample
from shared.data.sources import open_sources
from shared.data.tokenization import PromptInputs, XLInputs
from shared.diffusion.samplers import initial_latents
from shared.evaluation.denoising import DenoisingEvaluation, ValidationSample, read_samples
from shared.randomness import Purpose, generator
from tests.shared.data.pictures import LATENT_SHAPE, captions_in, config, loader, png, tokenize

RESOLUTION = 32
SIZES = (32, 4, 0, 32, 32)  # but for the height, which tells the samples apart


def raw_samples(count: int) -> list[RawSample]:
    return [
        RawSample(png(i, 40, 32), (png(100 + i, 40, 32),), (f"caption {i}", "another"), f"{i}") for i in range(count)
    ]


def samples(count: int) -> list[ValidationSample]:
    pixels = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    return [
        ValidationSample(
            index,
            DecodedPair(
                {"pixel_values": pixels + index, "conditioning_pixel_values": pixels + 100 + index},
                (40 + index, 32, 4, 0, 32, 32),
            ),
            f"caption {index}",
        )
        for index in range(count)
    ]


class MemorySource:
    """Random access to samples that stand in memory."""

    def __init__(self, raw: list[RawSample]) -> None:
        self.raw = raw
        self.manifest: dict[str, Any] = {"location": "memory", "samples": len(raw)}

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> RawSample:
        return self.raw[index]


def evaluation(count: int = 5, **changes: Any) -> DenoisingEvaluation:
    arguments = {"seed": 7, "batch_size": 8, "latent_shape": LATENT_SHAPE, "num_train_timesteps": 1000}
    return DenoisingEvaluation(samples(count), PromptInputs(tokenize), **(arguments | changes))


def test_xl_is_told_of_each_samples_own_sizes() -> None:
    own = PromptInputs(tokenize, XLInputs(tokenize, None))
    made = DenoisingEvaluation(samples(3), own, 7, 8, LATENT_SHAPE, 1000)
    for position, row in rows_of(made).items():
        assert row["time_ids"].tolist() == [40 + position // 4, *SIZES]


def rows_of(made: DenoisingEvaluation) -> dict[int, dict[str, np.ndarray]]:
    """Every row by its position."""
    return {
        int(batch["position"][row]): {name: array[row] for name, array in batch.items()}
        for batch in made.batches()
        for row in range(len(batch["position"]))
    }


def test_batches_keep_the_contract_of_training_batches() -> None:
    training = loader(config(generated_circles=20)).batch(0)
    for batch in evaluation(5, batch_size=8).batches():
        assert batch.keys() == training.keys()
        for name, array in batch.items():
            assert array.dtype == training[name].dtype, name
            assert array.shape == training[name].shape[1:], name


def test_every_sample_meets_every_bin_with_noise_of_its_own() -> None:
    rows = rows_of(evaluation(40))
    assert sorted(rows) == list(range(160))
    for position, row in rows.items():
        sample, bin_ = divmod(position, 4)
        assert row["timesteps"] // 250 == bin_
        assert row["pixel_values"].max() == sample
        assert row["conditioning_pixel_values"].min() == 100 + sample
        assert captions_in({"input_ids": row["input_ids"]}) == [f"caption {sample}"]
    timesteps = np.array([row["timesteps"] for row in rows.values()])
    assert len(set(timesteps.tolist())) > 130
    noise = np.stack([row[name].ravel() for row in rows.values() for name in ("noise", "vae_noise")])
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert np.abs(np.corrcoef(noise)[~np.eye(len(noise), dtype=bool)]).max() < 0.6  # 64 numbers each: 5 deviations


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 30))
def test_rows_do_not_depend_on_how_they_are_batched(bins: int, count: int, batch_size: int) -> None:
    one = rows_of(evaluation(count, bins=bins, batch_size=1))
    other = rows_of(evaluation(count, bins=bins, batch_size=batch_size))
    assert one.keys() == other.keys()
    for position, row in one.items():
        for name, array in row.items():
            np.testing.assert_array_equal(array, other[position][name])


def test_seeds_differ_and_runs_repeat() -> None:
    first, again, other = (rows_of(evaluation(2, seed=seed))[3] for seed in (7, 7, 8))
    np.testing.assert_array_equal(first["noise"], again["noise"])
    assert (first["noise"] != other["noise"]).all()


def test_draws_are_those_of_the_evaluations_own_generators() -> None:
    """Of seed, purpose and row alone: first the timestep within its bin, then the VAE's noise, then the step's."""
    for position, row in rows_of(evaluation(3)).items():
        rng = generator(7, Purpose.EVALUATION, position)
        first = position % 4 * 250
        assert row["timesteps"] == rng.integers(first, first + 250)
        for name in ("vae_noise", "noise"):
            np.testing.assert_array_equal(row[name], rng.standard_normal(LATENT_SHAPE, np.float32))


def test_no_noise_is_that_of_training() -> None:
    trained = [batch for _, (_, batch) in zip(range(3), loader(config(generated_circles=20)).iterate(), strict=False)]
    seen = {
        noise.tobytes()
        for batch in trained
        for name in ("noise", "vae_noise")
        for noise in batch[name].reshape(-1, *LATENT_SHAPE)
    }
    assert len(seen) == 2 * 3 * 8
    rows = rows_of(evaluation(6)).values()
    assert not seen & {row[name].tobytes() for row in rows for name in ("noise", "vae_noise")}


def test_no_noise_is_that_of_the_sampler() -> None:
    sampled = initial_latents(7, range(20), LATENT_SHAPE)
    rows = rows_of(evaluation(5))
    for start in sampled:
        assert all((start != row[name]).all() for row in rows.values() for name in ("noise", "vae_noise"))


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20, 64])
def test_losses_are_averaged_over_rows_overall_and_by_bin(batch_size: int) -> None:
    losses = evaluation(5, batch_size=batch_size).run(lambda batch: batch["position"] ** 2)
    squares = np.arange(20.0) ** 2
    assert losses == pytest.approx(
        {
            "validation_loss": squares.mean(),
            "validation_loss_t000-249": squares[0::4].mean(),
            "validation_loss_t250-499": squares[1::4].mean(),
            "validation_loss_t500-749": squares[2::4].mean(),
            "validation_loss_t750-999": squares[3::4].mean(),
        }
    )


def test_float16_losses_are_averaged_in_full_precision() -> None:
    losses = evaluation(5).run(lambda batch: np.full(8, 60000, np.float16))
    assert losses["validation_loss"] == 60_000  # a half-precision sum of two would overflow


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 1000), st.data())
def test_bins_cover_all_timesteps_once(num_train_timesteps: int, data: st.DataObject) -> None:
    bins = data.draw(st.integers(1, min(num_train_timesteps, 12)))
    made = evaluation(1, num_train_timesteps=num_train_timesteps, bins=bins)
    names = list(made.run(lambda batch: batch["position"]))[1:]
    ranges = [tuple(map(int, name.removeprefix("validation_loss_t").split("-"))) for name in names]
    assert [t for first, last in ranges for t in range(first, last + 1)] == list(range(num_train_timesteps))
    assert len({len(name) for name in names}) == 1
    for position, row in rows_of(made).items():
        first, last = ranges[position % bins]
        assert first <= row["timesteps"] <= last


def test_samples_are_read_as_training_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    raw = raw_samples(6)
    raw[1] = RawSample(b"no image", raw[1].conditioning_images, ("x",), "the broken one")
    raw[4] = RawSample(raw[4].image, raw[4].conditioning_images, (), "the one without words")
    read = read_samples(MemorySource(raw), config(resolution=RESOLUTION))
    assert [sample.caption for sample in read] == ["caption 0", "caption 2", "caption 3", "caption 5"]
    assert [sample.index for sample in read] == [0, 2, 3, 5]
    assert "the broken one" in caplog.text
    assert "the one without words" in caplog.text
    for sample in read:
        for pixels, encoded in (
            (sample.pixels, raw[sample.index].image),
            (sample.conditioning_pixels, raw[sample.index].conditioning_images[0]),
        ):
            assert isinstance(encoded, bytes)
            np.testing.assert_array_equal(pixels, preprocess(encoded, RESOLUTION, "lanczos"))


def test_all_that_is_held_out_is_read() -> None:
    _, held_out = open_sources(config(generated_circles=9, num_evaluation_samples=4))
    assert held_out is not None
    read = read_samples(held_out, config(resolution=RESOLUTION))
    assert [sample.index for sample in read] == [0, 1, 2, 3]
    for sample in read:
        np.testing.assert_array_equal(sample.pixels, np.asarray(held_out[sample.index].image))


@given(broken=st.sets(st.integers(0, 5)), limit=st.integers(0, 6))
def test_samples_that_are_left_keep_their_places(broken: set[int], limit: int) -> None:
    raw = raw_samples(6)
    for index in broken:
        raw[index] = RawSample(None, raw[index].conditioning_images, ("x",), f"bad {index}")
    training = config(resolution=RESOLUTION, max_skipped_samples=limit)
    if len(broken) > limit:
        with pytest.raises(ValueError, match=f"max_skipped_samples={limit}"):
            read_samples(MemorySource(raw), training)
    elif len(broken) == 6:
        with pytest.raises(ValueError, match="None of the 6 held-out samples can be read"):
            read_samples(MemorySource(raw), training)
    else:
        read = read_samples(MemorySource(raw), training)
        assert [(sample.index, sample.caption) for sample in read] == [
            (index, f"caption {index}") for index in range(6) if index not in broken
        ]


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    missing = [RawSample(tmp_path / f"{index}.png", (None,), ("x",), f"{index}") for index in range(9)]
    with pytest.raises(ValueError, match=r"None of the 3 held-out samples can be read\. Repair the data, or hold out"):
        read_samples(MemorySource(missing[:3]), config(resolution=RESOLUTION))
    with pytest.raises(ValueError, match="max_skipped_samples=3"):
        read_samples(MemorySource(missing + raw_samples(2)), config(resolution=RESOLUTION))
    with pytest.raises(ValueError, match="empty"):
        evaluation(0)
    with pytest.raises(ValueError, match="batch size is 0"):
        evaluation(batch_size=0)
    with pytest.raises(ValueError, match="11 timestep bins were asked for; expected 1 to 10"):
        evaluation(num_train_timesteps=10, bins=11)
    with pytest.raises(ValueError, match=r"are \(\); expected \(8,\)"):
        evaluation().run(lambda batch: np.float32(0.5))  # type: ignore[arg-type, return-value]
