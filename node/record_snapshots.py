"""Snapshots in one-byte mode: who proposes one, who confirms it, and who relies on it.

Owns this node's votes and the counting of everybody's. A snapshot is a settlement, which says which records, and the
state that these come to, both shards by content. A vote is a notice that names both, and whoever votes has worked the
state out itself, by taking back what is newer. With votes enough a snapshot is certified: no fork takes back what it
holds, a newcomer begins from it, and the batches below the one before it are let go of.

Never touches weights: a ``Keeper`` is what it asks for a state, and tells of a certified one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import trio
from blake3 import blake3

from gossip.ledger import PeerLedger
from gossip.messages import LOGS_MAX, Certificate, RecordSnapshot, Settlement, ShardRef, SnapshotVote
from gossip.notices import NoticeTable
from gossip.shard_transfer import FetchFailed, ShardFetcher
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
CERTIFICATE_BYTES_MAX = 1 << 20

REMEMBERED_MAX = 4096
"""Certificates that need not be read again, and snapshots that need not be worked out again."""

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
        """Let what it holds be final; False while not all of it is held here."""

    async def begin_from(self, settlement: Settlement, state: bytes) -> None:
        """Hold it and what is known beyond it, and nothing else. Raises ValueError."""

    async def forget(self, certified: Certified) -> None:
        """Let go of the batches that a certified snapshot holds."""


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
        self._voted: RecordSnapshot | None = None
        self._refused: set[RecordSnapshot] = set()
        """Snapshots that do not come out here."""
        self._due: tuple[int, float] = (0, 0.0)
        """The height that is due, and since when."""
        self._candidates: dict[RecordSnapshot, Certificate] = {}
        """Certified snapshots that we do not rely on yet."""
        self._behind_since_s: float | None = None
        """Since when there is one of which not everything is held here."""
        self._certificate: ShardRef | None = None
        self._read_certificates: set[ShardRef] = set()
        """Those of others that were looked at."""
        self._base = ""
        """For whom the shards of the snapshot are kept below which batches were let go of."""
        self.certified: Certified | None = None

    @property
    def offered(self) -> bool:
        """Whether members tell of a certified snapshot, or enough of them vote for one."""
        votes = self._votes()
        certified = any(vote.certificate is not None for vote, _ in self._told())
        return certified or any(len(voters) >= self._needed for voters in votes.values())

    async def run(self) -> None:
        """Propose, confirm and certify until cancelled."""
        while True:
            await self.look()
            await trio.sleep(LOOK_S)

    async def look(self) -> None:
        """Do whatever is due now."""
        if not self._every:
            return
        self._count_votes()
        await self._read_what_others_rely_on()
        await self._certify()
        for vote, peer in self._told():
            snapshot = vote.snapshot
            if peer != self._local and snapshot.records > self._settled() and snapshot not in self._refused:
                await self._consider(snapshot, peer)
        await self._propose()

    async def resume(self, certified: Certified) -> None:
        """Go on from a certified snapshot of an earlier life, and vouch for it again."""
        self.certified, self._voted = certified, certified.snapshot
        self._base = self._keep(certified.snapshot)
        await self._tell()

    def _told(self) -> list[tuple[SnapshotVote, PeerId]]:
        found = []
        for peer in self._notices.authors():
            vote = self._notices.body_of(peer, "snapshot", SnapshotVote)
            if vote is not None and not self._ledger.banned(peer):
                found.append((vote, peer))
        return found

    def _votes(self) -> dict[RecordSnapshot, list[PeerId]]:
        votes: dict[RecordSnapshot, list[PeerId]] = {}
        for vote, peer in self._told():
            votes.setdefault(vote.snapshot, []).append(peer)
        return votes

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
        told = [vote.snapshot.records // self._every for vote, _ in self._told()]
        if height == 0 or height <= max(told, default=0):
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
            self._refuse(snapshot)
            self._ledger.note(peer, "false-snapshot", f"of {snapshot.records:,} records")
            log.error("a snapshot that does not come out", peer=peer, records=snapshot.records)
            return
        await self._vote(settlement, state)

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

    def _count_votes(self) -> None:
        for snapshot, voters in self._votes().items():
            if len(voters) >= self._needed and snapshot not in self._candidates:
                packed = [self._notices.packed(peer, "snapshot") for peer in sorted(voters)[: self._needed]]
                self._candidates[snapshot] = Certificate(
                    votes=[notice for notice in packed if notice is not None]
                )

    async def _read_what_others_rely_on(self) -> None:
        """Certificates of snapshots whose voters have voted for later ones since, or are gone."""
        for vote, peer in self._told():
            ref = vote.certificate
            if ref is None or ref in self._read_certificates or ref.size > CERTIFICATE_BYTES_MAX:
                continue
            try:
                data = await self._fetch(ref, [peer])
            except (FetchFailed, StoreFull, OSError):
                continue
            if len(self._read_certificates) >= REMEMBERED_MAX:
                self._read_certificates.clear()
            self._read_certificates.add(ref)
            try:
                certificate = decode(data, Certificate, bytes_max=CERTIFICATE_BYTES_MAX)
            except MalformedMessage as error:
                self._ledger.note(peer, "malformed", error.what)
                continue
            snapshot = self._certified_by(certificate)
            if snapshot is None:
                self._ledger.note(peer, "false-snapshot", "a certificate that certifies nothing")
            else:
                self._candidates[snapshot] = certificate

    def _certified_by(self, certificate: Certificate) -> RecordSnapshot | None:
        """The snapshot that enough different members have voted for."""
        votes = [self._notices.verified(packed, SnapshotVote) for packed in certificate.votes]
        voters = {vote[0] for vote in votes if vote is not None}
        snapshots = {vote[1].snapshot for vote in votes if vote is not None}
        if None in votes or len(snapshots) != 1 or len(voters) < self._needed:
            return None
        return snapshots.pop()

    async def _certify(self) -> None:
        """Rely on the latest certified snapshot, once all of it is held here, or has been for too long not."""
        self._candidates = {
            snapshot: certificate
            for snapshot, certificate in self._candidates.items()
            if self.certified is None or snapshot.records > self.certified.snapshot.records
        }
        if not self._candidates:
            return
        best = max(self._candidates, key=lambda snapshot: (snapshot.records, encode(snapshot)))
        holders = [
            peer for vote, peer in self._told() if vote.snapshot == best or vote.certificate is not None
        ]
        settlement = await self._settlement(best, holders)
        if settlement is None:
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
        self._keep(best)
        before, self.certified = self.certified, Certified(best, settlement, self._candidates[best])
        if self._voted is None or self._voted.records < best.records:
            self._voted = best
        log.info("snapshot certified", records=best.records)
        await self._tell()
        if began:
            before = self.certified  # What is held goes on from this one now, and from none before it.
        if before is not None:
            await self._keeper.forget(before)
            owner = self._keep(before.snapshot)
            if self._base not in ("", owner):
                await self._store.release(self._base)
            self._base = owner

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
            self._refuse(snapshot)
            return None
        try:
            data = await self._fetch(snapshot.settlement, holders)
            settlement = decode(data, Settlement, bytes_max=SETTLEMENT_BYTES_MAX)
        except MalformedMessage:
            self._refuse(snapshot)
            return None
        except (FetchFailed, StoreFull, OSError):
            return None
        names = [(entry.author, entry.incarnation) for entry in settlement.logs]
        if names != sorted(set(names)) or sum(entry.end for entry in settlement.logs) != snapshot.records:
            self._refuse(snapshot)
            return None
        return settlement

    def _refuse(self, snapshot: RecordSnapshot) -> None:
        if len(self._refused) >= REMEMBERED_MAX:
            self._refused.clear()
        self._refused.add(snapshot)

    async def _fetch(self, ref: ShardRef, holders: Sequence[PeerId]) -> bytes:
        with contextlib.suppress(ShardMissing):
            return await self._store.get(ref)
        others = [peer for peer in holders if peer != self._local]
        data = await self._fetcher.fetch(ref, others, timeout_s=FETCH_TIMEOUT_S)
        await self._store.put(data)
        return data
