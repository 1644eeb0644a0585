"""The Compute seam: where mathematics runs, so that it never blocks the event loop nor breaks virtual time.

``ThreadCompute`` (life) runs each call in a worker thread, at most one per lane; netsim's runs it inline and
charges ``cost_s`` of virtual time (an autojump clock does not see threads, so a thread there would let
every timeout fire while it works).
"""

from __future__ import annotations

import contextvars
import queue
import sys
import threading
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

import outcome
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
    """Compute on two threads of its own, one per lane: training never waits for a mix, weights have one writer.

    Each lane keeps its thread. On whichever of a pool is free the same mathematics takes some percent longer, since
    every thread has its own stretch of memory to take tensors from.
    """

    def __init__(self) -> None:
        sys.setswitchinterval(THREAD_SWITCH_S)
        self._lanes: dict[Lane, _LaneThread] = {"train": _LaneThread("train"), "side": _LaneThread("side")}

    async def run(self, function: Callable[[], T], *, lane: Lane, cost_s: float) -> T:
        """Run ``function`` in this lane's thread. Not abandoned on cancellation: weights are never half written."""
        return await self._lanes[lane].run(function)


class _LaneThread:
    """A thread that works off what is asked of it, in order; it ends with the program."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._turn = trio.Lock()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    async def run(self, function: Callable[[], T]) -> T:
        """The result of ``function()``, or its exception. Can be cancelled until its turn comes."""
        async with self._turn:
            if self._thread.ident is None:
                self._thread.start()
            task, token = trio.lowlevel.current_task(), trio.lowlevel.current_trio_token()
            context = contextvars.copy_context()

            def job() -> None:
                result = outcome.capture(context.run, function)
                token.run_sync_soon(trio.lowlevel.reschedule, task, result)

            self._jobs.put(job)
            result: T = await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
            return result

    def _work(self) -> None:
        while True:
            self._jobs.get()()
