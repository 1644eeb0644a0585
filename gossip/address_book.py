"""Where peers can be dialled: addresses by source, how dialling them went, and when to try again.

Owns the parsing of address text, the back-off schedule and the file ``peers.json``. Never dials and never
resolves a name. A node restarted without its bootstrap peers finds the swarm through this file.

Peers are never given up, only tried less and less often: a whole swarm may be switched off for a night. When
the book is full an entry of the most crowded address range is displaced, there the most failed: whoever has many
addresses of one range drives out its own kind. An entry from a bootstrap address or an invite never is, nor an anchor.

Anchors are a few peers that were links of our own choice for long, in different address ranges: the next life begins
with them, whatever the book was filled with since.
"""

from __future__ import annotations

import functools
import ipaddress
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
import structlog
from msgspec import Meta

from gossip.address_ranges import most_diverse, range_of
from gossip.disk import Disk
from p2p.circuits import split_circuit
from p2p.errors import AddressError
from p2p.identity import is_peer_id, public_key_of
from p2p.limits import Limits
from p2p.transport import PeerId, PeerRecord

PATH = "peers.json"
BACK_OFF_FIRST_S = 1.0
BACK_OFF_MAX_S = 300.0
BACK_OFF_PERMANENT_MAX_S = 20.0
"""Bootstrap and invited peers are tried again at least this often: they may be the only way in."""

AddressSource = Literal["bootstrap", "invite", "heartbeat", "hello", "exchange", "lan", "dht"]
_PERMANENT = ("bootstrap", "invite")
ANCHORS_MAX = 4
ADDRESSES_REMEMBERED = 1 << 14
"""Addresses are named again and again, by each neighbour and in every heartbeat."""
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_PORT = re.compile(r"[1-9][0-9]{0,4}")

log = structlog.get_logger()


@functools.lru_cache(maxsize=ADDRESSES_REMEMBERED)
def check_address(text: str, *, chars_max: int) -> str:
    """``text`` if it is ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`` and can be dialled. Raises AddressError.

    That may be a relay's, if ``/p2p/RELAY/p2p-circuit`` follows, with its peer id. Unspecified and multicast hosts are
    refused. Loopback and private hosts are not: swarms live there too.
    """
    why = "peers connect to a host that others can reach, at a TCP port"
    fix = "addresses look like /ip4/192.0.2.7/tcp/4100 or /dns/example.org/tcp/4100"
    if len(text) > chars_max:
        raise AddressError(
            f"an address of {len(text)} characters, the limit is {chars_max}", why=why, fix=fix
        )
    relay_address, relay = split_circuit(text) or (text, None)
    match relay_address.split("/"):
        case ["", family, host, "tcp", port] if _PORT.fullmatch(port) and int(port) < 1 << 16:
            if _is_host(family, host) and (relay is None or is_peer_id(relay)):
                return text
    raise AddressError(f"{text!r} is not an address that can be dialled", why=why, fix=fix)


def can_be_dialled(text: str, *, chars_max: int) -> bool:
    """Whether ``check_address`` lets it pass."""
    try:
        check_address(text, chars_max=chars_max)
    except AddressError:
        return False
    return True


def _is_host(family: str, host: str) -> bool:
    if family in ("dns", "dns4", "dns6"):
        return len(host) <= 253 and _HOST_NAME.fullmatch(host) is not None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if family != f"ip{address.version}":
        return False
    return not address.is_unspecified and not address.is_multicast


def parse_peer_address(text: str, *, chars_max: int) -> tuple[PeerId, str]:
    """The peer id and the address in ``ADDRESS/p2p/PEER``, as invites and bootstrap lists name peers.

    Raises AddressError.
    """
    address, _, peer = text.rpartition("/p2p/")
    try:
        public_key_of(PeerId(peer))
    except ValueError as error:
        raise AddressError(
            f"{text!r} does not end in /p2p/ and a peer id",
            why="a peer is only believed when it proves the id it was named by",
            fix="copy the whole line; it looks like /ip4/192.0.2.7/tcp/4100/p2p/12D3Koo...",
        ) from error
    return PeerId(peer), check_address(address, chars_max=chars_max)


def _ranges(addresses: Iterable[str]) -> set[str]:
    return {range_of(address) for address in addresses}


