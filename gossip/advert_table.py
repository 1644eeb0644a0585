"""Which swarms a node has heard of: adverts of members of any run, checked and bounded. No input or output.

Owns what is held, for how long, and who gives way when there is no room. Its own advert a node does not hold, it makes
it. Whether a run is worth joining nobody here can tell: anybody may sign an advert of any run.

Room is shared by givers, that is by who passed an advert on: one fills a quarter of the table at most, and of a full
table, or a run with too many, the giver of most gives way to one of fewer. Not by what adverts say: addresses in them
are only claimed, and keys cost nothing, but a giver was connected with. It is told by its address range on the
internet (``giver_of``).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from gossip.address_book import parse_peer_address
from gossip.address_ranges import is_routed, range_of
from gossip.dht_records import CLOCK_OFF_S
from p2p.advert import Advert, AdvertRefused, read_advert
from p2p.errors import AddressError
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.listening import multiaddr_of
from p2p.transport import PeerId

ADVERTS_HELD_MAX = 256
ADVERTS_PER_RUN_MAX = 4
"""Enough addresses to join by; a swarm of a thousand members leaves room for others."""
ADVERTS_PER_GIVER_MAX = 64
ADVERT_S = 2 * 86400
"""How long an advert counts that a node makes of itself: a swarm that is gone is told of for so long at most."""
TOLD_BYTES_MAX = 512 << 10
"""Of one answer: half a frame."""


@dataclass(frozen=True, slots=True)
class _Held:
    advert: Advert
    line: bytes
    giver: str


class AdvertTable:
    """The adverts that one node holds for others."""

    def __init__(self, *, signer: Signer, limits: Limits, rng: random.Random) -> None:
        self._signer = signer
        self._limits = limits
        self._rng = rng
        self._held: dict[tuple[str, str], _Held] = {}
        """By run and peer."""

    def __len__(self) -> int:
        return len(self._held)

    def put(self, line: bytes, giver: str, *, now_unix_s: float) -> None:
        """Hold an advert that ``giver`` has passed on, if there is room. Raises AdvertRefused."""
        advert = read_advert(line, now_unix_s, self._signer)
        self._check(advert, now_unix_s)
        key = advert.claim.run, advert.peer
        held = self._held.get(key)
        if held is not None:
            # Whoever brings a newer one makes no room and takes none: it is counted where it was.
            giver = held.giver
            if advert.claim.expires_unix_s <= held.advert.claim.expires_unix_s:
                return
        elif advert.peer == self._signer.peer or not self._make_room(advert.claim.run, giver, now_unix_s):
            return
        self._held[key] = _Held(advert, advert.line().encode(), giver)

    def told(self, own: Advert | None, count: int, *, now_unix_s: float) -> list[bytes]:
        """``own``, and others at random: ``count`` lines, or as many as fit into an answer."""
        self._drop_expired(now_unix_s)
        lines = [] if own is None else [own.line().encode()]
        held = [each.line for each in self._held.values()]
        lines += self._rng.sample(held, min(count - len(lines), len(held)))
        while sum(map(len, lines)) > TOLD_BYTES_MAX:
            lines.pop()
        return lines

    def _check(self, advert: Advert, now_unix_s: float) -> None:
        """What a node asks of an advert beyond what a list does. Raises AdvertRefused."""
        if advert.claim.expires_unix_s > now_unix_s + ADVERT_S + CLOCK_OFF_S:
            raise AdvertRefused("expired", "it is good for longer than one that is passed on")
        try:
            for address in advert.claim.addresses:
                parse_peer_address(address, chars_max=self._limits.address_chars_max)
        except AddressError as error:
            raise AdvertRefused("malformed", error.what) from error

    def _make_room(self, run: str, giver: str, now_unix_s: float) -> bool:
        """Whether there is room for one more of ``run`` from ``giver``, if need be in place of another's."""
        self._drop_expired(now_unix_s)
        if sum(each.giver == giver for each in self._held.values()) >= ADVERTS_PER_GIVER_MAX:
            return False
        rivals = [key for key in self._held if key[0] == run]
        if len(rivals) < ADVERTS_PER_RUN_MAX:
            if len(self._held) < ADVERTS_HELD_MAX:
                return True
            rivals = list(self._held)
        crowd = Counter(self._held[key].giver for key in rivals)
        ((most, number),) = crowd.most_common(1)
        if number <= crowd[giver] + 1:
            return False
        del self._held[self._rng.choice([key for key in rivals if self._held[key].giver == most])]
        return True

    def _drop_expired(self, now_unix_s: float) -> None:
        for key, held in list(self._held.items()):
            if held.advert.claim.expires_unix_s <= now_unix_s:
                del self._held[key]


def giver_of(peer: PeerId, host: str | None) -> str:
    """Who counts as one giver: an address range of the internet, all whom a relay carries, or a peer near by."""
    if host is None:
        return "relayed"
    return range_of(multiaddr_of(host, 1)) if is_routed(host) else peer
