"""The checkers: what is promised of a swarm, checked from outside the product while it runs in a simulation.

Each is a small class that states one promise. A world calls them as ``base.Checker`` says; they look, and report.
"""

from __future__ import annotations

from netsim.checkers.anchors import EqualBits, ExactAverage, Pledges, Rebase
from netsim.checkers.base import Checker, Machine, Report, World
from netsim.checkers.bounds import Bounded, Leaks, task_census
from netsim.checkers.conduct import HonestNotBanned
from netsim.checkers.disks import CheckpointsHold
from netsim.checkers.order import Agreement, Monotonic
from netsim.checkers.swarm import AgreementAtTheEnd, Membership, Progress
from netsim.checkers.weights import Finite, Hashes

__all__ = ["Checker", "Machine", "Report", "World", "build", "task_census"]


def build(world: World, report: Report) -> list[Checker]:
    """All checkers of one world."""
    pledges = Pledges()
    return [
        ExactAverage(world, report, pledges),
        Rebase(world, report, pledges),
        EqualBits(world, report),
        Finite(world, report),
        Hashes(world, report),
        Monotonic(world, report),
        Agreement(world, report),
        Bounded(world, report),
        Leaks(world, report),
        HonestNotBanned(world, report),
        CheckpointsHold(world, report),
        Membership(world, report),
        Progress(world, report),
        AgreementAtTheEnd(world, report),
    ]
