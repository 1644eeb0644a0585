"""What every checker is made of: the hooks a world calls, what it may know of the world, observers that only look.

Owns the way in: ``Watcher.watch`` replaces a method of one part of one node by one that looks at each call and changes
nothing about it. A checker never awaits, never draws a random number and never raises into the product: a mistake of
its own is a failure it reports.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import trio

from netsim.disk import SimDisk
from netsim.network import SimNetwork
from node.gossip_node import GossipNode
from node.node import Node
from p2p.identity import Signer
from p2p.transport import PeerId
from training.run_spec import RunSpec

FAILURES_MAX = 20
"""Failures one checker reports of one seed: the first ones say what is wrong."""
WHAT_CHARS_MAX = 500

Done = Callable[[Any], None]
"""Told what a call returned; not called when it raised or was cancelled."""


class Machine(Protocol):
    """A machine, as a checker sees it: what outlives a process, and the process running now."""

    @property
    def number(self) -> int:
        """Its place in ``World.machines``."""

    @property
    def identity(self) -> Signer:
        """Its key, for all of its lives."""

    @property
    def disk(self) -> SimDisk:
        """What is on it outlives every process."""

    @property
    def node(self) -> Node | None:
        """The process running now; checkers look at those in gossip mode."""

    @property
    def honest(self) -> bool:
        """Whether it runs the product as it is."""


class World(Protocol):
    """A world, as a checker sees it."""

    @property
    def machines(self) -> Sequence[Machine]:
        """All of them, by number; more may join."""

    @property
    def network(self) -> SimNetwork:
        """The hosts that are up."""

    @property
    def spec(self) -> RunSpec:
        """The run that all are in."""

    @property
    def calm_since_s(self) -> float | None:
        """Since when no fault has been going on; None while one is."""

    @property
    def core(self) -> tuple[int, ...]:
        """The machines that must agree in the liveness phase; empty before it."""


class Report(Protocol):
    """Takes a failure down: ``machine`` is the number of the machine it concerns, None when it is no single one."""

    def __call__(self, checker: str, what: str, machine: int | None) -> None:
        """One more failure."""


class Checker(Protocol):
    """What a world calls; every hook returns at once."""

    name: ClassVar[str]

    def started(self, machine: Machine) -> None:
        """``machine.node`` has been built and has not run yet."""

    def stopped(self, machine: Machine, how: str) -> None:
        """The process has ended (killed, power-cut, left or failed); ``machine.node`` is still the old one."""

    def sample(self, now_s: float) -> None:
        """Every few virtual seconds."""

    def finished(self, now_s: float) -> None:
        """The end of the scenario; nodes are still running."""


class Watcher:
    """Base of all checkers: reports, attaches observers, and hears of honest machines only."""

    name: ClassVar[str]
    every_s: ClassVar[float] = 0.0
    """Between two looks; what takes long is done less often than samples come."""

    def __init__(self, world: World, report: Report) -> None:
        self.world = world
        self._report = report
        self._look_s = 0.0
        self._told: set[tuple[str, int | None]] = set()
        self._numbers: dict[PeerId, int] = {}

    # --- what a world calls -----------------------------------------------------------------------------------

    def started(self, machine: Machine) -> None:
        """Attach to a process that was built."""
        if machine.honest and isinstance(machine.node, GossipNode):
            self.attach(machine, machine.node)

    def stopped(self, machine: Machine, how: str) -> None:
        """Look at what a process has left behind."""
        if machine.honest and isinstance(machine.node, GossipNode):
            self.ended(machine, machine.node, how)

    def sample(self, now_s: float) -> None:
        """Look at the swarm if it is time to."""
        if now_s >= self._look_s:
            self._look_s = now_s + self.every_s
            self.look(now_s)

    def finished(self, now_s: float) -> None:
        """Look at it for the last time."""
        self.look(now_s)

    # --- what a checker fills in ------------------------------------------------------------------------------

    def look(self, now_s: float) -> None:
        """Look at the swarm as it is now."""

    def attach(self, machine: Machine, node: GossipNode) -> None:
        """Attach observers to the parts of an honest ``node``."""

    def ended(self, machine: Machine, node: GossipNode, how: str) -> None:
        """An honest process has ended."""

    # --- what a checker uses ----------------------------------------------------------------------------------

    def fail(self, what: str, machine: int | None = None) -> None:
        """Report a failure, the same one once."""
        if (what, machine) not in self._told and len(self._told) < FAILURES_MAX:
            self._told.add((what, machine))
            self._report(self.name, what[:WHAT_CHARS_MAX], machine)

    def honest(self) -> list[Machine]:
        """The honest machines, on or off."""
        return [machine for machine in self.world.machines if machine.honest]

    def running(self) -> Iterator[tuple[Machine, GossipNode]]:
        """The honest processes that run now, by machine."""
        for machine in self.honest():
            if isinstance(machine.node, GossipNode):
                yield machine, machine.node

    def is_honest(self, peer: str) -> bool:
        """Whether ``peer`` is the name of an honest machine."""
        if len(self._numbers) != len(self.world.machines):
            self._numbers = {machine.identity.peer: machine.number for machine in self.world.machines}
        number = self._numbers.get(PeerId(peer))
        return number is not None and self.world.machines[number].honest

    def after(self, part: object, method: str, seen: Callable[..., None]) -> None:
        """Have ``seen(result, *args, **kwargs)`` called after each call of a method that returned."""
        self.watch(part, method, lambda *args, **kwargs: lambda result: seen(result, *args, **kwargs))

    def watch(
        self,
        part: object,
        method: str,
        begin: Callable[..., Done | None],
        raised: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Have ``begin(*args, **kwargs)`` called before each call of a method, and what it returns after the call.

        ``raised`` is told of exceptions that leave an async method, cancellation included. Holds for callers that look
        the method up on ``part``, not for those that took it away before.
        """
        original = getattr(part, method)

        def begun(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Done | None:
            try:
                return begin(*args, **kwargs)
            except Exception as error:
                self._failed_itself(method, error)
                return None

        def ended(done: Done | None, result: Any) -> None:
            if done is not None:
                try:
                    done(result)
                except Exception as error:
                    self._failed_itself(method, error)

        if inspect.iscoroutinefunction(original):

            @functools.wraps(original)
            async def watched_async(*args: Any, **kwargs: Any) -> Any:
                done = begun(args, kwargs)
                try:
                    result = await original(*args, **kwargs)
                except BaseException as error:
                    ended(raised, error)
                    raise
                ended(done, result)
                return result

            setattr(part, method, watched_async)
        else:

            @functools.wraps(original)
            def watched(*args: Any, **kwargs: Any) -> Any:
                done = begun(args, kwargs)
                result = original(*args, **kwargs)
                ended(done, result)
                return result

            setattr(part, method, watched)

    def _failed_itself(self, method: str, error: Exception) -> None:
        """A mistake of the checker's own; the product goes on as if nobody had looked."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
        self.fail(f"the checker failed at {method}: {error!r} ({where})")


def is_calm(world: World, now_s: float, for_s: float) -> bool:
    """Whether no fault has been going on for ``for_s`` seconds."""
    return world.calm_since_s is not None and now_s - world.calm_since_s >= for_s


def tasks_under(task: trio.lowlevel.Task) -> list[trio.lowlevel.Task]:
    """``task`` and everything it has started that still runs."""
    found = [task]
    for one in found:
        for nursery in one.child_nurseries:
            found.extend(nursery.child_tasks)
    return found


def short(name: bytes) -> str:
    """The beginning of a hash, for people."""
    return name.hex()[:12]
