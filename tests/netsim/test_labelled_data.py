"""Dealing out gives nothing twice and makes machines as unlike as asked; the same seed deals the same."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netsim.labelled_data import dealt, digits, preferring
from training.data import DataError
from training.labelled import Examples, LabelledBatches, LabelledData


def numbered(examples: int, classes: int) -> LabelledData:
    """Examples that can be told apart by their one feature."""
    x = np.arange(examples, dtype=np.float32)[:, None]
    return LabelledData.of(Examples(x, np.arange(examples) % classes))


def classes_of(parts: list[LabelledData]) -> float:
    """The mean number of classes that a machine has."""
    return sum(len(set(part.train.y.tolist())) for part in parts) / len(parts)


@settings(deadline=None, max_examples=60)
@given(
    machines=st.integers(1, 40),
    classes=st.integers(2, 12),
    alpha=st.none() | st.sampled_from([1e-9, 1e-3, 0.1, 1.0, 1e6]),
    seed=st.integers(0, 2**32),
)
def test_every_example_goes_to_one_machine_at_most_and_every_machine_gets_its_share(
    machines: int, classes: int, alpha: float | None, seed: int
) -> None:
    data = numbered(200, classes)
    parts = dealt(data, machines, alpha=alpha, rng=random.Random(seed))
    given_out = [value for part in parts for value in part.train.x[:, 0].tolist()]
    assert len(set(given_out)) == len(given_out)
    assert set(given_out) <= set(data.train.x[:, 0].tolist())
    assert {len(part.train) for part in parts} <= {
        len(data.train) // machines,
        len(data.train) // machines + 1,
    }
    assert all(part.held_out is data.held_out for part in parts)
    assert all((part.train.x[:, 0] % classes == part.train.y).all() for part in parts)


def test_the_smaller_alpha_the_fewer_classes_a_machine_has() -> None:
    spread = [
        classes_of(dealt(digits(), 16, alpha=alpha, rng=random.Random(1)))
        for alpha in (0.01, 0.1, 1.0, 100.0)
    ]
    assert spread == sorted(spread)
    assert spread[0] < 3
    assert spread[1] < 6
    assert spread[3] > 9.5
    assert classes_of(dealt(digits(), 16, alpha=None, rng=random.Random(1))) > 9.9


def test_the_same_seed_deals_the_same_and_another_does_not() -> None:
    def deal(seed: int, alpha: float | None) -> list[bytes]:
        return [part.train.x.tobytes() for part in dealt(digits(), 8, alpha=alpha, rng=random.Random(seed))]

    for alpha in (None, 0.1):
        assert deal(1, alpha) == deal(1, alpha) != deal(2, alpha)


def test_more_machines_than_examples_are_refused() -> None:
    data = numbered(20, 2)
    with pytest.raises(DataError, match="cannot be dealt out among 21"):
        dealt(data, 21, alpha=None, rng=random.Random(0))


def test_a_machine_with_a_preference_draws_by_it_from_all_of_the_data() -> None:
    parts = preferring(digits(), 20, alpha=0.1, rng=random.Random(3))
    preferences = [part.preference for part in parts]
    assert len(set(preferences)) == 20
    assert preferences == [
        part.preference for part in preferring(digits(), 20, alpha=0.1, rng=random.Random(3))
    ]
    part = parts[0]
    assert part.preference is not None
    assert sum(part.preference) == pytest.approx(1)
    batches = LabelledBatches(part.train, seed=b"s", batch=2000, preference=part.preference)
    drawn = np.bincount(batches.at(0).y, minlength=10) / 2000
    assert np.abs(drawn - np.array(part.preference)).max() < 0.05


def test_the_digits_are_all_there_and_standardised() -> None:
    data = digits()
    assert len(data.train) + len(data.held_out) == 1797
    pixels = np.concatenate([data.train.x, data.held_out.x])
    assert (pixels.mean(), pixels.std()) == pytest.approx((0, 1), abs=1e-6)
    assert len(set(pixels[:, 0].tolist())) == 1  # a corner is white in all of them
    assert set(data.held_out.y.tolist()) == set(range(10))
