"""What each peer has done wrong: the one place that scores and bans.

Owns standings, bans and the count of refusals by reason. Never disconnects anybody: ``gossip.links`` holds the
connections and asks here. Time is trio's. Where the node has an allow-list, whoever is not on it counts as banned.
A node that rests deals with nobody, which is held against nobody.

A standing starts at 100. Every offence costs points by its kind, lost points come back by half every
``HALF_LIFE_S``, and a peer whose standing falls to 0 is banned for ``BAN_S``; it returns on half standing.
Costs follow what an honest peer on a bad line could do: what only a broken or hostile program does is
dear, what a slow or restarting machine does is cheap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import structlog
import trio

from p2p.errors import CallRefused
from p2p.transport import PeerId

STANDING_MAX = 100.0
HALF_LIFE_S = 600.0
BAN_S = 600.0
PEERS_MAX = 4096
"""Peers remembered; beyond it the ones with the best standing are forgotten first."""
REASON_CHARS_MAX = 200

COSTS: Mapping[str, float] = MappingProxyType(
    {
        "hash": 50.0,  # bytes that are not what their name says
        "signature": 34.0,  # a notice or record with a false signature
        "malformed": 25.0,  # a frame that no version of the protocol sends
        "equivocation": 100.0,  # two signed statements that exclude each other
        "non-finite": 34.0,  # weights with NaN or infinity in them
        "shape": 34.0,  # a fragment of the wrong size
        "norm": 10.0,  # weights out of all proportion to ours
        "variance": 10.0,
        "opposed": 10.0,  # weights or differences turned round, away from those of all others
        "oversized": 25.0,
        "clock-fell": 34.0,  # a batch of records that breaks a rule, which no honest peer passes on
        "flood": 34.0,
        "false-snapshot": 34.0,  # a state that its records do not come to
        "openings": 2.0,  # logs of its own that no honest author opens
        "replay": 1.0,  # batches that we have, in spite of our having said so
        "wrong-run": 1.0,  # it follows another invite; no harm meant
        "version": 1.0,
        "refused": 1.0,
        "banned": 0.0,  # it has banned us
        "resting": 0.0,  # it is in touch with nobody for now, and comes back by itself
        "stall": 4.0,  # promised bytes that came too slowly
        "broken": 1.0,  # a stream that ended in the middle
        "not-held": 0.5,  # offered a shard and no longer has it
        "not-served": 0.0,  # it tells of batches that it does not send; so may one that has just let go of them
        "other-state": 0.0,  # other weights at the same records: one of two machines is broken, or it lies
        "unvouched": 0.0,  # it relies on a snapshot for which nobody voted that we know
        "unknown-kind": 0.0,  # a later version's notices, counted only
        "table-full": 0.0,
    }
)
"""Points each reason costs. Reasons that are not listed cost DEFAULT_COST."""
DEFAULT_COST = 5.0
NOT_ALLOWED = "not on this node's allow-list"

log = structlog.get_logger()


@dataclass(slots=True)
class _Account:
    lost_points: float = 0.0
    updated_s: float = 0.0
    banned_until_s: float = 0.0
    last_problem: str = ""


class PeerLedger:
    """Standings of the peers this node has had trouble with; whoever is not listed has full standing."""

    def __init__(self, allowed: Collection[PeerId] = ()) -> None:
        """``allowed``: with whom the node may deal; none named means all."""
        self._allowed = frozenset(allowed)
        self._accounts: dict[PeerId, _Account] = {}
        self._on_ban: list[Callable[[PeerId, str], None]] = []
        self.refusals: Counter[str] = Counter()
        """Offences by reason since the start, over all peers."""
        self.resting = ""
        """Why this node deals with nobody for now, for people; empty when it does."""

    def on_ban(self, callback: Callable[[PeerId, str], None]) -> None:
        """Have ``callback(peer, problem)`` called at the moment a peer is banned; it must not block."""
        self._on_ban.append(callback)

    def note(self, peer: PeerId, reason: str, detail: str = "") -> None:
        """Count an offence of ``peer`` and take its cost off the peer's standing."""
        self.refusals[reason] += 1
        account = self._account(peer)
        account.lost_points += COSTS.get(reason, DEFAULT_COST)
        account.last_problem = f"{reason}: {detail}"[:REASON_CHARS_MAX] if detail else reason
        log.info("refused", peer=peer, reason=reason, detail=detail[:REASON_CHARS_MAX])
        if account.lost_points >= STANDING_MAX and not self.banned(peer):
            account.banned_until_s = account.updated_s + BAN_S
            log.warning("banned", peer=peer, seconds=BAN_S, problem=account.last_problem)
            for callback in self._on_ban:
                callback(peer, account.last_problem)

    def shuns(self, peer: PeerId) -> bool:
        """Whether nothing is to be asked of ``peer`` or answered to it now."""
        return bool(self.resting) or self.banned(peer)

    def admit(self, peer: PeerId) -> None:
        """Raise CallRefused, with the reason for ``peer`` to read, where nothing is to be answered to it now."""
        if self.banned(peer):
            raise CallRefused("banned", f"for a while: {self.last_problem(peer)}")
        if self.resting:
            raise CallRefused("resting", "it is in touch with nobody for now, and comes back by itself")

    def banned(self, peer: PeerId) -> bool:
        """The same for what it has done itself, or since it is not allowed."""
        if not self._allows(peer):
            return True
        account = self._accounts.get(peer)
        return account is not None and trio.current_time() < account.banned_until_s

    def _allows(self, peer: PeerId) -> bool:
        return not self._allowed or peer in self._allowed

    def standing(self, peer: PeerId) -> float:
        """0 (about to be banned, or banned) to 100 (no known trouble)."""
        if peer not in self._accounts:
            return STANDING_MAX
        return max(0.0, STANDING_MAX - self._settle(self._accounts[peer]).lost_points)

    def last_problem(self, peer: PeerId) -> str:
        """The last thing ``peer`` did wrong, for people; empty when nothing is known."""
        if not self._allows(peer):
            return NOT_ALLOWED
        account = self._accounts.get(peer)
        return account.last_problem if account is not None else ""

    def _account(self, peer: PeerId) -> _Account:
        if peer not in self._accounts:
            if len(self._accounts) >= PEERS_MAX:
                del self._accounts[max(self._accounts, key=self.standing)]
            self._accounts[peer] = _Account(updated_s=trio.current_time())
        return self._settle(self._accounts[peer])

    def _settle(self, account: _Account) -> _Account:
        now_s = trio.current_time()
        if account.updated_s < account.banned_until_s <= now_s:
            # The ban is served: what happened before it counts half.
            account.lost_points = STANDING_MAX / 2
            account.updated_s = account.banned_until_s
        if now_s >= account.banned_until_s:
            account.lost_points *= 0.5 ** ((now_s - account.updated_s) / HALF_LIFE_S)
            account.updated_s = now_s
        return account
