"""Many small nodes of many runs, and newcomers among them, on whatever network a test has."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import trio

from gossip.dht_records import RECORD_S, sign_record
from gossip.dht_table import distance, peer_key
from gossip.messages import DHT_PROTOCOL, DhtContact, Find, Found, Noted, Provide
from netsim.network import SimNetwork, address_of
from node.newcomer import Newcomer
from node.rendezvous import Rendezvous
from node.runtime import ContactOptions
from p2p.errors import GossamerError
from p2p.flow import FlowStream
from p2p.frames import receive_message, send_message
from p2p.identity import Identity, Signer
from p2p.limits import DEFAULT_LIMITS
from p2p.rpc import call
from p2p.service import open_service_nursery
from p2p.transport import PeerId, PeerRecord, Transport
from tests.gossip.world import MemoryDisk
from tests.netsim.test_world import SPEC
from training.run_spec import RunSpec, run_id


def spec_named(name: str) -> RunSpec:
    """Another run."""
    return msgspec.structs.replace(SPEC, name=name)


def rendezvous_in(
    transport: Transport,
    identity: Signer,
    spec: RunSpec,
    *,
    bootstrap: Sequence[str] = (),
    wall_time_s: Callable[[], float] = trio.current_time,
    dht: bool = True,
    advertise: str = "",
) -> Rendezvous:
    """The smallest node there is."""
    return Rendezvous(
        transport=transport,
        disk=MemoryDisk(),
        signer=identity,
        rng=random.Random(identity.peer),
        options=ContactOptions(
            agent="test/1", bootstrap=bootstrap, limits=DEFAULT_LIMITS, dht=dht, advertise=advertise
        ),
        spec=spec,
        wall_time_s=wall_time_s,
    )


def invitation(peer: PeerId) -> str:
    """Where a simulated peer is, as a person would write it."""
    return f"{address_of(peer)}/p2p/{peer}"


@contextlib.asynccontextmanager
async def simulated(
    network: SimNetwork,
    identity: Signer,
    spec: RunSpec,
    *,
    bootstrap: Sequence[str] = (),
    dht: bool = True,
    advertise: str = "",
) -> AsyncIterator[Rendezvous]:
    """A node for the length of the block, or until its host is crashed."""
    async with network.open_host(identity.peer) as host, open_service_nursery() as nursery:
        node = rendezvous_in(host, identity, spec, bootstrap=bootstrap, dht=dht, advertise=advertise)
        nursery.start_soon(node.run)
        yield node
        nursery.cancel_scope.cancel()


async def live(
    network: SimNetwork,
    identity: Signer,
    spec: RunSpec,
    nodes: dict[PeerId, Rendezvous],
    bootstrap: Sequence[str],
) -> None:
    """The same as a task: ``nodes`` has it while it is up."""
    async with simulated(network, identity, spec, bootstrap=bootstrap) as node:
        nodes[identity.peer] = node
        try:
            await trio.sleep_forever()
        finally:
            del nodes[identity.peer]


async def found_in_s(network: SimNetwork, spec: RunSpec, bootstrap: str, *, patience_s: float = 120) -> float:
    """How long a newcomer takes that knows the id of ``spec`` and one address. Raises GossamerError."""
    identity = Identity.generate()
    began_s = trio.current_time()
    async with network.open_host(identity.peer) as host:
        newcomer = Newcomer(
            run=run_id(spec),
            transport=host,
            signer=identity,
            limits=DEFAULT_LIMITS,
            wall_time_s=trio.current_time,
        )
        with trio.fail_after(patience_s):
            await newcomer.fetch_spec([bootstrap], None, dht=True)
    return trio.current_time() - began_s


LIES = ("garbage", "nobody", "forged", "expired", "crowd", "silence")
"""What a hostile node answers about the key it is after; about any other it answers like an honest one."""


async def lie(network: SimNetwork, identity: Signer, how: str, key: bytes, gate: PeerRecord) -> None:
    """A node of no run that has itself passed on, and lies about ``key``."""
    rng = random.Random(how)
    crowd = [DhtContact(peer=Identity.generate().peer, addresses=["/ip4/10.9.9.9/tcp/1"]) for _ in range(40)]
    others = [Identity.generate() for _ in range(8)]
    late = [sign_record(other, key, ["/ip4/10.9.9.9/tcp/1"], now_unix_s=-2 * RECORD_S) for other in others]
    true = [
        sign_record(other, key, ["/ip4/10.9.9.9/tcp/1"], now_unix_s=trio.current_time()) for other in others
    ]
    forged = [msgspec.structs.replace(each, addresses=["/ip4/10.9.9.8/tcp/1"]) for each in true]

    async def answer(peer: PeerId, stream: FlowStream) -> None:
        request = await receive_message(stream, Find | Provide, bytes_max=1 << 20)
        if isinstance(request, Provide):
            return await send_message(stream, Noted())
        if not isinstance(request, Find) or request.key != key:
            return await send_message(stream, Found(records=[], closer=[]))
        nearest = sorted(crowd, key=lambda each: distance(peer_key(PeerId(each.peer)), key))
        match how:
            case "garbage":
                await stream.send_all(rng.randbytes(200))
            case "nobody":
                await send_message(stream, Found(records=[], closer=nearest[:8]))
            case "forged":
                await send_message(stream, Found(records=forged, closer=[]))
            case "expired":
                await send_message(stream, Found(records=late, closer=[]))
            case "crowd":
                # Without end: whoever is named is somebody else each time.
                named = [
                    DhtContact(peer=Identity.generate().peer, addresses=[address_of(identity.peer)])
                    for _ in range(8)
                ]
                await send_message(stream, Found(records=true, closer=named))
            case "silence":
                await trio.sleep_forever()

    async with network.open_host(identity.peer) as host:
        host.serve(DHT_PROTOCOL, answer)
        while True:
            with contextlib.suppress(GossamerError):
                await host.connect(gate)
                await call(
                    host,
                    gate.peer,
                    DHT_PROTOCOL,
                    Find(key=peer_key(identity.peer), addresses=list(host.local.addresses)),
                    Found,
                    timeout_s=5,
                )
                await host.disconnect(gate.peer, "done")
            await trio.sleep(20)
