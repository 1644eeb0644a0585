"""Runtime: the whole world as one node sees it, handed in so that life and netsim run the same node."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from gossip.disk import Disk
from node.compute import Compute
from node.costs import Costs
from p2p.identity import Signer
from p2p.transport import Transport


@dataclass(frozen=True, slots=True)
class Runtime:
    """The seams. Time is ``trio.current_time()`` in both worlds and needs no field."""

    transport: Transport
    disk: Disk
    compute: Compute
    signer: Signer
    rng: random.Random
    wall_time_s: Callable[[], float]
    """Seconds since the epoch; read only for invite expiry and display."""
    costs: Costs
