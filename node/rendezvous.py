"""Rendezvous: where the members of a run find each other. It holds no weights and is no member.

Owns the order of its starting and stopping; everything it does is ``node.contact``'s: it greets, serves the spec,
answers peer exchange, passes notices on and keeps the address book.

Promises: it publishes no notice, so no member table has it. Who is in nobody's table is not asked for weights, called
to a merge, named in a roster or counted for a quorum: no member has to know that it is different.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from gossip.disk import Disk
from node.contact import Contact
from node.runtime import ContactOptions
from p2p.identity import Signer
from p2p.transport import Transport
from training.run_spec import RunSpec


class Rendezvous(Contact):
    """One peer that introduces the members of ``spec``'s run to each other."""

    def __init__(
        self,
        *,
        transport: Transport,
        disk: Disk,
        signer: Signer,
        rng: random.Random,
        options: ContactOptions,
        spec: RunSpec,
        wall_time_s: Callable[[], float],
    ) -> None:
        super().__init__(
            transport=transport,
            disk=disk,
            signer=signer,
            rng=rng,
            options=options,
            spec=spec,
            incarnation=0,
            wall_time_s=wall_time_s,
        )
        self._stopping = trio.Event()

    def stop(self) -> None:
        """Ask it to end; ``run`` then returns."""
        self._stopping.set()

    async def run(self) -> None:
        """Live until ``stop`` is called."""
        await self.book.load()
        async with trio.open_nursery() as nursery:
            self._keep_contact(nursery)
            await self._stopping.wait()
            nursery.cancel_scope.cancel()
