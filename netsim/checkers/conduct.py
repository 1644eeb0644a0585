"""How members treat each other, and themselves: nobody honest is blamed for what only hostile programs do.

Owns the checker ``honest-not-banned``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from netsim.checkers.base import Machine, Report, Watcher, World
from node.gossip_node import GossipNode
from p2p.transport import PeerId

GRAVE = ("hash", "signature", "malformed", "equivocation", "non-finite", "shape", "oversized", "wrong-run")
"""Reasons that no honest member gives, however bad its line, its disk or its luck."""


class HonestNotBanned(Watcher):
    """No honest member bans another, nor blames it for what only a broken or hostile program does."""

    name = "honest-not-banned"
    every_s = 5.0

    def __init__(self, world: World, report: Report) -> None:
        super().__init__(world, report)
        self._settlers: dict[int, Callable[[], None]] = {}

    def attach(self, machine: Machine, node: GossipNode) -> None:
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

    def look(self, now_s: float) -> None:
        """What was noted last."""
        for settle in self._settlers.values():
            settle()

    def _check(self, machine: Machine, peer: PeerId, problem: str) -> None:
        if self.is_honest(peer) and problem.partition(":")[0] in GRAVE:
            self.fail(f"blames honest {peer}: {problem}", machine.number)

    def _banned(self, machine: Machine, peer: PeerId, problem: str) -> None:
        if self.is_honest(peer):
            self.fail(f"bans honest {peer}: {problem}", machine.number)
