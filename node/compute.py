"""The Compute seam: where mathematics runs, so that it never blocks the event loop nor breaks virtual time.

``ThreadCompute`` (life) runs each call in a worker thread, at most one per lane; netsim's runs it inline and
charges ``cost_s`` of virtual time (an autojump clock does not see threads, so a thread there would let
every timeout fire while it works).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

import trio

T = TypeVar("T")
Lane = Literal["train", "side"]
"""``train`` is the one writer of live weights; ``side`` is everything else: encoding, mixing, hashing, sums."""

THREAD_SWITCH_S = 0.0005
"""How long a thread that wants the interpreter waits before the one that has it must let go. Training asks for it at
every operation; by default it would wait 5 ms each time the event loop is busy with received bytes."""


class Compute(Protocol):
    """Runs pure, synchronous functions. Calls in one lane run one at a time, in order of asking."""

    async def run(self, function: Callable[[], T], *, lane: Lane, cost_s: float) -> T:
        """The result of ``function()``. ``cost_s`` is the virtual time it takes in netsim, ignored in life."""


class ThreadCompute:
    """Compute on worker threads: one per lane, so that training never waits for a mix and weights have one writer."""

    def __init__(self) -> None:
        sys.setswitchinterval(THREAD_SWITCH_S)
        self._lanes = {"train": trio.CapacityLimiter(1), "side": trio.CapacityLimiter(1)}

    async def run(self, function: Callable[[], T], *, lane: Lane, cost_s: float) -> T:
        """Run ``function`` in this lane's thread. Not abandoned on cancellation: weights are never half written."""
        return await trio.to_thread.run_sync(function, limiter=self._lanes[lane])
