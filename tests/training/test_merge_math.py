"""The exact average equals rational arithmetic rounded as promised, and its bits depend on nothing but the inputs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from training.merge_math import CHUNK, weighted_average, weights_hash

numbers = st.floats(width=32, min_value=-100, max_value=100, allow_subnormal=False)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@given(
    st.lists(st.tuples(numbers, st.integers(1, 2**20)), min_size=1, max_size=8),
)
def test_an_average_is_the_rational_average_rounded_to_fp32(inputs: list[tuple[float, int]]) -> None:
    average = weighted_average([(torch.tensor([value]), weight) for value, weight in inputs])
    exact = sum(Fraction(value) * weight for value, weight in inputs) / sum(weight for _, weight in inputs)
    largest = max(abs(value) for value, _ in inputs)
    assert abs(Fraction(average.item()) - exact) <= abs(exact) * Fraction(2**-24) + Fraction(
        largest
    ) * Fraction(2**-49) + Fraction(2**-149)


def test_the_operations_are_the_ones_promised_in_their_order() -> None:
    inputs = [(0.1, 3), (0.7, 5), (-1.3, 11)]
    rounded = [(struct.unpack("f", struct.pack("f", value))[0], weight) for value, weight in inputs]
    total = 0.0
    for value, weight in rounded:
        total = total + value * float(weight)  # Python's floats are fp64 and never fused
    expected = torch.tensor([total / 19.0])
    assert torch.equal(
        weighted_average([(torch.tensor([value]), weight) for value, weight in inputs]), expected
    )


@pytest.mark.usefixtures("restored_threads")
def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(3 * CHUNK + 17, generator=generator), 1000 + index) for index in range(4)]
    hashes = set()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        hashes.add(weights_hash(weighted_average(inputs)))
    assert len(hashes) == 1


def test_equal_inputs_average_to_themselves_and_inputs_are_left_alone() -> None:
    values = torch.randn(CHUNK + 1, generator=torch.Generator().manual_seed(1))
    before = values.clone()
    assert torch.equal(weighted_average([(values, 7), (values, 13)]), values)
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [(torch.ones(2), 0)],
        [(torch.ones(2), -1), (torch.ones(2), 3)],
        [(torch.ones(2), 2**53), (torch.ones(2), 1)],
        [(torch.ones(2), 1), (torch.ones(3), 1)],
    ],
)
def test_what_cannot_be_averaged_is_refused(inputs: list[tuple[torch.Tensor, int]]) -> None:
    with pytest.raises(ValueError, match="average"):
        weighted_average(inputs)


def test_weights_are_hashed_as_little_endian_fp32() -> None:
    assert weights_hash(torch.tensor([1.0, -2.0])) == blake3(struct.pack("<2f", 1.0, -2.0)).digest()
