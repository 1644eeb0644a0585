"""A batch of records: how it is made, named and checked, given the batch before it.

Owns the rules of docs/PROTOCOL.md, "Batches", each a pure function of a batch, its predecessor and the run, so that a
batch is valid at every honest node or at none. Never holds a log, and knows nothing of who else has a batch
(``gossip.record_logs``).

Relies on ``Signer`` for signatures; on the codec for sizes and the one canonical form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from blake3 import blake3
from msgspec.structs import replace

from gossip.messages import (
    LOG_NAME_BYTES,
    PACKED_BATCH_BYTES_MAX,
    FirstBatch,
    FirstBatchClaim,
    NextBatch,
    NextBatchClaim,
)
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage
from p2p.identity import Signer
from p2p.transport import PeerId

PURPOSE = "gossamer/batch/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRules:
    """What bounds a log. All of them belong to the run spec: nodes with different rules never meet."""

    records_max: int = 512
    """Records in a batch."""
    allowance: int = 4096
    """Records that a log may hold whatever its clock says."""
    share_percent: int = 100
    """Records beyond the allowance that it may hold, in percent of its clock."""
    reach: int = 1 << 16
    """How far a clock may be ahead of what is applied before its batch waits. Records that a proven fork takes away
    leave the clocks of others ahead by as many, and no honest batch should wait for that."""
    opening_cost: int = 4096
    """Records that must be applied, less ``reach``, for each log that an author opened before."""

    def capacity(self, clock: int) -> int:
        """How many records a log may hold with a batch of this clock."""
        return self.allowance + self.share_percent * clock // 100


@dataclass(frozen=True, slots=True)
class Batch:
    """A checked batch, at its place in its log."""

    name: bytes
    """BLAKE3 of its claim, 32 bytes."""
    log: bytes
    """BLAKE3 of its author and incarnation in this run, 16 bytes."""
    author: PeerId
    incarnation: int
    number: int
    """Batches before it in its log."""
    first: int
    """Records before it in its log: the sequence number of its first."""
    clock: int
    records: bytes
    previous: bytes | None
    packed: bytes = field(repr=False)
    """As it travels."""

    @property
    def end(self) -> int:
        """Records of the log up to here."""
        return self.first + len(self.records)


class Fault(StrEnum):
    """Why a batch can be valid nowhere."""

    MALFORMED = "malformed"
    SIGNATURE = "signature"
    OVERSIZED = "oversized"
    CLOCK_FELL = "clock-fell"
    FLOOD = "flood"


class InvalidBatch(Exception):
    """The batch is valid at no honest node, so no honest peer passes it on."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.value)
        self.fault = fault


def log_name(run: bytes, author: PeerId, incarnation: int) -> bytes:
    """Names a log in version vectors and in the keys of its directions."""
    payload = b"".join((run, incarnation.to_bytes(8, "little"), author.encode()))
    return blake3(payload, derive_key_context="gossamer one-byte logs 1").digest(length=LOG_NAME_BYTES)


def parse(packed: bytes) -> FirstBatch | NextBatch:
    """What ``packed`` says, unchecked but for its form. Raises InvalidBatch."""
    try:
        return decode(packed, FirstBatch | NextBatch, bytes_max=PACKED_BATCH_BYTES_MAX)  # type: ignore[arg-type]
    except MalformedMessage as error:
        raise InvalidBatch(Fault.MALFORMED) from error


def name_of(run: bytes, message: FirstBatch | NextBatch) -> bytes:
    """The name of the batch that ``message`` is."""
    return blake3(_claim(run, message)).digest()


def check(
    run: bytes,
    packed: bytes,
    message: FirstBatch | NextBatch,
    before: Batch | None,
    rules: LogRules,
    signer: Signer,
) -> Batch:
    """The batch that ``message`` is after ``before`` (None for a FirstBatch). Raises InvalidBatch."""
    if isinstance(message, FirstBatch):
        author, incarnation, number, first = PeerId(message.author), message.incarnation, 0, 0
        previous, clock_before = None, 0
    else:
        assert before is not None
        assert before.name == message.previous
        author, incarnation, number, first = before.author, before.incarnation, before.number + 1, before.end
        previous, clock_before = before.name, before.clock
    if len(message.records) > rules.records_max:
        raise InvalidBatch(Fault.OVERSIZED)
    if message.clock < clock_before:
        raise InvalidBatch(Fault.CLOCK_FELL)
    if first + len(message.records) > rules.capacity(message.clock):
        raise InvalidBatch(Fault.FLOOD)
    claim = _claim(run, message)
    if not signer.verify(author, PURPOSE, claim, message.signature):
        raise InvalidBatch(Fault.SIGNATURE)
    return Batch(
        name=blake3(claim).digest(),
        log=before.log if before else log_name(run, author, incarnation),
        author=author,
        incarnation=incarnation,
        number=number,
        first=first,
        clock=message.clock,
        records=message.records,
        previous=previous,
        packed=packed,
    )


def make(
    run: bytes, signer: Signer, before: Batch | None, incarnation: int, clock: int, records: bytes
) -> bytes:
    """The packed batch of ``records`` after ``before``, or the first of ``incarnation``, signed."""
    unsigned: FirstBatch | NextBatch
    if before is None:
        unsigned = FirstBatch(
            author=signer.peer, incarnation=incarnation, clock=clock, records=records, signature=bytes(64)
        )
    else:
        unsigned = NextBatch(previous=before.name, clock=clock, records=records, signature=bytes(64))
    signature = signer.sign(PURPOSE, _claim(run, unsigned))
    return encode(replace(unsigned, signature=signature))


def _claim(run: bytes, message: FirstBatch | NextBatch) -> bytes:
    if isinstance(message, FirstBatch):
        return encode(
            FirstBatchClaim(
                run=run,
                author=message.author,
                incarnation=message.incarnation,
                clock=message.clock,
                records=message.records,
            )
        )
    return encode(
        NextBatchClaim(run=run, previous=message.previous, clock=message.clock, records=message.records)
    )
