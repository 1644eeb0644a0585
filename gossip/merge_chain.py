"""The committed records this node holds, on disk and in memory, and which of them is the head.

Owns ``merges/records/<hash>``: one sealed CommittedRecord a file. No pointer to the head could disagree with
them: the head is the record that outranks all others held. Records are verified before they come here; on load
their hashes are checked again. Keeps the head and ``merge_records_kept`` - 1 of its ancestors, nothing else.
"""

from __future__ import annotations

from blake3 import blake3

from gossip.disk import Disk
from gossip.merge_record import Link, genesis_hash, outranks, record_hash
from gossip.messages import CommittedRecord
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage
from p2p.limits import Limits

RECORDS = "merges/records"
DIGEST_BYTES = 32


class MergeChain:
    """Committed records by hash, and the link that comes next."""

    def __init__(self, disk: Disk, *, run: bytes, limits: Limits) -> None:
        self._disk = disk
        self._limits = limits
        self._records: dict[bytes, CommittedRecord] = {}
        self._genesis = Link.genesis(run)
        self.head = genesis_hash(run)
        """Hash of the newest record, or of genesis."""
        self.link = self._genesis
        """What the next record must build on."""
        self.lost: set[bytes] = set()
        """Records that were held and whose files are damaged. They stay where they are until they are fetched again:
        whoever restarts before that must still know that the chain went on."""

    @property
    def head_record(self) -> CommittedRecord | None:
        """The newest committed record; None at genesis."""
        return self._records.get(self.head)

    def get(self, name: bytes) -> CommittedRecord | None:
        """The committed record of that hash, if it is held."""
        return self._records.get(name)

    def link_after(self, name: bytes) -> Link | None:
        """The link after the record of that hash, or after genesis; None when the record is not held."""
        if name == self._genesis.parent:
            return self._genesis
        held = self._records.get(name)
        return Link.after(held.record) if held is not None else None

    async def load(self) -> None:
        """Read the records back; those whose files are damaged are ``lost``."""
        for path, _ in await self._disk.list(RECORDS):
            name = _name_in(path)
            if name is None:
                continue  # Whatever that is, it is not ours.
            try:
                data = unsealed(await self._disk.read(path))
                committed = decode(data, CommittedRecord, bytes_max=self._limits.frame_bytes_max)
            except MalformedMessage:
                self.lost.add(name)
                continue
            if record_hash(committed.record) == name and committed.record.run == self.link.run:
                self._records[name] = committed
                self._follow(name)
        await self._prune()

    async def add(self, committed: CommittedRecord) -> None:
        """Keep a verified record, durably; it becomes the head if it outranks the present one."""
        name = record_hash(committed.record)
        if name in self._records:
            return
        await self._disk.write_atomic(_path(name), sealed(encode(committed)))
        self._records[name] = committed
        self.lost.discard(name)
        self._follow(name)

    async def add_branch(self, branch: list[CommittedRecord]) -> None:
        """Keep a verified run of records, oldest first."""
        for committed in branch:
            await self.add(committed)
        await self._prune()

    def _follow(self, name: bytes) -> None:
        link = Link.after(self._records[name].record)
        if outranks(link.participants_total, name, self.link.participants_total, self.head):
            self.head, self.link = name, link

    async def _prune(self) -> None:
        kept: set[bytes] = set()
        name = self.head
        while name in self._records and len(kept) < self._limits.merge_records_kept:
            kept.add(name)
            name = self._records[name].record.parent
        for stale in self._records.keys() - kept:
            await self._disk.delete(_path(stale))
            del self._records[stale]


def sealed(data: bytes) -> bytes:
    """``data`` behind its BLAKE3 digest: how the merge protocol's files tell rot from truth."""
    return blake3(data).digest() + data


def unsealed(data: bytes) -> bytes:
    """The data behind a seal. Raises MalformedMessage when a bit of it has changed."""
    if blake3(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
        raise MalformedMessage("a damaged file")
    return data[DIGEST_BYTES:]


def _path(name: bytes) -> str:
    return f"{RECORDS}/{name.hex()}"


def _name_in(path: str) -> bytes | None:
    try:
        name = bytes.fromhex(path.removeprefix(f"{RECORDS}/"))
    except ValueError:
        return None
    return name if len(name) == DIGEST_BYTES else None
