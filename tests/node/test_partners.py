"""Partners are drawn by chance, and where the run wants it the quicker ones more often, without forgetting anybody."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection

import pytest

from node.partners import PEERS_REMEMBERED, Partners, in_random_order
from p2p.transport import PeerId
from training.spec_sections import PartnerChoice

PEERS = [PeerId(f"peer-{number}") for number in range(8)]


def partners(choice: PartnerChoice, shunned: Collection[PeerId] = ()) -> Partners:
    return Partners(
        choice,
        rng=random.Random(0),
        members=lambda: list(PEERS),
        may_mix_with=lambda peer: peer not in shunned,
    )


def test_whatever_the_order_everybody_is_drawn_once_and_anybody_first() -> None:
    drawn = [list(in_random_order(range(5), random.Random(seed))) for seed in range(200)]
    assert all(sorted(order) == list(range(5)) for order in drawn)
    for at in range(5):
        counts = [sum(order[at] == item for order in drawn) for item in range(5)]
        assert min(counts) > 20


@pytest.mark.parametrize("choice", ["random", "fast"])
@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_each_is_chosen_once_and_nobody_who_may_not_be(choice: PartnerChoice, count: int) -> None:
    choosing = partners(choice, shunned=PEERS[:2])
    for _ in range(50):
        chosen = choosing.choose(count)
        assert len(set(chosen)) == len(chosen) <= count
        assert not set(chosen) & set(PEERS[:2])
        assert chosen


def test_the_quick_are_pulled_from_more_often_and_the_slow_not_never() -> None:
    counts = {}
    for choice in ("random", "fast"):
        choosing = partners(choice)
        counted: Counter[PeerId] = Counter()
        for _ in range(2000):
            (peer,) = choosing.choose(1)
            counted[peer] += 1
            choosing.pulled(peer, 10.0 if peer in PEERS[:4] else 0.1 + 0.01 * PEERS.index(peer))
        counts[choice] = counted
    slow = {choice: sum(counted[peer] for peer in PEERS[:4]) for choice, counted in counts.items()}
    assert 900 < slow["random"] < 1100
    # Both of two drawn are slow in 3 cases of 14.
    assert 350 < slow["fast"] < 510
    assert min(counts["fast"].values()) > 0


def test_a_link_that_got_better_is_noticed() -> None:
    choosing = partners("fast")
    for peer in PEERS:
        choosing.pulled(peer, 1.0)
    for _ in range(20):
        choosing.pulled(PEERS[0], 0.1)
    counted = Counter(choosing.choose(1)[0] for _ in range(1000))
    assert counted[PEERS[0]] > 200, "in every pair that it is drawn in: one of four"


def test_of_members_without_end_few_are_remembered() -> None:
    choosing = partners("fast")
    for number in range(2 * PEERS_REMEMBERED):
        choosing.pulled(PeerId(f"passer-by-{number}"), 1.0)
    assert len(choosing._took_s) == PEERS_REMEMBERED
