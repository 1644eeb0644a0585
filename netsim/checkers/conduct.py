"""How members treat each other, and themselves: nobody honest is blamed for what only hostile programs do.

Owns the checkers ``honest-not-banned`` and ``quiet``.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import trio

from netsim.checkers.base import Machine, Report, Watcher, World
from node.node import Node
from p2p.transport import PeerId

GRAVE = ("hash", "signature", "malformed", "equivocation", "non-finite", "shape", "oversized", "wrong-run")
"""Reasons that no honest member gives, however bad its line, its disk or its luck."""


class HonestNotBanned(Watcher):
    """No honest member bans another, nor blames it for what only a broken or hostile program does."""

    name = "honest-not-banned"

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._settlers: dict[int, Callable[[], None]] = {}

    def attach(self, machine: Machine, node: Node) -> None:
        """See every offence that is noted, and every ban."""
        ledger = node.ledger
        noted: list[tuple[PeerId, Any]] = []

        def settle() -> None:
            while noted:
                peer, account = noted.pop()
                self._check(machine, peer, account.last_problem)

        def account_of(peer: PeerId) -> Callable[[Any], None]:
            # What the account is opened for is written into it right afterwards, and read when it is next our turn.
            settle()
            return lambda account: noted.append((peer, account))

        self.watch(ledger, "_account", account_of)
        ledger.on_ban(lambda peer, problem: self._banned(machine, peer, problem))
        self._settlers[machine.number] = settle

    def sample(self, now_s: float) -> None:
        """What was noted last."""
        for settle in self._settlers.values():
            settle()

    def _check(self, machine: Machine, peer: PeerId, problem: str) -> None:
        other = self.machine_of(peer)
        if other is not None and other.honest and problem.partition(":")[0] in GRAVE:
            self.fail(f"blames honest machine {other.number}: {problem}", machine.number)

    def _banned(self, machine: Machine, peer: PeerId, problem: str) -> None:
        other = self.machine_of(peer)
        if other is not None and other.honest:
            self.fail(f"bans honest machine {other.number}: {problem}", machine.number)


class Quiet(Watcher):
    """Nothing is logged as an error, and no exception leaves a node.

    ``processor`` goes into structlog's chain; within ``listening`` errors of the standard library's logging are heard.
    """

    name = "quiet"

    def attach(self, machine: Machine, node: Node) -> None:
        """See how a life ends."""
        self.watch(node, "run", lambda: None, raised=lambda error: self._check_end(machine, error))

    def processor(self, _: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A structlog processor that reports what is logged at level error or above."""
        if method in ("error", "exception", "critical", "fatal"):
            self.fail(f"logged: {event.get('event')}")
        return event

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear errors that are logged by the standard library's means within the block."""
        handler = _Errors(self.fail)
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)

    def _check_end(self, machine: Machine, error: BaseException) -> None:
        rest: BaseException | None = error
        if isinstance(error, BaseExceptionGroup):
            rest = error.split(trio.Cancelled)[1]
        if rest is not None and not isinstance(rest, trio.Cancelled | KeyboardInterrupt):
            self.fail(f"the node died of {told(rest)}", machine.number)


class _Errors(logging.Handler):
    """Passes on what was logged as an error."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._fail = fail

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._fail(f"logged: {record.getMessage()}" + (f": {told(error)}" if error is not None else ""))


def told(error: BaseException) -> str:
    """An exception in one line, with the place it came from; the first leaf of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
