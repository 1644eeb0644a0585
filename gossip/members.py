"""Who belongs to the swarm and who is there now, judged by the heartbeats that arrive.

Owns one entry per author of heartbeats: when a newer one was last seen here, and how regular they are. IO-free:
heartbeats and the time are passed in. Never decides what a state means for a merge or a mix.

Failure detection is adaptive: a member is suspect once it has been silent for longer than the mean of its
heartbeat intervals plus ``DEVIATIONS`` mean deviations, both smoothed as TCP smooths its round trips (RFC 6298,
section 2). So a slow or busy link stretches its own deadline and no other.

The more members there are, the less often each beats: what a node hears per second stays within bounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gossip.messages import Heartbeat
from p2p.transport import PeerId

MemberState = Literal["alive", "suspect", "gone", "left"]

HEARTBEAT_S_MIN = 2.0
HEARTBEAT_S_MAX = 30.0
HEARTBEATS_PER_S = 4.0
"""What a node hears of all members together, where HEARTBEAT_S_MAX allows it."""
MEAN_WEIGHT = 1 / 8
DEVIATION_WEIGHT = 1 / 4
DEVIATIONS = 4.0
SUSPECT_S_MIN = 8.0
SUSPECT_INTERVALS_MIN = 3.0
"""Nobody is suspect sooner than after so many of the intervals at which a member of such a swarm beats."""
SUSPECT_S_MAX = 120.0
GONE_FACTOR = 3.0
"""A member is gone after this many times the silence that made it suspect."""


def heartbeat_interval_s(members: int, pace: float = 1.0) -> float:
    """How often each of so many members beats; at a ``pace`` of 5 five times more rarely, at most HEARTBEAT_S_MAX."""
    return min(max(members / HEARTBEATS_PER_S, HEARTBEAT_S_MIN) * pace, HEARTBEAT_S_MAX)


@dataclass(frozen=True, slots=True)
class Member:
    """One member as seen from here. ``unheard_s``: seconds since a newer heartbeat of it arrived."""

    peer: PeerId
    state: MemberState
    heartbeat: Heartbeat
    unheard_s: float


@dataclass(slots=True)
class _Entry:
    heartbeat: Heartbeat
    heard_s: float
    proven: bool = False
    cut_off: bool = False
    interval_mean_s: float = HEARTBEAT_S_MIN
    interval_deviation_s: float = HEARTBEAT_S_MIN / 2
    suspect_after_s: float = 0.0

    def expect(self, interval_s: float) -> None:
        """Work out the deadline: no shorter than what a swarm of this size calls for, ``interval_s``."""
        mean_s = max(self.interval_mean_s, interval_s)
        expected_s = mean_s + DEVIATIONS * self.interval_deviation_s
        floor_s = max(SUSPECT_S_MIN, SUSPECT_INTERVALS_MIN * interval_s)
        self.suspect_after_s = min(max(expected_s, floor_s), SUSPECT_S_MAX)


class MemberTable:
    """The members of the swarm, ourselves (``local``) left out."""

    def __init__(self, *, local: PeerId, pace: float = 1.0) -> None:
        """``pace``: that of everybody's heartbeats."""
        self._local = local
        self._pace = pace
        self._entries: dict[PeerId, _Entry] = {}

    def heard(self, peer: PeerId, heartbeat: Heartbeat, now_s: float) -> None:
        """A heartbeat newer than any before arrived, by whatever way."""
        if peer == self._local:
            return
        entry = self._entries.get(peer)
        nominal_s = heartbeat_interval_s(len(self._entries) + 1, self._pace)
        if entry is None:
            entry = self._entries[peer] = _Entry(heartbeat, now_s, interval_mean_s=nominal_s)
            entry.expect(nominal_s)
            return
        # An interval longer than the deadline was an absence; it says little about the rhythm.
        interval_s = min(now_s - entry.heard_s, entry.suspect_after_s)
        deviation_s = abs(interval_s - entry.interval_mean_s)
        entry.interval_deviation_s += DEVIATION_WEIGHT * (deviation_s - entry.interval_deviation_s)
        entry.interval_mean_s += MEAN_WEIGHT * (interval_s - entry.interval_mean_s)
        entry.expect(nominal_s)
        entry.heartbeat, entry.heard_s = heartbeat, now_s
        entry.proven, entry.cut_off = True, False

    def connected(self, peer: PeerId) -> None:
        """A connection to ``peer`` is up: first-hand proof of life."""
        if (entry := self._entries.get(peer)) is not None:
            entry.proven, entry.cut_off = True, False

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to ``peer`` broke: it is suspect until it is heard of again."""
        if (entry := self._entries.get(peer)) is not None:
            entry.cut_off = True

    def forget(self, peer: PeerId) -> None:
        """Its heartbeat was dropped from the notice table."""
        self._entries.pop(peer, None)

    def state(self, peer: PeerId, now_s: float) -> MemberState:
        """The state of a member; ``gone`` for a peer never heard of."""
        entry = self._entries.get(peer)
        return "gone" if entry is None else _state(entry, now_s)

    def unheard_s(self, peer: PeerId, now_s: float) -> float:
        """Seconds since a newer heartbeat of ``peer`` arrived; infinite for a peer never heard of."""
        entry = self._entries.get(peer)
        return float("inf") if entry is None else now_s - entry.heard_s

    def peers(self) -> list[PeerId]:
        """Every member in any state, in the order in which they were first heard of."""
        return list(self._entries)

    def alive(self, now_s: float) -> list[PeerId]:
        """The members believed alive, sorted."""
        return sorted([peer for peer, entry in self._entries.items() if _state(entry, now_s) == "alive"])

    def words_of_alive(self, now_s: float) -> list[tuple[PeerId, Heartbeat, float]]:
        """Of each member believed alive its last heartbeat, and how many seconds ago it arrived; in any order."""
        return [
            (peer, entry.heartbeat, now_s - entry.heard_s)
            for peer, entry in self._entries.items()
            if _state(entry, now_s) == "alive"
        ]

    def __len__(self) -> int:
        """Members known, in any state."""
        return len(self._entries)

    def get(self, peer: PeerId, now_s: float) -> Member | None:
        """One member, or None when it was never heard of."""
        entry = self._entries.get(peer)
        if entry is None:
            return None
        return Member(peer, _state(entry, now_s), entry.heartbeat, now_s - entry.heard_s)

    def members(self, now_s: float) -> list[Member]:
        """Every member, sorted by peer."""
        found: Iterable[Member | None] = (self.get(peer, now_s) for peer in sorted(self._entries))
        return [member for member in found if member is not None]

    def statistics(self, now_s: float) -> dict[MemberState, int]:
        """How many members are in each state."""
        counts: dict[MemberState, int] = {"alive": 0, "suspect": 0, "gone": 0, "left": 0}
        for entry in self._entries.values():
            counts[_state(entry, now_s)] += 1
        return counts


def _state(entry: _Entry, now_s: float) -> MemberState:
    if entry.heartbeat.leaving:
        return "left"
    silence_s = now_s - entry.heard_s
    if silence_s > GONE_FACTOR * entry.suspect_after_s:
        return "gone"
    # One heartbeat may be the last word of a member long dead, passed on by others; a second one proves life.
    if silence_s > entry.suspect_after_s or entry.cut_off or not entry.proven:
        return "suspect"
    return "alive"
