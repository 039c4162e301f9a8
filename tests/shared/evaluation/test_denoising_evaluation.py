from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.preprocessing import preprocess
from shared.data.sample import RawSample
from shared.data.sources.circles import CirclesSource
from shared.diffusion.samplers import initial_latents
from shared.evaluation.denoising import DenoisingEvaluation, ValidationSample, read_samples
from tests.shared.data.pictures import LATENT_SHAPE, captions_in, config, loader, png, tokenize

RESOLUTION = 32


def raw_samples(count: int) -> list[RawSample]:
    return [RawSample(png(i, 40, 32), png(100 + i, 40, 32), (f"caption {i}", "another"), f"{i}") for i in range(count)]


def samples(count: int) -> list[ValidationSample]:
    pixels = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    return [ValidationSample(pixels + index, pixels + 100 + index, f"caption {index}") for index in range(count)]


def evaluation(count: int = 5, **changes: Any) -> DenoisingEvaluation:
    arguments = {"seed": 7, "batch_size": 8, "latent_shape": LATENT_SHAPE, "num_train_timesteps": 1000}
    return DenoisingEvaluation(samples(count), tokenize, **(arguments | changes))


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
    raw[1] = RawSample(b"no image", raw[1].conditioning_image, ("x",), "the broken one")
    read = read_samples(iter(raw), 3, config(resolution=RESOLUTION))
    assert [sample.caption for sample in read] == ["caption 0", "caption 2", "caption 3"]
    assert "the broken one" in caplog.text
    assert isinstance(raw[2].image, bytes)
    np.testing.assert_array_equal(read[1].pixels, preprocess(raw[2].image, RESOLUTION, "lanczos"))


def test_a_source_is_read_no_further_than_needed() -> None:
    def endless() -> Any:
        yield from raw_samples(3)
        raise AssertionError

    assert len(read_samples(endless(), 2, config(resolution=RESOLUTION))) == 2
    source = CirclesSource(3, RESOLUTION, seed=1)
    circles = read_samples((source[index] for index in range(3)), 3, config(resolution=RESOLUTION))
    np.testing.assert_array_equal(circles[2].pixels, np.asarray(source[2].image))


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 usable samples and 3 were asked for"):
        read_samples(raw_samples(2), 3, config(resolution=RESOLUTION))
    missing = [RawSample(tmp_path / f"{index}.png", None, ("x",), f"{index}") for index in range(9)]
    with pytest.raises(ValueError, match="max_skipped_samples=3"):
        read_samples(missing, 1, config(resolution=RESOLUTION))
    with pytest.raises(ValueError, match="empty"):
        evaluation(0)
    with pytest.raises(ValueError, match="batch size is 0"):
        evaluation(batch_size=0)
    with pytest.raises(ValueError, match="11 timestep bins were asked for; expected 1 to 10"):
        evaluation(num_train_timesteps=10, bins=11)
    with pytest.raises(ValueError, match=r"are \(\); expected \(8,\)"):
        evaluation().run(lambda batch: np.float32(0.5))  # type: ignore[arg-type, return-value]
