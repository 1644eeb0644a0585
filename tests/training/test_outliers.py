"""Whose values are left out of an average, and whose are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.outliers import AGREEMENT_MIN, DISTANCES_KEPT, FAR_MIN, FARTHER_MAX, NORM_MAX, Distances, unlike

SIZE = 4096


def noise(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def honest(count: int, agreement: float) -> list[Tensor]:
    """Contributions whose pairwise cosine is about ``agreement``."""
    common = noise(999)
    return [agreement**0.5 * common + (1 - agreement) ** 0.5 * noise(number) for number in range(count)]


@pytest.mark.parametrize("agreement", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [2, 3, 4, 8, 40])
def test_honest_contributions_are_all_kept(count: int, agreement: float) -> None:
    assert unlike(honest(count, agreement), [100] * count) == {}


@pytest.mark.parametrize("size", [0.1, 1.0, NORM_MAX * 0.95])
@pytest.mark.parametrize("liars", [(0,), (3, 6)])
@pytest.mark.parametrize("agreement", [0.1, 0.5, 0.9])
def test_whoever_goes_against_the_rest_is_left_out(
    agreement: float, liars: tuple[int, ...], size: float
) -> None:
    contributions = honest(8, agreement)
    for number in liars:
        contributions[number] *= -size
    found = unlike(contributions, [100] * 8)
    assert {number: refused.code for number, refused in found.items()} == dict.fromkeys(liars, "opposed")


def test_where_nobody_agrees_nobody_is_against_the_rest() -> None:
    # Three pairs that pull in opposite directions, as members do that have converged to the middle of what they want.
    pulls = [noise(number) for number in range(3)]
    assert unlike([sign * pull for pull in pulls for sign in (1, -1)], [100] * 6) == {}


def test_a_contribution_out_of_all_proportion_is_left_out_whatever_its_direction() -> None:
    contributions = honest(8, 0.5)
    contributions[2] *= NORM_MAX * 1.1
    assert {number: refused.code for number, refused in unlike(contributions, [100] * 8).items()} == {
        2: "norm"
    }


def test_who_has_learned_more_may_have_come_farther() -> None:
    contributions = honest(8, 0.5)
    contributions[2] *= NORM_MAX * 1.8
    weights = [100] * 8
    assert 2 in unlike(contributions, weights)
    weights[2] = 200
    assert unlike(contributions, weights) == {}


def test_who_has_learned_nothing_is_no_measure() -> None:
    """All but one have finished, and tell only of what a codec has left out before."""
    contributions = [0.01 * values for values in honest(8, 0.5)]
    contributions[5] *= 100
    weights = [1] * 8
    weights[5] = 2
    assert unlike(contributions, weights) == {}
    zeros = [torch.zeros(SIZE)] * 7
    assert unlike([*zeros, noise(1)], [100] * 8) == {}


def test_three_cannot_tell_which_of_them_lies() -> None:
    contributions = honest(3, 0.5)
    contributions[1] *= -10
    assert unlike(contributions, [100] * 3) == {}


def test_the_contributions_are_left_as_they_are() -> None:
    contributions = honest(5, 0.5)
    before = [values.clone() for values in contributions]
    unlike(contributions, [1, 2, 3, 4, 5])
    assert all(map(torch.equal, contributions, before))
    assert 0 < AGREEMENT_MIN < 1


def judged(distances: Distances, own: Tensor, *pulled: Tensor) -> tuple[list[int], list[int]]:
    judgement = distances.judge(own, pulled)
    assert judgement.left_out == judgement.far | judgement.opposed.keys()
    return sorted(judgement.far), sorted(judgement.opposed)


def after(distance: float, own: Tensor) -> Distances:
    """Distances of which so many were seen that they are usual."""
    distances = Distances()
    for number in range(DISTANCES_KEPT):
        distances.judge(own, [own + distance * noise(1000 + number)])
    return distances


def test_a_fragment_much_farther_than_usual_is_left_out() -> None:
    own = noise(0)
    distances = after(0.3, own)
    assert judged(distances, own, own + 0.3 * noise(1), noise(2)) == ([1], [])
    assert judged(distances, own, own + 0.29 * FARTHER_MAX * noise(5)) == ([], [])


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_a_fragment_turned_round_is_left_out_from_the_first_on(size: float) -> None:
    own = noise(0)
    other = 0.5 * own + noise(1)
    assert judged(Distances(), own, other, -size * other) == ([], [1])


def test_members_that_begin_differently_are_not_against_each_other() -> None:
    distances = Distances()
    for number in range(1, 200):
        assert judged(distances, noise(0), noise(number)) == ([], [])


def test_who_is_near_is_not_far_whatever_is_usual() -> None:
    """After a merge all are alike, and a while later they are not."""
    own = noise(0)
    assert judged(after(0.0, own), own, own + (FAR_MIN - 0.02) * noise(1)) == ([], [])
    assert judged(after(0.0, own), own, own + (FAR_MIN + 0.1) * noise(1)) == ([0], [])


def test_at_first_there_is_no_telling_what_is_far() -> None:
    own, distances = noise(0), Distances()
    assert judged(distances, own, own + 0.1 * noise(1), 3 * noise(2)) == ([], [])


def test_whoever_comes_back_from_elsewhere_is_judged_by_what_it_finds() -> None:
    own = noise(0)
    distances = after(0.1, own)
    left_out = [judged(distances, own, noise(100 + number)) == ([0], []) for number in range(DISTANCES_KEPT)]
    assert left_out[0]
    assert not any(left_out[DISTANCES_KEPT // 2 + 1 :])


def test_alike_weights_are_at_no_distance() -> None:
    own, distances = noise(0), Distances()
    for _ in range(5):
        assert judged(distances, own, own, own) == ([], [])
    assert judged(distances, torch.zeros(SIZE), torch.zeros(SIZE)) == ([], [])
