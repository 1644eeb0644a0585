"""A swarm of three that exchanges, merges twice and is done within seven virtual seconds; one of them dies and returns.

What must hold wherever it dies: nothing of the process is left, nobody keeps a stream to it, its disk lets it go on,
the checkers find nothing, all come to one chain, and the next merge has everybody in it. The same holds when a time
limit is up at any step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from netsim.injection import Moment, StepCounter, at_operation
from netsim.network import SimHost
from netsim.world import Machine, World
from node.gossip_node import GossipNode
from tests.netsim.checked_world import simulate
from training.run_spec import parse_run_spec

SPEC = parse_run_spec("""
name = "deaths"
[train]
steps = 50
[exchange]
every_steps = 5
fragments = 2
[schedule]
preset = "custom"
phases = [{ until = 1.0, merges = 2 }]
[merge]
wait_s_max = 2
period_s = 3
""")
MACHINES = 3
AWAY_S = 0.5
DONE_S = 60.0
"""All must be done within this time, whatever happened."""
MERGE_S = 30.0
ENDS_S = 10.0
"""A process that is told to stop has ended within this time; one that is cancelled, at once."""

Verb = Callable[[World, int], None]
VERBS: dict[str, Verb] = {
    "interrupt": World.interrupt,
    "kill": World.kill,
    "power-cut": World.power_cut,
    "stop": World.stop,
}


@dataclass(frozen=True)
class Death:
    """How one life ends: before a step of its tasks, or before or after the effect of a disk operation, from 1 on."""

    verb: Verb
    step: float = math.inf
    operation: float = math.inf
    moment: Moment = "before"


@dataclass
class Story:
    """What one run came to."""

    wrong: list[str] = field(default_factory=list)
    steps: int = 0
    """Of the tasks of the victim's last process, until all were done."""
    operations: int = 0
    """Of its disk, in its last life."""
    limits: int = 0
    """Time limits that were up before their time."""


def live(*deaths: Death, victim: int = 1, seed: int = 1) -> Story:
    """The run in which the lives of one machine end as ``deaths`` say, and its last one does not."""
    story = Story()

    async def script(world: World) -> None:
        machine = world.machines[victim]
        for other in range(MACHINES):
            if other != victim:
                world.switch_on(other, bootstrap=(0,) if other else None)
        for death in deaths:
            story.wrong += await one_life(world, machine, death)
        counter = StepCounter(machine, action=lambda: None)
        trio.lowlevel.add_instrument(counter)
        operations = machine.disk.operations
        switch_on(world, machine)
        wrong = await until_done(world)
        story.steps = counter.steps
        story.operations = machine.disk.operations - operations
        story.wrong += wrong or await merge_once_more(world)

    story.wrong += map(str, simulate(script, machines=MACHINES, seed=seed, spec=SPEC))
    return story


def with_patience_lost(step: float, *, victim: int = 1, seed: int = 1) -> Story:
    """The run in which nobody dies, but a time limit around what one machine is about to do is up before its time."""
    story = Story()

    async def script(world: World) -> None:
        def expire() -> None:
            status = trio.lowlevel.current_task()._cancel_status
            while status is not None and status._scope.deadline == math.inf:
                status = status._parent
            if status is not None:
                story.limits += 1
                status._scope.cancel()

        counter = StepCounter(world.machines[victim], at=step, action=expire)
        trio.lowlevel.add_instrument(counter)
        for machine in world.machines:
            switch_on(world, machine)
        wrong = await until_done(world)
        if not wrong and not counter.acted:
            await merge_once_more(
                world
            )  # Patience is lost within it, so it is the one after it that must be whole.
        story.wrong += wrong or await merge_once_more(world)

    story.wrong += map(str, simulate(script, machines=MACHINES, seed=seed, spec=SPEC))
    return story


async def until_done(world: World) -> list[str]:
    """Let all that is left to do be done; returns what is wrong when it is not."""
    with trio.move_on_after(DONE_S):
        while not all_done(world):
            await trio.sleep(0.1)
        return []
    return ["the run is not done: " + "; ".join(map(state_of, nodes_of(world)))]


async def merge_once_more(world: World) -> list[str]:
    """One merge that nothing stands in the way of; returns what is wrong when not everybody is in it."""
    report = await nodes_of(world)[0].merges.merge_now(MERGE_S)
    missing = MACHINES - len(report.contributors)
    return [f"{missing} are missing in the next merge"] if missing else []


async def one_life(world: World, machine: Machine, death: Death) -> list[str]:
    """Switch ``machine`` on, have it die as ``death`` says, and return what is left of it that should not be."""
    died = trio.Event()
    hosts: list[SimHost] = []

    def die() -> None:
        died.set()
        hosts.extend(host for host in world.network.hosts.values() if host.local.peer == machine.peer)
        death.verb(world, machine.number)

    counter = StepCounter(machine, at=death.step, action=die)
    trio.lowlevel.add_instrument(counter)
    if death.operation < math.inf:
        at_operation(machine.disk, machine.disk.operations + int(death.operation), death.moment, die)
    switch_on(world, machine)
    with trio.fail_after(DONE_S):
        await died.wait()
    with trio.move_on_after(ENDS_S if death.verb is World.stop else 1e-3):
        await machine.ended.wait()
    wrong = [f"task {task.name} lives on" for task in sorted(counter.living, key=lambda task: task.name)]
    trio.lowlevel.remove_instrument(counter)
    await trio.sleep(AWAY_S)
    wrong += [f"{host.traffic().streams_open} streams outlive it" for host in hosts if host.sides()]
    if machine.peer in world.network.hosts:
        wrong.append("its host is still up")
    wrong += [
        f"machine {host.number} keeps a connection to it"
        for host in world.network.hosts.values()
        if host.side(machine.peer) is not None and death.verb is not World.power_cut
    ]
    wrong += [f"lane {name} is taken" for name, lane in machine.compute._lanes.items() if lane.busy]
    return wrong


def switch_on(world: World, machine: Machine) -> None:
    """Start the next life of ``machine``; the first machine is everybody's bootstrap."""
    world.switch_on(machine.number, bootstrap=(0,) if machine.number else (1,))


def nodes_of(world: World) -> list[GossipNode]:
    """The nodes that run now."""
    return [machine.node for machine in world.machines if machine.node is not None]


def all_done(world: World) -> bool:
    """Whether all are up and see each other, have nothing left to do, and hold one chain and the anchor of its head."""
    nodes = nodes_of(world)
    return (
        len(nodes) == MACHINES
        and all(len(node.members.alive(trio.current_time())) == MACHINES - 1 for node in nodes)
        and all(node.phase == "finished" and node.merge_host.anchor is not None for node in nodes)
        and len({node.merger.head for node in nodes}) == 1
    )


def state_of(node: GossipNode) -> str:
    """Where a node is, for people."""
    return (
        f"{node.phase} at step {node.trainer.step}, height {node.merger.head_height} {node.current_problem()}"
    )
