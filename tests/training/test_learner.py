"""Values given to a learner are of the right length and finite, the largest numbers there are among them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.learner import all_finite, check_values

LARGEST = torch.finfo(torch.float32).max


@given(
    values=st.lists(st.floats(width=32) | st.sampled_from([LARGEST, -LARGEST, math.nan, math.inf, -math.inf]))
)
def test_finite_is_what_every_element_is(values: list[float]) -> None:
    assert all_finite(torch.tensor(values)) == all(map(math.isfinite, values))


def test_a_sum_that_overflows_does_not_make_its_terms_infinite() -> None:
    assert all_finite(torch.full((1000,), LARGEST))
    assert not all_finite(torch.tensor([LARGEST, LARGEST, math.inf, -math.inf]))


@pytest.mark.parametrize("values", [torch.zeros(3), torch.zeros(4, 1), torch.tensor([0, 0, 0, math.nan])])
def test_what_may_not_enter_weights_is_refused(values: torch.Tensor) -> None:
    check_values(torch.zeros(4), 4)
    with pytest.raises(ValueError, match=r"shape|finite"):
        check_values(values, 4)
