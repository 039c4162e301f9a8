"""An order is a permutation of (seed, purpose, position), whether it is drawn whole or computed place by place."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import TrainConfig
from shared.data.candidates import ShuffledCandidates
from shared.data.sources import RandomAccessSource, open_sources, order
from shared.data.sources.circles import CirclesSource
from shared.data.sources.order import LARGEST_HELD, AllBut, KeyedOrder, beginning, random_order
from shared.randomness import Purpose, generator


@settings(max_examples=60)
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**20))
def test_a_computed_order_has_every_index_once(count: int, seed: int, position: int) -> None:
    computed = KeyedOrder(count, seed, Purpose.ORDER, position)
    assert len(computed) == count
    assert sorted(computed) == list(range(count))
    again = KeyedOrder(count, seed, Purpose.ORDER, position)
    assert [again[place] for place in range(count)] == list(computed)
    assert list(beginning(computed, 7)) == list(computed)[:7]


def test_computed_orders_look_drawn() -> None:
    """Each cell of a 20 by 20 table of (place, index), and of steps from one index to the next, is filled as by chance:
    chi-square of 399 degrees of freedom is below 514 in all but one of 10,000 cases."""
    count = 10_000_000
    places = np.arange(0, count, 499)
    for purpose, position in ((Purpose.ORDER, 0), (Purpose.ORDER, 1), (Purpose.SUBSET, 0)):
        computed = KeyedOrder(count, 3, purpose, position)
        indices = np.array([computed[int(place)] for place in places])
        following = np.array([computed[place] for place in range(len(places))])
        for x, y in ((places, indices), (following[:-1], following[1:]), (indices % 20 * count // 20, indices)):
            table, _, _ = np.histogram2d(x, y, 20, ((0, count), (0, count)))
            expected = len(x) / 400
            assert ((table - expected) ** 2 / expected).sum() < 514


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [KeyedOrder(1000, seed, Purpose.ORDER, epoch) for seed in range(3) for epoch in range(3)]
    orders.append(KeyedOrder(1000, 0, Purpose.SUBSET, 0))
    for one, other in itertools.combinations(orders, 2):
        agreeing = sum(a == b for a, b in zip(one, other, strict=True))
        assert agreeing < 10  # of two random permutations, one place agrees on average


def test_the_order_of_what_can_be_held_is_what_it_always_was() -> None:
    np.testing.assert_array_equal(
        random_order(1000, 5, Purpose.ORDER, 2), generator(5, Purpose.ORDER, 2).permutation(1000)
    )
    assert isinstance(random_order(LARGEST_HELD, 0, Purpose.ORDER, 0), np.ndarray)
    assert isinstance(random_order(LARGEST_HELD + 1, 0, Purpose.ORDER, 0), KeyedOrder)


@given(count=st.integers(1, 200), data=st.data())
def test_all_but_some_are_the_others_in_rising_order(count: int, data: st.DataObject) -> None:
    left_out = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=count))
    rest = AllBut(count, np.array(left_out, np.int64))
    assert [rest[place] for place in range(len(rest))] == sorted(set(range(count)) - set(left_out))
    with pytest.raises(IndexError):
        rest[len(rest)]


def test_beyond_what_is_held_samples_are_divided_and_visited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(generated_circles=60, resolution=16, num_evaluation_samples=10, max_train_samples=35, seed=4)
    held = open_sources(config)[0].manifest
    monkeypatch.setattr(order, "LARGEST_HELD", 20)
    train, held_out = open_sources(config)
    assert isinstance(train, RandomAccessSource)
    assert held_out is not None
    trained = {train[index].name for index in range(len(train))}
    kept = {held_out[index].name for index in range(len(held_out))}
    assert (len(trained), len(kept)) == (35, 10)
    assert not trained & kept
    assert train.manifest == held | {"order": "computed"}, "a run with the order that was held is not continued"
    candidates = ShuffledCandidates(train, config.seed)
    for epoch in range(2):
        visited = [next(candidates.at(epoch * 35 + place)).name for place in range(35)]
        assert set(visited) == trained
        assert visited != [train[index].name for index in range(35)]
    whole, _ = open_sources(dataclasses.replace(config, num_evaluation_samples=0, max_train_samples=None))
    assert isinstance(whole, CirclesSource)
    assert whole.manifest["order"] == "computed"
