"""What every daemon finds around it, whatever it does in its run: home, key, sockets, local network, spec.

Owns the order in which they are had, which matters: lock the home, load the keys, open the transport and the metrics'
socket (which claims the ports), begin the search of the local network where that is wanted and ask the router for the
port, learn the spec (from peers when only its hash is known). Never imports torch: a rendezvous needs none.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from gossip.address_book import check_address
from gossip.links import Links
from node.config import NodeConfig
from node.contact import Contact
from node.day_budget import BudgetKeeper
from node.disk import LocalDisk
from node.home import Home
from node.lan import LanSearch
from node.metrics import MetricsPage
from node.metrics_server import listen_for_metrics, serve_metrics
from node.newcomer import Newcomer
from node.port_mapping import PortMapping, UpnpRouter, worth_mapping
from node.status import NodeStatus
from node.version import VERSION
from p2p.identity import Identity
from p2p.libp2p_transport import Libp2pTransport, open_libp2p
from p2p.limits import Limits
from p2p.relay import RelayTerms
from p2p.service import open_service_nursery
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId, PeerRecord, Transport
from training.run_spec import RunSpec, canonical_bytes, check_startable, run_id, spec_from_bytes

log = structlog.get_logger()

SPEC_FILE = "spec.cbor"
AGENT = f"gossamer/{VERSION}"

Found = trio.MemoryReceiveChannel[PeerRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """All there is before a node is built."""

    home: Home
    config: NodeConfig
    limits: Limits
    identity: Identity
    transport: Transport
    spec: RunSpec
    disk: LocalDisk
    """Of the run."""
    bootstrap: Sequence[str]
    """Addresses to begin with, each ending in ``/p2p/<peer id>``."""
    allowed: frozenset[PeerId]
    """With whom the node may deal; none named means all."""
    swarm_key: SwarmKey | None
    """Of the run's swarm, where it is a private one."""
    found: Found | None
    """Whom the local network announces; None where it is not searched."""
    port_mapping: PortMapping | None
    """What the router forwards; None where it is not asked."""
    metrics: trio.SocketListener | None
    """Where Prometheus may ask; None where nobody is to be answered."""


@contextlib.asynccontextmanager
async def open_surroundings(
    home: Home, config: NodeConfig, *, spec: RunSpec | None, run: bytes | None, bootstrap: Sequence[str]
) -> AsyncIterator[Surroundings]:
    """Everything a daemon needs, for the length of the block. Raises GossamerError for whatever the user can mend."""
    limits = Limits()
    run = run_id(spec) if spec is not None else run or home.last_run()
    with home.lock():
        identity = Identity.load(home.identity_file)
        for address in config.announce:
            check_address(address, chars_max=limits.address_chars_max)
        swarm_key = SwarmKey.load(home.swarm_key_file(run))
        allowed = frozenset(map(PeerId, config.allow))
        _tell_who_may_connect(home.swarm_key_file(run) if swarm_key else None, allowed)
        async with (
            open_libp2p(
                identity,
                listen=config.listen,
                announce=config.announce,
                limits=limits,
                swarm_key=swarm_key,
                allowed=allowed,
                relay_terms=_relay_terms(config),
            ) as transport,
            contextlib.AsyncExitStack() as sockets,
            open_service_nursery() as services,
        ):
            metrics = None
            if config.metrics_listen is not None:
                metrics = await sockets.enter_async_context(await listen_for_metrics(config.metrics_listen))
            found = None
            if config.lan:
                search = LanSearch(
                    run=run, peer=identity.peer, listening=transport.listening, swarm_key=swarm_key
                )
                services.start_soon(search.run)
                found = search.found
            port_mapping = _port_mapping(config, transport)
            if port_mapping is not None:
                services.start_soon(port_mapping.keep_mapped)
            if spec is None:
                spec = await _stored_spec(home, run)
            if spec is None:
                newcomer = Newcomer(
                    run=run, transport=transport, signer=identity, limits=limits, wall_time_s=wall_time_s
                )
                data, giver = await newcomer.fetch_spec(
                    bootstrap, found, dht=config.dht and swarm_key is None
                )
                spec, bootstrap = spec_from_bytes(data), list(dict.fromkeys([*bootstrap, giver]))
            check_startable(spec)
            disk = LocalDisk(home.run_folder(run))
            await disk.write_atomic(SPEC_FILE, canonical_bytes(spec))
            home.remember_run(run)
            yield Surroundings(
                home=home,
                config=config,
                limits=limits,
                identity=identity,
                transport=transport,
                spec=spec,
                disk=disk,
                bootstrap=bootstrap,
                allowed=allowed,
                swarm_key=swarm_key,
                found=found,
                port_mapping=port_mapping,
                metrics=metrics,
            )


async def serve_status(listener: trio.SocketListener, look: Callable[[], NodeStatus]) -> None:
    """Tell Prometheus what ``look()`` says, until cancelled."""
    page = MetricsPage(look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(page.watch_lag)
        nursery.start_soon(serve_metrics, listener, page.text)
        log.info("metrics served", address=listener.socket.getsockname()[:2])


async def keep_budget(contact: Contact, around: Surroundings) -> BudgetKeeper:
    """Who counts what ``contact`` moves in a day, and has it rest; to be run and finished."""
    file = around.home.day_traffic_file
    keeper = BudgetKeeper(
        contact,
        upload_bytes_max=around.config.upload_bytes_per_day_max,
        download_bytes_max=around.config.download_bytes_per_day_max,
        disk=LocalDisk(file.parent),
        path=file.name,
        wall_time_s=wall_time_s,
    )
    await keeper.load()
    return keeper


async def follow_lan(found: Found, links: Links) -> None:
    """Have a node try whoever the local network announces, until cancelled."""
    async for record in found:
        links.try_soon(record, "lan")


async def obey_signals(stop: Callable[[], None], scope: trio.CancelScope) -> None:
    """First SIGINT or SIGTERM: ``stop``. Second: end at once, by ``scope``. SIGHUP is the log file's."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        asked = False
        async for _ in signals:
            if asked:
                scope.cancel()
            asked = True
            log.info("stopping; once more to stop at once")
            stop()


def wall_time_s() -> float:
    """Seconds since the epoch."""
    return time.time()  # noqa: TID251 - the one place that reads the wall clock


def _relay_terms(config: NodeConfig) -> RelayTerms | None:
    if not config.relay_bytes_per_s_max:
        return None
    return RelayTerms(bytes_per_s_max=config.relay_bytes_per_s_max, wall_time_s=wall_time_s)


def _port_mapping(config: NodeConfig, transport: Libp2pTransport) -> PortMapping | None:
    """Whoever announces addresses has seen to it that they lead here."""
    if not config.upnp or config.announce:
        return None
    socket = worth_mapping(transport.listening, transport.local.addresses)
    return None if socket is None else PortMapping(UpnpRouter(socket[0]), socket[1])


def _tell_who_may_connect(key_file: Path | None, allowed: Collection[PeerId]) -> None:
    if key_file is not None:
        log.info("private swarm: only peers with its key can connect", key_file=str(key_file))
    if allowed:
        log.info("allow-list: nobody else is connected", peers=len(allowed))


async def _stored_spec(home: Home, run: bytes) -> RunSpec | None:
    """The spec of ``run`` as an earlier life has left it."""
    stored = home.run_folder(run) / SPEC_FILE
    if not stored.exists():
        return None
    spec = spec_from_bytes(await trio.Path(stored).read_bytes())
    return spec if run_id(spec) == run else None
