"""What the hash table holds: who takes part in a run, in the provider's own signed words, for a while. No IO.

Owns the making of provider records, the check of others', and the store of those held here. A member's heartbeat would
not do for one: it tells whoever holds it the run, it never ends, and a rendezvous has none.

Records expire by the wall clock, and nothing else does: a node whose clock is off by more than CLOCK_OFF_S is not found
by this way, and not harmed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from gossip.address_book import can_be_dialled
from gossip.address_ranges import range_of
from gossip.messages import DHT_RECORDS_TOLD_MAX, ProviderClaim, ProviderRecord
from p2p.codec import encode
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.transport import PeerId

PURPOSE = "gossamer/provider/1"
RECORD_S = 3600
"""How long a record counts: somebody who is gone is named for so long at most."""
CLOCK_OFF_S = 600
"""By so much two clocks may differ."""
RENEWED_S_MIN = 60
"""A record that says the same and ends hardly later is not taken again: checking a signature is work."""
RECORDS_MAX = 4096
RECORDS_PER_KEY_MAX = 64
RECORDS_PER_PEER_MAX = 16
RECORDS_PER_RANGE_MAX = 1024


class RecordRefused(Exception):
    """A record does not hold; ``reason`` is one of the ledger's, or "expired", which an honest peer's may be."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def sign_record(signer: Signer, key: bytes, addresses: Sequence[str], *, now_unix_s: float) -> ProviderRecord:
    """That ``signer`` provides ``key`` at ``addresses``, from now on."""
    claim = ProviderClaim(
        key=key, peer=signer.peer, addresses=list(addresses), expires_unix_s=int(now_unix_s) + RECORD_S
    )
    return ProviderRecord(
        key=claim.key,
        peer=claim.peer,
        addresses=claim.addresses,
        expires_unix_s=claim.expires_unix_s,
        signature=signer.sign(PURPOSE, encode(claim)),
    )


def check_record(
    record: ProviderRecord, key: bytes, *, now_unix_s: float, signer: Signer, limits: Limits
) -> None:
    """That ``record`` is one of ``key`` and counts now. Raises RecordRefused."""
    if record.key != key:
        raise RecordRefused("malformed")
    if not now_unix_s < record.expires_unix_s <= now_unix_s + RECORD_S + CLOCK_OFF_S:
        raise RecordRefused("expired")
    if not all(can_be_dialled(each, chars_max=limits.address_chars_max) for each in record.addresses):
        raise RecordRefused("malformed")
    claim = ProviderClaim(
        key=record.key, peer=record.peer, addresses=record.addresses, expires_unix_s=record.expires_unix_s
    )
    if not signer.verify(PeerId(record.peer), PURPOSE, encode(claim), record.signature):
        raise RecordRefused("signature")


class RecordStore:
    """The records held here, each brought by its provider itself."""

    def __init__(self, *, signer: Signer, limits: Limits, rng: random.Random) -> None:
        self._signer = signer
        self._limits = limits
        self._rng = rng
        self._keys: dict[bytes, dict[str, ProviderRecord]] = {}
        """By key and provider."""
        self._of_peer: Counter[str] = Counter()
        self._of_range: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._of_peer.total()

    def put(self, record: ProviderRecord, *, now_unix_s: float) -> None:
        """Hold ``record`` if there is room. Raises RecordRefused."""
        held = self._keys.get(record.key, {}).get(record.peer)
        if (
            held is not None
            and record.addresses == held.addresses
            and record.expires_unix_s < held.expires_unix_s + RENEWED_S_MIN
        ):
            return
        check_record(record, record.key, now_unix_s=now_unix_s, signer=self._signer, limits=self._limits)
        if held is not None:
            if record.expires_unix_s <= held.expires_unix_s:
                return  # An old one of those that its provider has signed.
            self._drop(held)
        if self._make_room(record, now_unix_s):
            self._keys.setdefault(record.key, {})[record.peer] = record
            self._count(record, 1)

    def of(self, key: bytes, *, now_unix_s: float) -> list[ProviderRecord]:
        """Some records of ``key`` at random, as many as one answer tells."""
        self._drop_where(lambda each: each.expires_unix_s <= now_unix_s, self._of_key(key))
        held = self._of_key(key)
        return self._rng.sample(held, min(DHT_RECORDS_TOLD_MAX, len(held)))

    def _make_room(self, record: ProviderRecord, now_unix_s: float) -> bool:
        """Whether ``record`` may be held, if need be in place of another of its key."""
        if self._is_full_for(record):
            self._drop_where(lambda each: each.expires_unix_s <= now_unix_s, self._all())
        if self._is_full_for(record):
            return False
        of_key = self._of_key(record.key)
        if len(of_key) < RECORDS_PER_KEY_MAX:
            return True
        # Of one key too many: whoever has many addresses of one range drives out its own kind.
        crowd = Counter(each for one in of_key for each in _ranges(one))
        worst = max(of_key, key=lambda one: _crowding(one, crowd))
        if _crowding(worst, crowd) <= _crowding(record, crowd) + 1:
            return False
        self._drop(worst)
        return True

    def _is_full_for(self, record: ProviderRecord) -> bool:
        return (
            len(self) >= RECORDS_MAX
            or self._of_peer[record.peer] >= RECORDS_PER_PEER_MAX
            or any(self._of_range[each] >= RECORDS_PER_RANGE_MAX for each in _ranges(record))
        )

    def _of_key(self, key: bytes) -> list[ProviderRecord]:
        return list(self._keys.get(key, {}).values())

    def _all(self) -> list[ProviderRecord]:
        return [record for key in self._keys for record in self._of_key(key)]

    def _drop_where(
        self, condition: Callable[[ProviderRecord], bool], records: Sequence[ProviderRecord]
    ) -> None:
        for record in records:
            if condition(record):
                self._drop(record)

    def _drop(self, record: ProviderRecord) -> None:
        del self._keys[record.key][record.peer]
        if not self._keys[record.key]:
            del self._keys[record.key]
        self._count(record, -1)

    def _count(self, record: ProviderRecord, change: int) -> None:
        for counter, names in ((self._of_peer, {record.peer}), (self._of_range, _ranges(record))):
            for name in names:
                counter[name] += change
                if not counter[name]:
                    del counter[name]


def _ranges(record: ProviderRecord) -> set[str]:
    return {range_of(address) for address in record.addresses}


def _crowding(record: ProviderRecord, crowd: Counter[str]) -> int:
    return max(crowd[each] for each in _ranges(record))
