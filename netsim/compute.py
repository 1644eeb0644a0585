"""SimCompute: mathematics inline, paid for in virtual seconds.

A worker thread would break virtual time: an autojump clock does not see it, so every deadline would pass while it
works. Each lane does one thing at a time, as a lane of ``node.compute.ThreadCompute`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from node.compute import Lane

T = TypeVar("T")


class SimCompute:
    """One machine's compute; ``slowness`` multiplies every cost (10.0 is a machine ten times slower)."""

    def __init__(self, *, slowness: float = 1.0) -> None:
        self.slowness = slowness
        self._lanes: dict[Lane, trio.Lock] = {"train": trio.Lock(), "side": trio.Lock()}

    async def run(self, function: Callable[[], T], *, lane: Lane, cost_s: float) -> T:
        """``function()``, after its cost has passed: what it reads is as of the moment it ends."""
        async with self._lanes[lane]:
            await trio.sleep(cost_s * self.slowness)
            return function()
