"""A newcomer: knows a run's id, perhaps somebody's address, and asks around until it has the run's spec.

Owns the order of asking: everybody it is told of, whoever the local network announces, and, where one of them follows
another run, the hash table by way of that one. Believes nobody: the spec is what the run id is the hash of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import trio

from gossip.dht import HINTS_MAX
from gossip.dht_search import DhtSearch
from gossip.dht_table import run_key
from gossip.ledger import PeerLedger
from gossip.messages import ProviderRecord
from gossip.newcomer import fetch_spec
from gossip.visits import Visits
from node.contact import bootstrap_records
from p2p.errors import CallRefused, GossamerError, PeerUnreachable, ProtocolUnsupported
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.transport import PeerId, PeerRecord, Transport

LAN_WAIT_S = 15.0
"""For somebody on the local network who knows the run, where only its id is known here."""
STARTING_ATTEMPTS, STARTING_RETRY_S = 40, 1.5
"""A minute for a peer that is up and answers nothing yet, because it is just starting itself."""
DHT_WAIT_S, DHT_RETRY_S = 60.0, 2.0
"""For the hash table, and between two lookups there."""

log = structlog.get_logger()


class Newcomer:
    """Asks for the spec of ``run``; ``transport`` is its own and nothing else uses it yet."""

    def __init__(
        self,
        *,
        run: bytes,
        transport: Transport,
        signer: Signer,
        limits: Limits,
        wall_time_s: Callable[[], float],
    ) -> None:
        self._run = run
        self._transport = transport
        self._limits = limits
        self._visits = Visits(transport, guests_max=0)
        self._elsewhere: list[PeerRecord] = []
        """Those who have answered that they follow another run."""
        self._search = DhtSearch(
            transport=transport,
            visits=self._visits,
            signer=signer,
            ledger=PeerLedger(),
            limits=limits,
            wall_time_s=wall_time_s,
            seeds=lambda: self._elsewhere,
        )
        self._answer: tuple[bytes, str] | None = None
        self._failures: list[str] = []

    async def fetch_spec(
        self, bootstrap: Sequence[str], found: trio.MemoryReceiveChannel[PeerRecord] | None, *, dht: bool
    ) -> tuple[bytes, str]:
        """The canonical bytes of the spec, and the full address of who gave it: the first of all to answer.

        ``found``: whom the local network announces. Raises PeerUnreachable, or AddressError.
        """
        async with trio.open_nursery() as nursery:
            for record in bootstrap_records(bootstrap, self._limits):
                nursery.start_soon(self._ask_until_up, nursery, record, dht)
            if found is not None:
                with trio.move_on_after(LAN_WAIT_S):
                    async for record in found:
                        nursery.start_soon(self._ask_until_up, nursery, record, False)
        if self._answer is None:
            nobody = (
                "no bootstrap address was given" if found is None else "nobody on the local network has it"
            )
            raise PeerUnreachable(
                "nobody could be reached who knows this run",
                why="; ".join(self._failures) or nobody,
                fix="check the run id, the addresses and the firewall, or ask for a fresh invite",
            )
        return self._answer

    async def _ask_until_up(self, nursery: trio.Nursery, record: PeerRecord, dht: bool) -> None:
        """Ask somebody who may be of the run, and if it is of another, with ``dht``, the hash table."""
        for attempt in range(1, STARTING_ATTEMPTS + 1):
            try:
                await self._transport.connect(record)
                await self._ask(nursery, record)
            except GossamerError as error:
                if isinstance(error, ProtocolUnsupported) and attempt < STARTING_ATTEMPTS:
                    await trio.sleep(STARTING_RETRY_S)
                    continue
                self._failures.append(f"{_full_address(record)}: {error.what}")
                if dht and isinstance(error, CallRefused) and error.code == "wrong-run":
                    self._elsewhere.append(record)
                    if len(self._elsewhere) == 1:
                        nursery.start_soon(self._search_table, nursery)
            return

    async def _search_table(self, nursery: trio.Nursery) -> None:
        hints = 0

        def found(record: ProviderRecord) -> None:
            nonlocal hints
            hints += 1
            if hints <= HINTS_MAX:
                nursery.start_soon(
                    self._ask_provider, nursery, PeerRecord(PeerId(record.peer), tuple(record.addresses))
                )

        with trio.move_on_after(DHT_WAIT_S):
            while True:
                hints = 0
                log.info("looking for the run in the hash table", nodes=len(self._search.table))
                await self._search.find(run_key(self._run), found)
                await trio.sleep(DHT_RETRY_S)
        named = "nobody answered whom the hash table names" if hints else "the hash table names nobody"
        self._failures.append(named)

    async def _ask_provider(self, nursery: trio.Nursery, record: PeerRecord) -> None:
        try:
            async with self._visits.visit(record):
                await self._ask(nursery, record)
        except GossamerError as error:
            log.debug("a provider did not answer", peer=record.peer, error=error.what)

    async def _ask(self, nursery: trio.Nursery, record: PeerRecord) -> None:
        """Ask a connected peer; the first answer ends all asking. Raises GossamerError."""
        data = await fetch_spec(
            self._transport, record.peer, self._run, timeout_s=self._limits.call_timeout_s
        )
        self._answer = data, _full_address(record)
        nursery.cancel_scope.cancel()


def _full_address(record: PeerRecord) -> str:
    return f"{record.addresses[0]}/p2p/{record.peer}"
