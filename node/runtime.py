"""What a node is handed: the whole world as it sees it, so that life and netsim run the same node, and its options."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gossip.disk import Disk
from node.compute import Compute
from node.costs import Costs
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId, Transport


@dataclass(frozen=True, slots=True)
class Runtime:
    """The seams. Time is ``trio.current_time()`` in both worlds and needs no field."""

    transport: Transport
    disk: Disk
    compute: Compute
    signer: Signer
    rng: random.Random
    wall_time_s: Callable[[], float]
    """Seconds since the epoch; read only for the expiry of invites, adverts and provider records, and for display."""
    costs: Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class ContactOptions:
    """What is one peer's own, and no part of its run's spec."""

    agent: str
    """The program and its version, as others are told it."""
    bootstrap: Sequence[str] = ()
    """Addresses to begin with, each ending in ``/p2p/<peer id>``."""
    limits: Limits
    allowed: frozenset[PeerId] = frozenset()
    """With whom it may deal; none named means all."""
    swarm_key: SwarmKey | None = None
    """Of its private swarm, for invites; the transport has its own copy."""
    dht: bool = False
    """Whether to take part in the hash table."""
    advertise: str = ""
    """What the run is for, told to everybody; nobody is told of the run where it is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions(ContactOptions):
    """The same of a node, which holds a model."""

    store_bytes_max: int
    upload_bytes_per_s_max: int = 0
    """Of shards served; 0: no cap."""
    download_bytes_per_s_max: int = 0
    """Of shards that are mixed; 0: no cap."""
