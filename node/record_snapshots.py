"""Snapshots in one-byte mode: who proposes one, who confirms it, and who relies on it.

Owns this node's votes and the counting of everybody's. A snapshot is a settlement, which says which records, and the
state that these come to, both shards by content. A vote is a notice that names both, and whoever votes has worked the
state out itself, by taking back what is newer. With votes enough a snapshot is certified: no fork takes back what it
holds, a newcomer begins from it, and the batches below the one before it are let go of.

Never touches weights: ``RecordKeeper`` is what it asks for a state, and tells of a certified one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import trio
from blake3 import blake3

from gossip.ledger import PeerLedger
from gossip.messages import LOGS_MAX, Settlement, ShardRef, SnapshotVote
from gossip.notices import NoticeTable
from gossip.shard_transfer import FetchFailed, ShardFetcher
from gossip.store import ShardStore, StoreFull, outline_of
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage
from p2p.transport import PeerId

LOOK_S = 2.0
TURN_S = 10.0
"""Between the turns of members to propose a snapshot that is due."""
PATIENCE_S = 20.0
"""How long batches may be on their way before a certified snapshot that holds them is fetched instead."""
FETCH_TIMEOUT_S = 600.0
SETTLEMENT_BYTES_MAX = 200 * LOGS_MAX

log = structlog.get_logger()


class RecordKeeper(Protocol):
    """The records of this node, and the weights that hold them."""

    @property
    def records(self) -> int:
        """How many count."""

    def settlement(self) -> Settlement:
        """Which ones."""

    async def state_of(self, settlement: Settlement) -> bytes | None:
        """The state that ``settlement`` comes to; None while it holds what does not count here."""

    async def settle(self, settlement: Settlement) -> bool:
        """Let what it holds be final; False while not all of it is held here."""

    async def begin_from(self, settlement: Settlement, state: bytes) -> None:
        """Hold it and what is known beyond it, and nothing else. Raises ValueError."""

    async def forget(self, settlement: Settlement, vote: SnapshotVote) -> None:
        """Let go of the batches that a certified snapshot holds."""


@dataclass(frozen=True, slots=True)
class Certified:
    """A snapshot that enough members came to."""

    vote: SnapshotVote
    settlement: Settlement
    voters: tuple[PeerId, ...]


class RecordSnapshots:
    """The snapshots of one run, as one node sees them."""

    def __init__(
        self,
        *,
        local: PeerId,
        notices: NoticeTable,
        store: ShardStore,
        fetcher: ShardFetcher,
        ledger: PeerLedger,
        keeper: RecordKeeper,
        alive: Callable[[], Sequence[PeerId]],
        every_records: int,
        votes_needed: int,
    ) -> None:
        self._local = local
        self._notices = notices
        self._store = store
        self._fetcher = fetcher
        self._ledger = ledger
        self._keeper = keeper
        self._alive = alive
        self._every = every_records
        self._needed = votes_needed
        self._voted: SnapshotVote | None = None
        self._refused: set[bytes] = set()
        """Encoded votes that do not hold here."""
        self._due: tuple[int, float] = (0, 0.0)
        """The height that is due, and since when."""
        self._waiting: tuple[SnapshotVote, float] | None = None
        """A certified snapshot of which not everything is held here, and since when."""
        self._kept_for = ""
        """The owner of the shards of the snapshot below which batches were let go of."""
        self.certified: Certified | None = None

    @property
    def known(self) -> bool:
        """Whether any member tells of a snapshot."""
        return any(self._vote_of(peer) for peer in self._notices.authors())

    async def run(self) -> None:
        """Propose, confirm and certify until cancelled."""
        while True:
            await self.look()
            await trio.sleep(LOOK_S)

    async def look(self) -> None:
        """Do whatever is due now."""
        if not self._every:
            return
        await self._count_votes()
        for peer in self._notices.authors():
            vote = self._vote_of(peer)
            if vote is not None and peer != self._local and self._is_new(vote):
                await self._consider(vote, peer)
        await self._propose()

    def _vote_of(self, peer: PeerId) -> SnapshotVote | None:
        return self._notices.body_of(peer, "snapshot", SnapshotVote)

    def _is_new(self, vote: SnapshotVote) -> bool:
        settled = max(
            self._voted.records if self._voted else 0, self.certified.vote.records if self.certified else 0
        )
        return vote.records > settled and encode(vote) not in self._refused

    # --- voting -----------------------------------------------------------------------------------------------------

    async def _propose(self) -> None:
        height = self._keeper.records // self._every
        voted = [
            vote.records // self._every for peer in self._notices.authors() if (vote := self._vote_of(peer))
        ]
        if height == 0 or height <= max(voted, default=0):
            return
        now_s = trio.current_time()
        if self._due[0] != height:
            self._due = (height, now_s)
        ranked = sorted(self._alive(), key=lambda peer: blake3(f"{height}/{peer}".encode()).digest())
        if now_s - self._due[1] < TURN_S * ranked.index(self._local):
            return
        settlement = self._keeper.settlement()
        state = await self._keeper.state_of(settlement)
        if state is not None:
            await self._vote(settlement, state)

    async def _consider(self, vote: SnapshotVote, peer: PeerId) -> None:
        """Come to the same snapshot, if all of it counts here."""
        settlement = await self._settlement(vote, [peer])
        if settlement is None:
            return
        state = await self._keeper.state_of(settlement)
        if state is None:
            return
        ref, _ = await outline_of(state)
        if ref != vote.state:
            self._refused.add(encode(vote))
            self._ledger.note(peer, "false-snapshot", f"of {vote.records:,} records")
            log.error("a snapshot that does not come out", peer=peer, records=vote.records)
            return
        await self._vote(settlement, state)

    async def _vote(self, settlement: Settlement, state: bytes) -> None:
        records = sum(entry.end for entry in settlement.logs)
        owner = f"records/{records}"
        try:
            vote = SnapshotVote(
                records=records,
                settlement=await self._store.put(encode(settlement), owner=owner, sync=True),
                state=await self._store.put(state, owner=owner, sync=True),
            )
        except (StoreFull, OSError) as error:
            log.warning("snapshot not kept", error=str(error))
            return
        previous, self._voted = self._voted, vote
        self._notices.publish("snapshot", vote)
        if previous is not None and (self.certified is None or previous != self.certified.vote):
            await self._store.release(f"records/{previous.records}")
        log.info("voted for a snapshot", records=records)

    # --- certifying -------------------------------------------------------------------------------------------------

    async def _count_votes(self) -> None:
        votes: dict[SnapshotVote, list[PeerId]] = {}
        for peer in self._notices.authors():
            if (vote := self._vote_of(peer)) is not None and not self._ledger.banned(peer):
                votes.setdefault(vote, []).append(peer)
        enough = [vote for vote, peers in votes.items() if len(peers) >= self._needed]
        best = max(enough, key=lambda vote: (vote.records, encode(vote)), default=None)
        if best is None or (self.certified is not None and best.records <= self.certified.vote.records):
            return
        voters = tuple(sorted(votes[best]))
        settlement = await self._settlement(best, voters)
        if settlement is None:
            return
        if not await self._keeper.settle(settlement):
            now_s = trio.current_time()
            if self._waiting is None or self._waiting[0] != best:
                self._waiting = (best, now_s)
            if self._keeper.records and now_s - self._waiting[1] < PATIENCE_S:
                return
            if not await self.begin_from(best, settlement, voters):
                return
        for shard in (best.settlement, best.state):
            self._store.pin(shard, f"records/{best.records}")
        before, self.certified = self.certified, Certified(best, settlement, voters)
        log.info("snapshot certified", records=best.records, voters=len(voters))
        if before is not None:
            # Its state is kept with it: what is on disk goes on from there.
            await self._keeper.forget(before.settlement, before.vote)
            await self._store.release(self._kept_for)
            self._kept_for = f"records/{before.vote.records}"

    async def begin_from(self, vote: SnapshotVote, settlement: Settlement, voters: Sequence[PeerId]) -> bool:
        """Take a certified snapshot over from those who voted for it; returns whether that went well."""
        try:
            state = await self._fetch(vote.state, voters)
            await self._keeper.begin_from(settlement, state)
        except (FetchFailed, StoreFull, ValueError, OSError) as error:
            log.warning("snapshot not taken over", records=vote.records, error=str(error))
            return False
        return True

    async def _settlement(self, vote: SnapshotVote, holders: Sequence[PeerId]) -> Settlement | None:
        """What ``vote`` says is held; None while it cannot be had, or is not what a vote may name."""
        if vote.settlement.size > SETTLEMENT_BYTES_MAX:
            self._refused.add(encode(vote))
            return None
        try:
            data = await self._fetch(vote.settlement, holders)
            settlement = decode(data, Settlement, bytes_max=SETTLEMENT_BYTES_MAX)
        except MalformedMessage:
            self._refused.add(encode(vote))
            return None
        except (FetchFailed, StoreFull, OSError):
            return None
        names = [(entry.author, entry.incarnation) for entry in settlement.logs]
        if names != sorted(set(names)) or sum(entry.end for entry in settlement.logs) != vote.records:
            self._refused.add(encode(vote))
            return None
        return settlement

    async def _fetch(self, ref: ShardRef, holders: Sequence[PeerId]) -> bytes:
        if self._store.holds(ref):
            return await self._store.get(ref)
        others = [peer for peer in holders if peer != self._local]
        data = await self._fetcher.fetch(ref, others, timeout_s=FETCH_TIMEOUT_S)
        await self._store.put(data)
        return data
