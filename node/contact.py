"""Contact: in touch with one run's swarm. What a member and a rendezvous have in common.

Owns the parts that find, hear and pass on: ledger, notices, members, address book, links, reachability,
reconciliation, hash table, adverts of swarms, and what goes between them. Of its own it says where it is, and where its
owner wants that, what its run is for: who publishes a heartbeat is a member, and only ``node.node`` does.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import trio

from gossip.address_book import AddressBook, parse_peer_address
from gossip.address_ranges import best_for_strangers
from gossip.advert_table import ADVERT_S
from gossip.adverts import AdvertExchange
from gossip.anti_entropy import AntiEntropy
from gossip.dht import Dht
from gossip.dht_search import SEEDS_MAX, DhtSearch
from gossip.dht_table import KEY_BYTES, run_key
from gossip.disk import Disk
from gossip.ledger import PeerLedger
from gossip.links import Links
from gossip.members import MemberTable
from gossip.messages import Heartbeat, Message
from gossip.notices import NoticeTable
from gossip.reachability import Reachability
from gossip.visits import GUESTS_MAX
from node.runtime import ContactOptions
from p2p.advert import ADDRESSES_MAX, Advert, Claim, sign_advert
from p2p.errors import GossamerError
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.transport import PeerDown, PeerEvent, PeerId, PeerRecord, PeerUp, Transport
from training.run_spec import RunSpec, canonical_bytes, run_id


class Contact:
    """One peer's contact with the swarm of ``spec``."""

    pace = 1.0
    """How much more rarely than usual a mode beats and reconciles: its members wait for nobody's heartbeat."""

    def __init__(
        self,
        *,
        transport: Transport,
        disk: Disk,
        signer: Signer,
        rng: random.Random,
        options: ContactOptions,
        spec: RunSpec,
        incarnation: int,
        wall_time_s: Callable[[], float],
    ) -> None:
        """``incarnation``: of the notices that this peer publishes, if it does.

        Raises GossamerError where a private swarm is to be advertised.
        """
        self.spec = spec
        self.run_id = run_id(spec)
        self.limits = limits = options.limits
        self.local = signer.peer
        self.signer = signer
        self.transport = transport
        self.ledger = PeerLedger(options.allowed and options.allowed | {signer.peer})
        self.swarm_key = options.swarm_key
        self._about = options.advertise
        if self._about:
            self._check_open()
        self.notices = NoticeTable(signer=signer, run=self.run_id, incarnation=incarnation, limits=limits)
        self.members = MemberTable(local=self.local, pace=self.pace)
        self.book = AddressBook(disk, local=self.local, limits=limits, rng=rng)
        self.links = Links(
            transport=transport,
            book=self.book,
            ledger=self.ledger,
            notices=self.notices,
            run=self.run_id,
            spec=canonical_bytes(spec),
            agent=options.agent,
            bootstrap=options.bootstrap,
            limits=limits,
            rng=rng,
            guests_max=GUESTS_MAX if options.dht else 0,
        )
        self.reachability = Reachability(
            transport=transport, links=self.links, book=self.book, ledger=self.ledger, limits=limits
        )
        self.anti_entropy = AntiEntropy(
            transport=transport,
            notices=self.notices,
            ledger=self.ledger,
            limits=limits,
            rng=rng,
            pace=self.pace,
            company=self.links,
        )
        self._bootstrap = bootstrap_records(options.bootstrap, limits)
        self.dht = self._build_dht(signer, rng, wall_time_s) if options.dht else None
        self.adverts = (
            self._build_adverts(signer, rng, wall_time_s) if options.dht or options.advertise else None
        )
        self.began_s = trio.current_time()
        self.bytes_sent_today = 0
        """Since 00:00 UTC, by this and earlier processes; ``node.day_budget`` counts."""
        self.bytes_received_today = 0

    async def rest(self, why: str) -> None:
        """Leave the swarm in order and be in touch with nobody, until ``resume``; ``why`` is for people."""
        self.links.rest(why)
        if self.links.neighbours:
            await self._say_goodbye()
        await self.links.part_with_all("resting")

    def resume(self) -> None:
        """Come back, like a machine that slept."""
        self.links.resume()

    async def _say_goodbye(self) -> None:
        """Tell the neighbours that this peer leaves, if they think that it is there."""

    def refusals(self) -> dict[str, int]:
        """What peers were refused for, by reason: connections by the transport, the rest by the ledger."""
        return dict(self.ledger.refusals + Counter(self.transport.traffic().connections_refused))

    def known_addresses(self) -> list[str]:
        """Of this peer and of its neighbours, one each, which strangers are most likely to reach."""
        near = (self.book.record(peer) for peer in self.links.neighbours)
        records = [self.transport.local, *(record for record in near if record is not None)]
        return [
            f"{best_for_strangers(record.addresses)}/p2p/{record.peer}"
            for record in records
            if record.addresses
        ]

    def advert(self, about: str, expires_unix_s: int) -> Advert:
        """This peer's word that the run is there. Raises GossamerError in a private swarm."""
        self._check_open()
        claim = Claim(
            name=self.spec.name,
            about=about,
            run=self.run_id.hex(),
            parameters=getattr(self.spec.model, "parameters", 0),
            addresses=self.known_addresses()[:ADDRESSES_MAX],
            expires_unix_s=expires_unix_s,
        )
        return sign_advert(self.signer, claim)

    def _check_open(self) -> None:
        if self.swarm_key is not None:
            raise GossamerError(
                "this swarm is private",
                why="an advert is for everybody, and without the swarm's key nobody can connect",
                fix='invite those whom you want: gossamer invite    (with advertise = "" in config.toml)',
            )

    def _heard(self, author: PeerId, beat: Heartbeat) -> None:
        """A member's newest heartbeat has arrived."""

    def _keep_contact(self, nursery: trio.Nursery) -> None:
        """Begin, once the address book is loaded and whatever we say of ourselves is said."""
        self.notices.on_change(self._heed)
        nursery.start_soon(self.links.run)
        nursery.start_soon(self.reachability.run)
        nursery.start_soon(self.anti_entropy.run)
        nursery.start_soon(self._follow_connections, self.transport.peer_events())
        if self.dht is not None:
            nursery.start_soon(self.dht.run)
        if self.adverts is not None:
            nursery.start_soon(self.adverts.run)

    def _build_dht(self, signer: Signer, rng: random.Random, wall_time_s: Callable[[], float]) -> Dht:
        search = DhtSearch(
            transport=self.transport,
            visits=self.links.visits,
            signer=signer,
            ledger=self.ledger,
            limits=self.limits,
            wall_time_s=wall_time_s,
            seeds=self._dht_seeds,
            addresses=lambda: self.transport.local.addresses[: self.limits.addresses_per_peer_max],
        )
        return Dht(
            transport=self.transport,
            search=search,
            signer=signer,
            ledger=self.ledger,
            limits=self.limits,
            rng=rng,
            wall_time_s=wall_time_s,
            key=run_key(self.run_id),
            hint=partial(self.links.try_soon, source="dht"),
            is_alone=lambda: not self.links.neighbours,
        )

    def _dht_seeds(self) -> Iterator[PeerRecord]:
        """Whom to begin with, of any run: without any of them there is no hash table to take part in."""
        yield from self._bootstrap
        for peer in self.links.neighbours:
            if (record := self.book.record(peer)) is not None:
                yield record
        yield from self.book.due(SEEDS_MAX, exclude=(), now_s=trio.current_time())

    def _build_adverts(
        self, signer: Signer, rng: random.Random, wall_time_s: Callable[[], float]
    ) -> AdvertExchange:
        def own() -> Advert | None:
            if not self._about or not self.known_addresses():
                return None
            return self.advert(self._about, int(wall_time_s()) + ADVERT_S)

        def known() -> list[PeerRecord]:
            near = [self.book.record(peer) or PeerRecord(peer, ()) for peer in self.links.neighbours]
            return near + (self.dht.search.table.closest(rng.randbytes(KEY_BYTES)) if self.dht else [])

        return AdvertExchange(
            transport=self.transport,
            visits=self.links.visits,
            signer=signer,
            ledger=self.ledger,
            limits=self.limits,
            rng=rng,
            wall_time_s=wall_time_s,
            own=own,
            known=known,
        )

    def _heed(self, author: PeerId, kind: str, body: Message | None) -> None:
        """Heartbeats, however they arrive, are for the member table and the mode."""
        if kind != "heartbeat" or author == self.local:
            return
        if isinstance(body, Heartbeat):
            self.members.heard(author, body, trio.current_time())
            self._heard(author, body)
        else:
            self.members.forget(author)

    async def _follow_connections(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async for event in events:
            match event:
                case PeerUp(peer=peer):
                    self.members.connected(peer)
                case PeerDown(peer=peer, broken=True):
                    self.members.disconnected(peer)


def bootstrap_records(bootstrap: Sequence[str], limits: Limits) -> list[PeerRecord]:
    """The peers that texts like ``ADDRESS/p2p/PEER`` name. Raises AddressError."""
    parsed = (parse_peer_address(text, chars_max=limits.address_chars_max) for text in bootstrap)
    return [PeerRecord(peer, (address,)) for peer, address in parsed]
