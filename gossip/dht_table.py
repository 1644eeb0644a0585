"""Which nodes of the hash table this one knows: a Kademlia routing table. No input or output.

Owns identifiers, distances, buckets, and who is kept when a bucket is full. Every node and every key is a point of 256
bits; the distance of two is their exclusive or. A bucket holds up to BUCKET_MAX contacts whose distances from here have
the same highest bit, so that a node knows its own surroundings well and of everything else a few.

Only who has answered is put in. A full bucket keeps whom it has, since what has been there for long will be there
longer, with one exception: the contact of the most crowded address range gives way to one of a less crowded range.
Whoever has many addresses of one range drives out its own kind.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from gossip.address_ranges import range_of
from gossip.messages import DHT_BUCKET_MAX
from p2p.transport import PeerId, PeerRecord

KEY_BYTES = 32
BUCKET_MAX = DHT_BUCKET_MAX
RANGE_MAX = BUCKET_MAX // 2
"""Of the closest to a key, so many in one address range as long as there are others."""
FAILURES_MAX = 2
"""In a row; then a contact is dropped."""
PEERS_REMEMBERED = 1 << 12
"""Points of peers, which are worked out again and again."""


def run_key(run: bytes) -> bytes:
    """Where records of ``run`` are kept. Who holds them does not learn which run that is."""
    return blake3(b"gossamer/dht/run\0" + run).digest()


@functools.lru_cache(maxsize=PEERS_REMEMBERED)
def peer_key(peer: PeerId) -> bytes:
    """The point at which ``peer`` is."""
    return blake3(b"gossamer/dht/peer\0" + peer.encode()).digest()


def distance(left: bytes, right: bytes) -> int:
    """How far two points are from each other."""
    return int.from_bytes(left) ^ int.from_bytes(right)


def closest(records: Iterable[PeerRecord], key: bytes, count: int = BUCKET_MAX) -> list[PeerRecord]:
    """The ``count`` of ``records`` that are closest to ``key``, in order.

    At most RANGE_MAX are of one address range unless there are too few others: ids close to a key can be made at will,
    addresses in many ranges cannot.
    """
    ordered = sorted(records, key=lambda record: distance(peer_key(record.peer), key))
    crowd: Counter[str] = Counter()
    first: list[PeerRecord] = []
    others: list[PeerRecord] = []
    for record in ordered:
        ranges = _ranges(record)
        (first if all(crowd[each] < RANGE_MAX for each in ranges) else others).append(record)
        crowd.update(ranges)
    chosen = {record.peer for record in (first + others)[:count]}
    return [record for record in ordered if record.peer in chosen]


def _ranges(record: PeerRecord) -> set[str]:
    return {range_of(address) for address in record.addresses}


@dataclass(slots=True)
class _Contact:
    record: PeerRecord
    answered_s: float
    failures: int = 0


class RoutingTable:
    """What ``local`` knows of the others."""

    def __init__(self, local: PeerId) -> None:
        self._local = local
        self._key = peer_key(local)
        self._buckets: dict[int, dict[PeerId, _Contact]] = {}

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._buckets.get(self._index(peer), {})

    def has_room_for(self, record: PeerRecord) -> bool:
        """Whether ``record``, of a peer that is not in here, would be put in if it answered."""
        bucket = self._buckets.get(self._index(record.peer), {})
        if record.peer == self._local or record.peer in bucket:
            return False
        return len(bucket) < BUCKET_MAX or self._gives_way(bucket, record) is not None

    def answered(self, record: PeerRecord, now_s: float) -> None:
        """A peer has answered a call."""
        if record.peer == self._local:
            return
        bucket = self._buckets.setdefault(self._index(record.peer), {})
        if record.peer not in bucket and len(bucket) == BUCKET_MAX:
            gives_way = self._gives_way(bucket, record)
            if gives_way is None:
                return
            del bucket[gives_way]
        bucket[record.peer] = _Contact(record, now_s)

    def failed(self, peer: PeerId) -> None:
        """A peer has not answered a call, or with something that is no answer."""
        bucket = self._buckets.get(self._index(peer), {})
        if (contact := bucket.get(peer)) is not None:
            contact.failures += 1
            if contact.failures >= FAILURES_MAX:
                del bucket[peer]

    def closest(self, key: bytes, *, exclude: PeerId | None = None) -> list[PeerRecord]:
        """The BUCKET_MAX contacts closest to ``key``."""
        return closest((each.record for each in self._contacts() if each.record.peer != exclude), key)

    def stalest(self, *, before_s: float) -> PeerRecord | None:
        """The contact that has not answered for longest, if that was before then."""
        contact = min(self._contacts(), key=lambda each: each.answered_s, default=None)
        return contact.record if contact is not None and contact.answered_s < before_s else None

    def key_near(self, peer: PeerId, rng: random.Random) -> bytes:
        """A point at random in the bucket of ``peer``."""
        index = self._index(peer)
        return (int.from_bytes(self._key) ^ (1 << index | rng.getrandbits(index))).to_bytes(KEY_BYTES)

    def _contacts(self) -> list[_Contact]:
        return [contact for bucket in self._buckets.values() for contact in bucket.values()]

    def _index(self, peer: PeerId) -> int:
        return max(0, distance(self._key, peer_key(peer)).bit_length() - 1)

    def _gives_way(self, bucket: Mapping[PeerId, _Contact], record: PeerRecord) -> PeerId | None:
        """Who of a full bucket makes room for ``record``; None where nobody does."""
        crowd = Counter(each for contact in bucket.values() for each in _ranges(contact.record))

        def crowding(one: PeerRecord) -> int:
            return max(crowd[each] for each in _ranges(one))

        # Of equally crowded ones the youngest: who has been here for long is worth more.
        peer = max(reversed(list(bucket)), key=lambda each: crowding(bucket[each].record))
        return peer if crowding(bucket[peer].record) > crowding(record) + 1 else None
