"""Whom a node pulls from next: random members, or of random ones those that were quick.

Owns what pulls from each peer have taken. Choosing among two that chance has drawn keeps everybody in touch with
everybody, slow members included, and yet takes most models over the faster links (the power of two choices,
Mitzenmacher 2001).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from p2p.transport import PeerId
from training.spec_sections import PartnerChoice

T = TypeVar("T")

PEERS_REMEMBERED = 1024
MEMORY = 0.7
"""Of what a pull took before, in the mean; links change."""


class Partners:
    """Chooses for one node. ``members``: all of them, ``may_mix_with``: whether one may be asked."""

    def __init__(
        self,
        choice: PartnerChoice,
        *,
        rng: random.Random,
        members: Callable[[], list[PeerId]],
        may_mix_with: Callable[[PeerId], bool],
    ) -> None:
        self._choice = choice
        self._rng = rng
        self._members = members
        self._may_mix_with = may_mix_with
        self._took_s: OrderedDict[PeerId, float] = OrderedDict()

    def choose(self, count: int) -> list[PeerId]:
        """Up to ``count`` members, each once; of a thousand only those are looked at that are drawn."""
        drawn = filter(self._may_mix_with, in_random_order(self._members(), self._rng))
        if self._choice == "random":
            return list(islice(drawn, count))
        chosen: list[PeerId] = []
        while len(chosen) < count and (two := list(islice(drawn, 2))):
            # One that was never pulled from comes first: nobody knows yet how quick it is.
            chosen.append(min(two, key=lambda peer: self._took_s.get(peer, 0.0)))
        return chosen

    def pulled(self, peer: PeerId, seconds: float) -> None:
        """A pull from ``peer`` took so long, whether it came to anything or not."""
        before = self._took_s.pop(peer, seconds)
        self._took_s[peer] = MEMORY * before + (1 - MEMORY) * seconds
        while len(self._took_s) > PEERS_REMEMBERED:
            self._took_s.popitem(last=False)


def in_random_order(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Each of ``items`` once, drawn as they are asked for (Fisher and Yates, from the end)."""
    rest = list(items)
    while rest:
        place = rng.randrange(len(rest))
        rest[place], rest[-1] = rest[-1], rest[place]
        yield rest.pop()
