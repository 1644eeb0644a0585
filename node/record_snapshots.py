"""Snapshots in one-byte mode: when one is proposed, confirmed and relied on.

Owns this node's part: its votes and what it relies on. A snapshot is a settlement, which says which records, and the
state that these come to, both shards by content. A vote is a notice that names both, and whoever votes has worked the
state out itself, by taking back what is newer. With votes enough a snapshot is certified: no fork takes back what it
holds, a newcomer begins from it, and the batches below the one before it are let go of.

What is held here is relied on only if it comes out here, too. Never touches weights: a ``Keeper`` is what it asks for
a state, and tells of a certified one.

Relies on: ``gossip.snapshot_votes`` for the counting of everybody's votes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import trio
from blake3 import blake3

from gossip.ledger import PeerLedger
from gossip.messages import LOGS_MAX, Certificate, RecordSnapshot, Settlement, ShardRef, SnapshotVote
from gossip.notices import NoticeTable
from gossip.shard_transfer import FetchFailed, ShardFetcher
from gossip.snapshot_votes import SnapshotVotes
from gossip.store import ShardMissing, ShardStore, StoreFull, outline_of
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


class Keeper(Protocol):
    """The records of this node, and the weights that hold them."""

    @property
    def records(self) -> int:
        """How many count."""

    def settlement(self) -> Settlement:
        """Which ones."""

    async def state_of(self, settlement: Settlement) -> bytes | None:
        """The state that ``settlement`` comes to; None while it holds what does not count here."""

    async def settle(self, settlement: Settlement) -> bool:
        """Let what it holds be final, and nothing else; False while not all of it is held here."""

    async def begin_from(self, settlement: Settlement, state: bytes) -> None:
        """Hold it and what is known beyond it, and nothing else. Raises ValueError."""

    async def forget(self, certified: Certified) -> bool:
        """Let go of the batches that a certified snapshot holds; False if some of them are not final any more."""


@dataclass(frozen=True, slots=True)
class Certified:
    """A snapshot that enough members came to, and their votes."""

    snapshot: RecordSnapshot
    settlement: Settlement
    certificate: Certificate


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
        keeper: Keeper,
        alive: Callable[[], Sequence[PeerId]],
        learned: Callable[[], Collection[PeerId]],
        every_records: int,
        votes_needed: int,
    ) -> None:
        """``alive()``: the members that are, ourselves included; ``learned()``: those of them that hold records."""
        self._local = local
        self._notices = notices
        self._store = store
        self._fetcher = fetcher
        self._ledger = ledger
        self._keeper = keeper
        self._alive = alive
        self._every = every_records
        self._votes = SnapshotVotes(
            local=local, notices=notices, ledger=ledger, learned=learned, votes_needed=votes_needed
        )
        self._voted: RecordSnapshot | None = None
        self._due: tuple[int, float] = (0, 0.0)
        """The height that is due, and since when."""
        self._behind_since_s: float | None = None
        """Since when there is one of which not everything is held here."""
        self._certificate: ShardRef | None = None
        self._base = ""
        """For whom the shards of the snapshot are kept below which batches were let go of."""
        self.certified: Certified | None = None

    @property
    def offered(self) -> bool:
        """Whether members tell of a certified snapshot, or enough of them vote for one."""
        return self._votes.offered

    async def run(self) -> None:
        """Propose, confirm and certify until cancelled."""
        while True:
            await self.look()
            await trio.sleep(LOOK_S)

    async def look(self) -> None:
        """Do whatever is due now."""
        if not self._every:
            return
        self._votes.count()
        await self._read_what_others_rely_on()
        self._votes.note_majorities(trio.current_time())
        await self._certify()
        for snapshot, peer in self._votes.to_consider():
            if snapshot.records > self._settled():
                await self._consider(snapshot, peer)
        await self._propose()

    async def resume(self, certified: Certified) -> None:
        """Go on from a certified snapshot of an earlier life, and vouch for it again."""
        self.certified, self._voted = certified, certified.snapshot
        self._votes.ours = certified.snapshot
        self._base = self._keep(certified.snapshot)
        await self._tell()

    def _settled(self) -> int:
        """Records of the latest snapshot that we voted for or rely on."""
        known = [self._voted, self.certified.snapshot if self.certified else None]
        return max((snapshot.records for snapshot in known if snapshot), default=0)

    def _keep(self, snapshot: RecordSnapshot) -> str:
        owner = f"records/{snapshot.records}"
        for shard in (snapshot.settlement, snapshot.state):
            self._store.pin(shard, owner)
        return owner

    async def _tell(self) -> None:
        """Publish our vote, and what we rely on."""
        assert self._voted is not None
        if self.certified is not None:
            try:
                await self._store.release("certificate")
                data = encode(self.certified.certificate)
                self._certificate = await self._store.put(data, owner="certificate")
            except (StoreFull, OSError) as error:
                log.warning("certificate not kept", error=str(error))
        self._notices.publish("snapshot", SnapshotVote(snapshot=self._voted, certificate=self._certificate))

    # --- voting -----------------------------------------------------------------------------------------------------

    async def _propose(self) -> None:
        height = self._keeper.records // self._every
        if height == 0 or (self._voted is not None and height <= self._voted.records // self._every):
            return
        now_s = trio.current_time()
        if self._due[0] != height:
            self._due = (height, now_s)
        in_turn = any(height == snapshot.records // self._every for snapshot in self._votes.proposed())
        if in_turn and now_s - self._due[1] < PATIENCE_S:
            return  # Somebody has proposed one. Unless nobody can come to it, we shall.
        ranked = sorted(self._alive(), key=lambda peer: blake3(f"{height}/{peer}".encode()).digest())
        if now_s - self._due[1] < TURN_S * ranked.index(self._local):
            return
        settlement = self._keeper.settlement()
        state = await self._keeper.state_of(settlement)
        if state is not None:
            await self._vote(settlement, state)

    async def _consider(self, snapshot: RecordSnapshot, peer: PeerId) -> None:
        """Come to the same snapshot, if all of it counts here."""
        settlement = await self._settlement(snapshot, [peer])
        if settlement is None:
            return
        state = await self._keeper.state_of(settlement)
        if state is None:
            return
        ref, _ = await outline_of(state)
        if ref != snapshot.state:
            self._does_not_come_out(snapshot, [peer])
            return
        await self._vote(settlement, state)

    def _does_not_come_out(self, snapshot: RecordSnapshot, voters: Collection[PeerId]) -> None:
        self._votes.refuse(snapshot)
        for peer in voters:
            self._ledger.note(peer, "false-snapshot", f"of {snapshot.records:,} records")
        log.warning("a snapshot does not come out here", records=snapshot.records, voters=sorted(voters))

    async def _vote(self, settlement: Settlement, state: bytes) -> None:
        records = sum(entry.end for entry in settlement.logs)
        owner = f"records/{records}"
        try:
            snapshot = RecordSnapshot(
                records=records,
                settlement=await self._store.put(encode(settlement), owner=owner, sync=True),
                state=await self._store.put(state, owner=owner, sync=True),
            )
        except (StoreFull, OSError) as error:
            log.warning("snapshot not kept", error=str(error))
            return
        previous, self._voted = self._voted, snapshot
        await self._tell()
        if previous is not None and (
            self.certified is None or previous.records > self.certified.snapshot.records
        ):
            await self._store.release(f"records/{previous.records}")
        log.info("voted for a snapshot", records=records)

    # --- certifying -------------------------------------------------------------------------------------------------

    async def _read_what_others_rely_on(self) -> None:
        for ref, peer in self._votes.unread(trio.current_time()):
            with contextlib.suppress(FetchFailed, StoreFull, OSError):
                data = await self._fetch(ref, [peer])
                self._votes.read(ref, peer, data, trio.current_time())

    async def _certify(self) -> None:
        """Rely on the latest certified snapshot, once all of it is held here, or has been for too long not."""
        found = self._votes.best(trio.current_time())
        if found is None:
            return
        best, votes = found
        holders = self._votes.holders(best)
        settlement = await self._settlement(best, holders)
        if settlement is None:
            return
        if best != self._voted:
            state = await self._keeper.state_of(settlement)
            if state is not None and (await outline_of(state))[0] != best.state:
                self._does_not_come_out(best, votes)
                return
        began = False
        if not await self._keeper.settle(settlement):
            now_s = trio.current_time()
            self._behind_since_s = self._behind_since_s or now_s
            if self._keeper.records and now_s - self._behind_since_s < PATIENCE_S:
                return
            if not await self._begin_from(best, settlement, holders):
                return
            began = True
        self._behind_since_s = None
        await self._hold(best, settlement)
        certificate = Certificate(votes=[packed for _, packed in sorted(votes.items())])
        before, self.certified = self.certified, Certified(best, settlement, certificate)
        self._votes.ours = best
        if self._voted is None or self._voted.records < best.records:
            self._voted = best
        log.info("snapshot certified", records=best.records)
        await self._tell()
        if began:
            before = self.certified  # What is held goes on from this one now, and from none before it.
        if before is None:
            return
        stale, owner = self._base, self._keep(before.snapshot)
        if await self._keeper.forget(before):
            self._base = owner
        else:
            stale = owner
        if stale not in ("", self._base):
            await self._store.release(stale)

    async def _hold(self, snapshot: RecordSnapshot, settlement: Settlement) -> None:
        """Have the shards of a snapshot that is relied on: newcomers ask for them, and so may our next life."""
        self._keep(snapshot)
        if not self._store.holds(snapshot.state):
            state = await self._keeper.state_of(settlement)
            if state is not None and (await outline_of(state))[0] == snapshot.state:
                with contextlib.suppress(StoreFull, OSError):
                    await self._store.put(state, owner=f"records/{snapshot.records}", sync=True)
        with contextlib.suppress(FetchFailed, StoreFull, OSError):
            data = await self._fetch(snapshot.settlement, [])
            await self._store.put(data, owner=f"records/{snapshot.records}", sync=True)

    async def _begin_from(
        self, snapshot: RecordSnapshot, settlement: Settlement, holders: Sequence[PeerId]
    ) -> bool:
        """Take a certified snapshot over from those who hold it; returns whether that went well."""
        try:
            state = await self._fetch(snapshot.state, holders)
            await self._keeper.begin_from(settlement, state)
        except (FetchFailed, StoreFull, ValueError, OSError) as error:
            log.warning("snapshot not taken over", records=snapshot.records, error=str(error))
            return False
        return True

    async def _settlement(self, snapshot: RecordSnapshot, holders: Sequence[PeerId]) -> Settlement | None:
        """Which records ``snapshot`` holds; None while that cannot be had, or is not what a snapshot may hold."""
        if snapshot.settlement.size > SETTLEMENT_BYTES_MAX:
            self._votes.refuse(snapshot)
            return None
        try:
            data = await self._fetch(snapshot.settlement, holders)
            settlement = decode(data, Settlement, bytes_max=SETTLEMENT_BYTES_MAX)
        except MalformedMessage:
            self._votes.refuse(snapshot)
            return None
        except (FetchFailed, StoreFull, OSError):
            return None
        names = [(entry.author, entry.incarnation) for entry in settlement.logs]
        if names != sorted(set(names)) or sum(entry.end for entry in settlement.logs) != snapshot.records:
            self._votes.refuse(snapshot)
            return None
        return settlement

    async def _fetch(self, ref: ShardRef, holders: Sequence[PeerId]) -> bytes:
        with contextlib.suppress(ShardMissing):
            return await self._store.get(ref)
        others = [peer for peer in holders if peer != self._local]
        data = await self._fetcher.fetch(ref, others, timeout_s=FETCH_TIMEOUT_S)
        await self._store.put(data)
        return data