@dataclass(slots=True)
class _Entry:
    sources: dict[str, AddressSource] = field(default_factory=dict)
    """Address -> where it was learnt last, oldest first."""
    told: tuple[AddressSource, tuple[str, ...]] | None = None
    """What was added last, and from where."""
    failures: int = 0
    successes: int = 0
    retry_s: float = 0.0
    last_error: str = ""
    permanent: bool = False
    """Whether a source is permanent, as one stays then."""

    @property
    def badness(self) -> tuple[int, int]:
        return self.failures, -self.successes


class _StoredPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    peer: str
    addresses: Annotated[list[str], Meta(max_length=64)]
    successes: Annotated[int, Meta(ge=0)]
    anchor: Annotated[str, Meta(max_length=256)] = ""
    """Where this peer was dialled as a link that lasted; empty for all but ANCHORS_MAX."""


class AddressBook:
    """Addresses of at most ``limits.address_book_max`` peers, ourselves (``local``) left out."""

    def __init__(self, disk: Disk, *, local: PeerId, limits: Limits, rng: random.Random) -> None:
        self._disk = disk
        self._local = local
        self._limits = limits
        self._rng = rng
        self._entries: dict[PeerId, _Entry] = {}
        self._crowd: Counter[str] = Counter()
        """How many entries name addresses in each range."""
        self._saved: bytes = b""
        self._begun_with: dict[PeerId, str] = {}
        """The anchors of the life before."""
        self._anchors: dict[PeerId, str] = {}
        """Those for the next one."""

    # --- learning ---------------------------------------------------------------------------------------------

    def add(self, peer: PeerId, addresses: Iterable[str], source: AddressSource) -> bool:
        """Remember where ``peer`` may be dialled; addresses that cannot be dialled are skipped.

        A heartbeat or hello is the peer's own word, so it replaces what the peer said before. Returns whether
        the peer is new.
        """
        entry = self._entries.get(peer)
        told = source, tuple(addresses)
        if entry is not None and entry.told == told:
            return False  # Every heartbeat says it again.
        usable = [
            address
            for address in told[1]
            if can_be_dialled(address, chars_max=self._limits.address_chars_max)
        ][: self._limits.addresses_per_peer_max]
        if peer == self._local or not usable:
            return False
        known = entry is not None
        if entry is None:
            if not self._make_room(usable, permanent=source in _PERMANENT):
                return False
            entry = self._entries[peer] = _Entry()
        ranges_before = _ranges(entry.sources)
        entry.told = told
        entry.permanent = entry.permanent or source in _PERMANENT
        if source in ("heartbeat", "hello"):
            entry.sources = {
                address: learnt
                for address, learnt in entry.sources.items()
                if learnt in _PERMANENT or address in usable
            }
        for address in usable:
            if entry.sources.get(address) not in _PERMANENT:
                if address not in entry.sources:
                    # Somewhere new to try is worth trying at once.
                    entry.retry_s = 0.0
                entry.sources[address] = source
        while len(entry.sources) > self._limits.addresses_per_peer_max:
            oldest = next(
                (a for a, s in entry.sources.items() if s not in _PERMANENT), next(iter(entry.sources))
            )
            del entry.sources[oldest]
        ranges = _ranges(entry.sources)
        if ranges != ranges_before:
            self._crowd.update(ranges)
            self._leave(ranges_before)
        return not known

    def _leave(self, ranges: Collection[str]) -> None:
        self._crowd.subtract(ranges)
        for each in ranges:
            if not self._crowd[each]:
                del self._crowd[each]

    def _make_room(self, newcomer: Iterable[str], *, permanent: bool) -> bool:
        """Whether there is room for an entry with the addresses ``newcomer``, if need be in place of another."""
        if len(self._entries) < self._limits.address_book_max:
            return True
        kept = self._begun_with.keys() | self._anchors.keys()
        worst = max(
            (peer for peer, entry in self._entries.items() if not entry.permanent and peer not in kept),
            key=lambda peer: (self._crowding(self._entries[peer].sources), self._entries[peer].badness),
            default=None,
        )
        if worst is None:
            return False
        entry = self._entries[worst]
        crowded = self._crowding(entry.sources) > self._crowding(newcomer) + 1
        if not crowded and entry.failures == 0 and not permanent:
            return False
        self._leave(_ranges(entry.sources))
        del self._entries[worst]
        return True

    def _crowding(self, addresses: Iterable[str]) -> int:
        """How many entries share a range with the addresses of one, where they are most."""
        return max(self._crowd[range_of(address)] for address in addresses)

    # --- dialling ---------------------------------------------------------------------------------------------

    def record(self, peer: PeerId) -> PeerRecord | None:
        """Where ``peer`` may be dialled, newest addresses first; None when nothing is known."""
        entry = self._entries.get(peer)
        return PeerRecord(peer, tuple(reversed(entry.sources))) if entry is not None else None

    def due(
        self, count: int, *, exclude: Iterable[PeerId], now_s: float, outside: Collection[str] = ()
    ) -> list[PeerRecord]:
        """Up to ``count`` peers to dial now: permanent ones first, then the anchors of the life before, else at random
        among the least failed.

        With ``outside`` only at addresses that are in none of these ranges: an address that is only claimed fails.
        """
        if outside and self._crowd.keys() <= set(outside):
            return []
        excluded = set(exclude)
        ready = [
            peer
            for peer, entry in self._entries.items()
            if peer not in excluded
            and entry.retry_s <= now_s
            and (not outside or any(range_of(address) not in outside for address in entry.sources))
        ]
        self._rng.shuffle(ready)
        ready.sort(key=self._dial_order)
        records = [record for peer in ready[:count] if (record := self.record(peer)) is not None]
        if not outside:
            return records
        return [
            PeerRecord(
                record.peer,
                tuple(address for address in record.addresses if range_of(address) not in outside),
            )
            for record in records
        ]

    def _dial_order(self, peer: PeerId) -> tuple[bool, bool, int]:
        entry = self._entries[peer]
        return not entry.permanent, peer not in self._begun_with, entry.failures

    def succeeded(self, peer: PeerId) -> None:
        """A dial worked, or the peer dialled us and greeted."""
        if (entry := self._entries.get(peer)) is not None:
            entry.successes += 1
            entry.failures = 0
            entry.retry_s = 0.0
            entry.last_error = ""

    def failed(self, peer: PeerId, error: str, now_s: float, *, for_long: bool = False) -> None:
        """A dial failed: wait twice as long as last time, with jitter, up to a cap.

        ``for_long``: it is there and follows another run or rests, so there is no hurry, even if a person has named it.
        """
        entry = self._entries.get(peer)
        if entry is None:
            return
        entry.failures += 1
        entry.last_error = error
        longest_s = BACK_OFF_PERMANENT_MAX_S if entry.permanent else BACK_OFF_MAX_S
        # The exponent is capped too: 2.0 ** failures of a peer retried for ever would overflow one day.
        delay_s = min(BACK_OFF_FIRST_S * 2.0 ** min(entry.failures - 1, 16), longest_s)
        if for_long:
            delay_s = BACK_OFF_MAX_S
        entry.retry_s = now_s + delay_s * self._rng.uniform(0.5, 1.0)

    def failing(self) -> list[tuple[PeerId, str]]:
        """Permanent peers whose last dial failed, with the error: what to tell a person who has no peers."""
        return [
            (peer, entry.last_error)
            for peer, entry in self._entries.items()
            if entry.permanent and entry.failures > 0
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def name_anchors(self, lasting: Iterable[tuple[PeerId, str]]) -> None:
        """Peers that we have dialled and were linked to for long, and where, the oldest links first.

        Fewer than ANCHORS_MAX are made up with those of before: who was cut off for long shall find back too.
        """
        candidates = [*lasting, *self._anchors.items()]
        self._anchors = most_diverse(
            ((peer, address) for peer, address in candidates if peer in self._entries), ANCHORS_MAX
        )

    # --- keeping ----------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Add the peers of earlier lives. A damaged file is reported and ignored: it holds hints only."""
        try:
            data = await self._disk.read(PATH)
        except FileNotFoundError:
            return
        try:
            stored = msgspec.json.decode(data, type=list[_StoredPeer])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("address book damaged, starting a new one", path=PATH, error=str(error))
            return
        for item in stored[: self._limits.address_book_max]:
            self.add(PeerId(item.peer), item.addresses, "exchange")
            if (entry := self._entries.get(PeerId(item.peer))) is not None:
                entry.successes = item.successes
                if item.anchor in entry.sources and len(self._begun_with) < ANCHORS_MAX:
                    self._begun_with[PeerId(item.peer)] = item.anchor
        self._anchors = dict(self._begun_with)

    async def save(self) -> None:
        """Write the file if it changed. Raises OSError."""
        data = msgspec.json.format(
            msgspec.json.encode(
                [
                    _StoredPeer(
                        peer=peer,
                        addresses=list(entry.sources),
                        successes=entry.successes,
                        anchor=self._anchors.get(peer, ""),
                    )
                    for peer, entry in sorted(self._entries.items())
                ]
            )
        )
        if data != self._saved:
            await self._disk.write_atomic(PATH, data, sync=False)
            self._saved = data
