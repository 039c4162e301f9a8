import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.randomness import Purpose, generator

seeds = positions = st.integers(0, 2**64 - 1)
purposes = st.sampled_from(Purpose)


@given(seeds, purposes, positions)
def test_a_draw_is_a_pure_function_of_its_key(seed: int, purpose: Purpose, position: int) -> None:
    np.testing.assert_array_equal(
        generator(seed, purpose, position).standard_normal(5), generator(seed, purpose, position).standard_normal(5)
    )


@given(st.lists(st.tuples(seeds, purposes, positions), min_size=2, max_size=6, unique=True))
def test_different_keys_give_different_numbers(keys: list[tuple[int, Purpose, int]]) -> None:
    draws = {generator(*key).bytes(32) for key in keys}
    assert len(draws) == len(keys)


@given(seeds, positions, st.integers(0, 50))
def test_drawing_more_for_one_purpose_changes_no_other(seed: int, position: int, extra: int) -> None:
    alone = generator(seed, Purpose.TIMESTEP, position).integers(1000, size=4)
    noise = generator(seed, Purpose.NOISE, position)
    noise.standard_normal(extra)
    after = generator(seed, Purpose.TIMESTEP, position).integers(1000, size=4)
    np.testing.assert_array_equal(alone, after)


def test_neighbouring_positions_never_meet() -> None:
    """With the position in the low counter words, position 1 would begin four numbers into position 0."""
    long = generator(3, Purpose.NOISE, 0).integers(2**63, size=40_000)
    assert not set(generator(3, Purpose.NOISE, 1).integers(2**63, size=1000)) & set(long)


def test_streams_are_uncorrelated_standard_normals() -> None:
    draws = np.stack([generator(0, Purpose.NOISE, position).standard_normal(4096) for position in range(64)])
    assert abs(draws.mean()) < 0.01
    assert abs(draws.std() - 1) < 0.01
    correlations = np.corrcoef(draws)[~np.eye(64, dtype=bool)]
    assert np.abs(correlations).max() < 0.08  # five standard deviations of 1/sqrt(4096)


def test_numbers_of_today_stay_the_numbers_of_tomorrow() -> None:
    """Philox4x64-10 computed by hand from Salmon et al. 2011, so a run can be repeated on any numpy."""
    raw = generator(5, Purpose.NOISE, 9).bit_generator.random_raw(4)
    np.testing.assert_array_equal(raw, _philox((1, 0, 9, 0), (5, int(Purpose.NOISE))))


def test_purposes_are_distinct_and_found_by_name() -> None:
    assert len({purpose.value for purpose in Purpose}) == len(Purpose.__members__)
    assert generator(1, "vae_noise", 2).random() == generator(1, Purpose.VAE_NOISE, 2).random()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "lunch", 0), "unknown purpose 'lunch'; use one of ORDER"),
        ((0, 5, 0), "unknown purpose 5"),
        ((-1, "NOISE", 0), "seed is -1; expected an integer from 0"),
        ((0, "NOISE", 2**64), "position is 18446744073709551616"),
    ],
)
def test_mistakes_are_named(arguments: tuple[int, str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator(*arguments)


def _philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    word = 2**64
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (second // word) ^ c1 ^ k0, second % word, (first // word) ^ c3 ^ k1, first % word
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return [c0, c1, c2, c3]
