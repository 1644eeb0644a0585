"""Between two machines: how long frames take, who shares a line, and which ways are cut.

Owns the models of a link and the queue of a machine's line. Knows nothing of streams and peers' meaning: frames are
actions that run when they are through.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from netsim.determinism import SimClock
from p2p.transport import PeerId

FRAME_OVERHEAD_BYTES = 48
"""What a frame costs on a line, beyond its payload."""


@dataclass(frozen=True, slots=True)
class LinkModel:
    """One direction between two hosts."""

    latency_s: float = 0.02
    jitter_s: float = 0.0
    """Uniform extra delay; order is kept, as TCP keeps it."""
    bytes_per_s: float = math.inf
    """What the way itself carries for one connection, whatever the lines at both ends could."""


class Line:
    """One direction of a machine's connection to the net, shared fairly: each flow sends a frame in its turn.

    Fair by frames, which are of at most 64 KiB: with equal frames, n flows get a share of 1/n each, whoever came first.
    """

    def __init__(self, clock: SimClock, bytes_per_s: float) -> None:
        self._clock = clock
        self.bytes_per_s = bytes_per_s
        """May be changed at any time; the frame on the line goes on at the old rate."""
        self._flows: dict[object, deque[tuple[int, Callable[..., None], tuple[Any, ...]]]] = {}
        self._busy = False

    @property
    def free(self) -> bool:
        """Whether a frame passes at once."""
        return self.bytes_per_s == math.inf and not self._busy

    def carry(self, flow: object, size: int, arrived: Callable[..., None], *args: Any) -> None:
        """Have ``arrived(*args)`` run once a frame of ``size`` bytes is through."""
        self._flows.setdefault(flow, deque()).append((size, arrived, args))
        if not self._busy:
            self._next()

    def clear(self) -> None:
        """Forget what has not been sent yet."""
        self._flows.clear()

    def _next(self) -> None:
        if not self._flows:
            self._busy = False
            return
        self._busy = True
        flow, queue = next(iter(self._flows.items()))
        size, arrived, args = queue.popleft()
        del self._flows[flow]
        if queue:
            self._flows[flow] = queue  # to the end of the line
        through_s = self._clock.current_time() + (size + FRAME_OVERHEAD_BYTES) / self.bytes_per_s
        self._clock.at(through_s, self._through, arrived, args)

    def _through(self, arrived: Callable[..., None], args: tuple[Any, ...]) -> None:
        arrived(*args)
        self._next()


@dataclass(slots=True, eq=False)
class Cut:
    """A partition: no frame passes from ``left`` to ``right``, nor back unless it is ``one_way``."""

    left: frozenset[PeerId]
    right: frozenset[PeerId]
    one_way: bool

    def blocks(self, source: PeerId, target: PeerId) -> bool:
        """Whether frames from ``source`` to ``target`` are held."""
        if source in self.left and target in self.right:
            return True
        return not self.one_way and source in self.right and target in self.left

    def touches(self, source: PeerId, target: PeerId) -> bool:
        """Whether a connection between the two cannot answer a ping: one direction is enough."""
        return self.blocks(source, target) or self.blocks(target, source)


@dataclass(slots=True)
class Cuts:
    """All partitions that hold now. They may overlap; a way is open when none of them blocks it."""

    active: list[Cut] = field(default_factory=list)

    def add(self, left: Collection[PeerId], right: Collection[PeerId], *, one_way: bool) -> Cut:
        """A new one."""
        cut = Cut(frozenset(left), frozenset(right), one_way)
        self.active.append(cut)
        return cut

    def blocks(self, source: PeerId, target: PeerId) -> bool:
        """Whether frames from ``source`` to ``target`` are held."""
        return any(cut.blocks(source, target) for cut in self.active)
