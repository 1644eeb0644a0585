"""Batches on disk: our own before anybody hears of them, those of others now and then.

Owns the ``records/`` folder of a run. What is archived is a segment, a file whose name says what its bytes must hash
to; what is lost of others' batches is asked for again. Our own are another matter: a batch that others hold and we
forgot would be followed by a second one in its place, which is a fork. So ``own.cbor`` holds them from before they are
pushed until a segment does, and an author who cannot read it back starts a new log.

Relies on: Disk.write_atomic (old bytes or new, never a mix). Never looks inside a batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
import structlog
import trio
from blake3 import blake3
from msgspec import Meta

from gossip.disk import Disk
from gossip.messages import Certificate, PackedBatch, RecordSnapshot, Settlement
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage

FOLDER = "records"
OWN = f"{FOLDER}/own.cbor"
BASE = f"{FOLDER}/base.cbor"
SEGMENT = re.compile(r"([0-9]{12,})-([0-9a-f]{64})\.cbor")
SEGMENT_BYTES_MAX = 64 << 20
SEGMENTS_SMALL_MAX = 16
"""Segments below a quarter of SEGMENT_BYTES_MAX that may lie beside each other before they are joined."""

K = TypeVar("K", "_Own", "Base")

log = structlog.get_logger()


class _Segment(msgspec.Struct, frozen=True, tag=True, tag_field="t", forbid_unknown_fields=True):
    """Batches, each after the one before it in its log."""

    batches: list[PackedBatch]


class _Own(msgspec.Struct, frozen=True, tag=True, tag_field="t", forbid_unknown_fields=True):
    """The log that we write, and its batches that no segment holds yet. ``hash`` is the BLAKE3 of all the rest."""

    hash: bytes
    incarnation: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    written: Annotated[int, Meta(ge=1)]
    """Batches of it that there are, wherever they are kept."""
    batches: list[PackedBatch]


class Base(msgspec.Struct, frozen=True, tag=True, tag_field="t", forbid_unknown_fields=True):
    """The certified snapshot below which no batches are kept. ``hash`` is the BLAKE3 of all the rest."""

    hash: bytes
    snapshot: RecordSnapshot
    certificate: Certificate
    settlement: Settlement


class RecordArchive:
    """The batches of one run that this node keeps."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._serial = 0
        self._own: list[bytes] = []
        self._writing = trio.Lock()
        self.base: Base | None = None
        """What the batches go on from; None where the first of every log is kept."""
        self.incarnation: int | None = None
        """The log that we write; None when there is none that can be gone on with."""
        self.written = 0
        """Batches of that log: who holds fewer has forgotten what others may have seen."""

    async def load(self) -> list[bytes]:
        """Every batch that is kept and whole, in an order in which it can be offered, going on from ``base``."""
        batches: list[bytes] = []
        try:
            self.base = _whole(await self._disk.read(BASE), Base)
        except FileNotFoundError:
            pass
        except (MalformedMessage, OSError) as error:
            log.warning("settlement damaged, records will be asked for again", error=str(error))
            return []
        for path in await self._segments():
            self._serial = max(self._serial, _parsed(path)[0])
            batches += await self._read(path)
        try:
            own = _whole(await self._disk.read(OWN), _Own)
        except FileNotFoundError:
            return batches
        except (MalformedMessage, OSError) as error:
            log.warning("own records damaged, starting a new log", error=str(error))
            return batches
        self.incarnation, self.written, self._own = own.incarnation, own.written, own.batches
        return batches + own.batches

    def disown(self) -> None:
        """Nothing of what is kept can be gone on with: neither our log nor the base."""
        self.base, self.incarnation, self.written, self._own = None, None, 0, []

    async def keep_own(self, incarnation: int, batch: bytes) -> None:
        """Make a batch of our own durable. Raises OSError; it must not be pushed then."""
        async with self._writing:
            written = self.written + 1 if incarnation == self.incarnation else 1
            await self._write_own(incarnation, written, [*self._own, batch])

    async def keep(self, batches: Sequence[bytes]) -> None:
        """Archive ``batches``, our own among them. Raises OSError, everything that was kept before being kept still."""
        async with self._writing:
            if batches:
                await self._write_segment(batches)
            if self._own and self.incarnation is not None:
                kept = set(batches)
                own = [batch for batch in self._own if batch not in kept]
                await self._write_own(self.incarnation, self.written, own)
            await self._join_small()

    async def keep_above(
        self,
        snapshot: RecordSnapshot,
        certificate: Certificate,
        settlement: Settlement,
        batches: Sequence[bytes],
    ) -> None:
        """Keep ``batches`` and no others: those that go on from a certified snapshot. Raises OSError."""
        async with self._writing:
            old = await self._segments()
            base = Base(hash=b"", snapshot=snapshot, certificate=certificate, settlement=settlement)
            await self._disk.write_atomic(BASE, _sealed(base))
            self.base = base
            if batches:
                await self._write_segment(batches)
            for path in old:
                await self._disk.delete(path)

    async def damaged(self) -> list[str]:
        """Files that are not what was written any more, and which the next start will do without."""
        async with self._writing:
            found = [path for path in await self._segments() if not await self._is_whole(path)]
            if self.incarnation is not None:
                found += await self._damage(OWN, _Own)
            if self.base is not None:
                found += await self._damage(BASE, Base)
        return found

    async def _damage(self, path: str, kind: type[K]) -> list[str]:
        try:
            _whole(await self._disk.read(path), kind)
        except (MalformedMessage, OSError):
            return [path]
        return []

    async def _write_own(self, incarnation: int, written: int, batches: list[bytes]) -> None:
        own = _Own(hash=b"", incarnation=incarnation, written=written, batches=batches)
        await self._disk.write_atomic(OWN, _sealed(own))
        self.incarnation, self.written, self._own = incarnation, written, batches

    async def _write_segment(self, batches: Sequence[bytes]) -> None:
        data = encode(_Segment(batches=list(batches)))
        self._serial += 1
        await self._disk.write_atomic(f"{FOLDER}/{self._serial:012d}-{blake3(data).hexdigest()}.cbor", data)

    async def _join_small(self) -> None:
        """So that a run of weeks has few files: what was written in many goes into one."""
        sizes = dict(await self._disk.list(FOLDER))
        small = [path for path in await self._segments() if sizes[path] < SEGMENT_BYTES_MAX // 4]
        if len(small) <= SEGMENTS_SMALL_MAX:
            return
        batches: list[bytes] = []
        joined, total = [], 0
        for path in small:
            total += sizes[path]
            if total > SEGMENT_BYTES_MAX:
                break
            batches += await self._read(path)
            joined.append(path)
        await self._write_segment(batches)
        for path in joined:
            await self._disk.delete(path)

    async def _is_whole(self, path: str) -> bool:
        try:
            return blake3(await self._disk.read(path)).hexdigest() == _parsed(path)[1]
        except OSError:
            return False

    async def _read(self, path: str) -> list[bytes]:
        """The batches of a segment; none of one that is damaged."""
        try:
            data = await self._disk.read(path)
            if blake3(data).hexdigest() == _parsed(path)[1]:
                return decode(data, _Segment, bytes_max=len(data)).batches
            problem = "its bytes do not match its name"
        except (OSError, MalformedMessage) as error:
            problem = str(error)
        log.warning("records damaged, they will be asked for again", path=path, problem=problem)
        return []

    async def _segments(self) -> list[str]:
        """Paths, oldest first; other files in the folder are not ours to touch."""
        return sorted(
            path for path, _ in await self._disk.list(FOLDER) if SEGMENT.fullmatch(path.rsplit("/", 1)[-1])
        )


def _parsed(path: str) -> tuple[int, str]:
    """Serial number and hash."""
    name = SEGMENT.fullmatch(path.rsplit("/", 1)[-1])
    assert name is not None
    return int(name[1]), name[2]


def _sealed(kept: _Own | Base) -> bytes:
    digest = blake3(encode(kept)).digest()
    return encode(msgspec.structs.replace(kept, hash=digest))


def _whole(data: bytes, kind: type[K]) -> K:
    """Raises MalformedMessage when a bit of it has changed."""
    kept = decode(data, kind, bytes_max=len(data))
    if blake3(encode(msgspec.structs.replace(kept, hash=b""))).digest() != kept.hash:
        raise MalformedMessage("its bytes do not match their hash")
    return kept
