"""Each fault does what it says for as long as it says, and is undone: by itself, beside others, and when cancelled."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trio

from netsim import draw
from netsim.attackers import ATTACKERS
from netsim.faults import Faults
from netsim.registry import parse_scenario
from netsim.scenario import Scenario
from netsim.world import Machine, World
from tests.netsim.checked_world import simulate

SEED = 1
MACHINES = 4
ALL = tuple(range(MACHINES))
FIRST_S = 2.0
"""When the first fault strikes: everybody is up and connected."""


def scenario(*faults: str, more: str = "") -> Scenario:
    """Four machines and ``faults``, each as the keys of one."""
    told = "".join(f"[[fault]]\n{fault}\n" for fault in faults)
    return parse_scenario(f"""
name = "faults"
nodes = {MACHINES}
duration_s = 1000
[run]
name = "faults"
[machines]
disk_bytes = {1 << 30}
{more}
{told}
""")


@dataclass
class Scene:
    """A world in which a scenario's faults are on their way."""

    world: World
    told: list[tuple[float, str, tuple[int, ...], str, float | None]] = field(default_factory=list)
    """When, what, to whom, in what words, until when."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Around the faults."""
    over: trio.Event = field(default_factory=trio.Event)

    def tell(self, what: str, machines: object, detail: str, until_s: float | None) -> None:
        self.told.append((trio.current_time(), what, tuple(machines), detail, until_s))  # type: ignore[arg-type]

    def whom(self, what: str) -> list[tuple[int, ...]]:
        return [machines for _, told, machines, _, _ in self.told if told == what]

    def up(self) -> list[int]:
        return [machine.number for machine in self.world.up()]

    def machine(self, number: int) -> Machine:
        return self.world.machines[number]

    def reaches(self, source: int, target: int) -> bool:
        """Whether frames pass this way now."""
        machines = self.world.machines
        return not self.world.network.cuts.blocks(machines[source].peer, machines[target].peer)

    def ways(self) -> set[tuple[int, int]]:
        """All that are open."""
        return {(a, b) for a in ALL for b in ALL if a != b and self.reaches(a, b)}

    def hardware(self) -> list[tuple[object, ...]]:
        """Of all machines, and whether anything lies in wait on their disks."""
        found: list[tuple[object, ...]] = []
        for machine in self.world.machines:
            disk, lines = machine.disk, self.world.network._lines_of(machine.peer)
            hooks = disk.on_operation, disk.on_effect
            rates = lines.up.bytes_per_s, lines.down.bytes_per_s
            found.append((machine.compute.slowness, disk.operation_s, disk.capacity_bytes, *hooks, *rates))
        return found


def play(made: Scenario, script: Callable[[Scene], Awaitable[None]]) -> None:
    """Have the faults of ``made`` strike while ``script`` looks."""

    async def main(world: World) -> None:
        scene = Scene(world)
        faults = Faults(
            world,
            made,
            draw.plan(made, SEED),
            seed=SEED,
            tell=scene.tell,
            add_machine=world.add_machine,
            neighbours=lambda number: (),
        )

        async def strike() -> None:
            with scene.scope:
                await faults.run()
            scene.over.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(strike)
            await script(scene)
            nursery.cancel_scope.cancel()

    simulate(main, machines=MACHINES, seed=SEED, checked=False)


WHOLE = {(a, b) for a in ALL for b in ALL if a != b}


# --- coming and going -------------------------------------------------------------------------------------------


def test_machines_arrive_when_they_should() -> None:
    more = "[arrivals]\nover_s = 4\nlater = 2\nlater_at_s = 10\nlater_over_s = 4\n"

    async def script(scene: Scene) -> None:
        await trio.sleep(20)
        starts = {machines[0]: at_s for at_s, what, machines, _, _ in scene.told if what == "start"}
        assert starts == {0: 0, 1: 4, 2: 10, 3: 12}
        assert [machine.starts_s for machine in scene.world.machines] == [[0], [4], [10], [12]]
        assert [machine.bootstrap for machine in scene.world.machines] == [(), (0,), (0,), (0,)]

    play(scenario(more=more), script)


def test_who_comes_when_the_founder_is_gone_is_told_of_others() -> None:
    more = "[arrivals]\nlater = 1\nlater_at_s = 10\n"

    async def script(scene: Scene) -> None:
        await trio.sleep(20)
        assert sorted(scene.machine(3).bootstrap) == [1, 2]
        assert len(scene.machine(3).node.members.alive(trio.current_time())) == 2  # type: ignore[union-attr]

    play(scenario('kind = "kill"\nat_s = 5\nmachines = ["founder"]', more=more), script)


@pytest.mark.parametrize("kind", ["kill", "power-cut", "leave"])
def test_a_machine_goes_and_comes_back(kind: str) -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S - 0.1)
        node, cuts = scene.machine(2).node, scene.machine(2).disk._lives
        assert node is not None
        await trio.sleep(1.5)
        assert scene.up() == [0, 1, 3]
        assert node._stopping.is_set() == (kind == "leave")
        assert scene.machine(2).disk._lives == cuts + (kind == "power-cut")
        others = [host for host in scene.world.network.hosts.values() if node.local in host.peers()]
        assert bool(others) == (kind == "power-cut"), "only of a power cut nobody hears at once"
        await trio.sleep(5)
        assert scene.up() == list(ALL)
        assert scene.machine(2).node is not node

    play(scenario(f'kind = "{kind}"\nat_s = {FIRST_S}\nfor_s = 4\nmachines = [2]'), script)


@pytest.mark.parametrize("kind", ["kill", "power-cut", "leave", "crash"])
def test_no_time_is_for_good(kind: str) -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(200)
        assert scene.up() == [0, 1, 3]

    play(scenario(f'kind = "{kind}"\nat_s = {FIRST_S}\nmachines = [2]'), script)


def test_newcomers_join_one_after_the_other() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(30)
        assert [machine.starts_s for machine in scene.world.machines[4:]] == [[2], [12], [22]]
        assert scene.whom("join") == [(4, 5, 6)]

    play(scenario(f'kind = "join"\nat_s = {FIRST_S}\nfor_s = 20\ncount = 3'), script)


def test_machines_come_and_go_at_the_rate_of_the_churn() -> None:
    churn = "[churn]\nper_hour = {rate}\nkilled = {killed}\nreplaced = {replaced}\naway_s = [1, 2]\n"

    async def script(scene: Scene) -> None:
        await trio.sleep(400)
        gone = [(what, detail) for _, what, _, detail, _ in scene.told if detail.startswith("churn")]
        kinds.update(what for what, _ in gone)
        details.update(detail for _, detail in gone)
        counts.append(len(gone))
        newcomers.append(len(scene.world.machines) - MACHINES)
        assert len(scene.up()) >= MACHINES - 1

    kinds: set[str] = set()
    details: set[str] = set()
    counts: list[int] = []
    newcomers: list[int] = []
    play(scenario(more=churn.format(rate=112, killed=0, replaced=0)), script)
    assert (kinds, details, newcomers) == ({"leave"}, {"churn"}, [0])
    assert 35 <= counts[0] <= 65  # 4 machines x 112 an hour x 400 s: 50
    kinds.clear()
    details.clear()
    play(scenario(more=churn.format(rate=50, killed=1, replaced=1)), script)
    assert (kinds, details) == ({"kill", "power-cut"}, {"churn, for good"})
    assert newcomers[1] >= counts[1] - 2


# --- whom it strikes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "count"),
    [
        ('machines = ["all"]', 4),
        ('machines = ["founder", 3]', 2),
        ("machines = [1]", 1),
        ("count = 3", 3),
        ("count = 9", 4),
        ("share = 0.6", 3),
        ("", 1),
    ],
)
def test_it_strikes_whom_it_should(which: str, count: int) -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 1)
        (struck,) = scene.whom("slow")
        slow = [machine.number for machine in scene.world.machines if machine.compute.slowness > 1]
        assert list(struck) == slow
        assert len(struck) == count
        if "founder" in which:
            assert struck == (0, 3)

    play(scenario(f'kind = "slow"\nat_s = {FIRST_S}\n{which}'), script)


def test_it_strikes_only_who_is_up() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(10)
        assert scene.whom("slow") == [(0, 2, 3)]

    down = 'kind = "kill"\nat_s = 1\nmachines = [1]'
    play(scenario(down, f'kind = "slow"\nat_s = {FIRST_S}\nmachines = ["all"]'), script)


# --- the network ------------------------------------------------------------------------------------------------


def test_a_partition_is_healed() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 5)
        assert scene.ways() == {(0, 3), (3, 0), (1, 2), (2, 1)}
        await trio.sleep(6)
        assert scene.ways() == WHOLE
        await scene.over.wait()

    play(scenario(f'kind = "partition"\nat_s = {FIRST_S}\nfor_s = 10\nmachines = [0, 3]'), script)


def test_one_way_is_one_way() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 5)
        assert scene.ways() == WHOLE - {(2, 0), (2, 1), (2, 3)}
        await trio.sleep(6)
        assert scene.ways() == WHOLE

    play(
        scenario(f'kind = "partition"\nat_s = {FIRST_S}\nfor_s = 10\nmachines = [2]\none_way = true'), script
    )


@pytest.mark.parametrize(("parts", "open_ways"), [(2, 4), (3, 2), (4, 0)])
def test_all_are_split_in_so_many_parts(parts: int, open_ways: int) -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 5)
        assert len(scene.ways()) == open_ways
        await trio.sleep(6)
        assert scene.ways() == WHOLE

    play(scenario(f'kind = "partition"\nat_s = {FIRST_S}\nfor_s = 10\nparts = {parts}'), script)


def test_a_flapping_partition_comes_and_goes_in_equal_turns() -> None:
    async def script(scene: Scene) -> None:
        seen = ""
        await trio.sleep(FIRST_S + 1)
        for _ in range(6):
            seen += "|" if scene.ways() == WHOLE else "x"
            await trio.sleep(2)
        assert seen == "x|x|x|"

    play(scenario(f'kind = "partition"\nat_s = {FIRST_S}\nfor_s = 10\nflaps = 3\nmachines = [1]'), script)


def test_of_two_partitions_each_is_healed_by_itself() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 5)
        assert scene.ways() == {(2, 3), (3, 2)}
        await trio.sleep(6)
        assert scene.ways() == {(0, 2), (2, 0), (0, 3), (3, 0), (2, 3), (3, 2)}
        await trio.sleep(10)
        assert scene.ways() == WHOLE

    first = f'kind = "partition"\nat_s = {FIRST_S}\nfor_s = 10\nmachines = [0]'
    play(scenario(first, 'kind = "partition"\nat_s = 4\nfor_s = 18\nmachines = [1]'), script)


def test_a_stalled_machine_hears_nothing_and_loses_nobody() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S - 0.1)
        before = {host.number: host.sides() for host in scene.world.network.hosts.values()}
        heard = scene.world.network.deliveries
        await trio.sleep(5)
        assert scene.ways() == {(0, 3), (3, 0)}, "the stalled ones do not reach each other either"
        await trio.sleep(10)
        assert scene.ways() == WHOLE
        assert {host.number: host.sides() for host in scene.world.network.hosts.values()} == before
        assert scene.world.network.deliveries > heard

    play(scenario(f'kind = "stall"\nat_s = {FIRST_S}\nfor_s = 8\nmachines = [1, 2]'), script)


def test_broken_connections_are_dialled_again() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S - 0.1)
        peer = scene.machine(1).peer
        host = scene.world.network.hosts[peer]
        before = host.sides()
        assert before
        await trio.sleep(0.2)
        assert all(side.over for side in before)
        assert scene.world.network.connections_broken == len(before)
        await trio.sleep(30)
        assert len(host.peers()) == len(before)
        await scene.over.wait()

    play(scenario(f'kind = "break"\nat_s = {FIRST_S}\nmachines = [1]'), script)


# --- the machines -----------------------------------------------------------------------------------------------


def test_a_suspended_machine_computes_nothing() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 1)
        nodes = [machine.node for machine in scene.world.machines]
        steps = [node.trainer.step for node in nodes if node is not None]
        await trio.sleep(8)
        moved = [
            node.trainer.step - step for node, step in zip(nodes, steps, strict=True) if node is not None
        ]
        assert moved[1] == 0
        assert min(moved[0], *moved[2:]) > 20
        await trio.sleep(10)
        assert nodes[1] is not None
        assert nodes[1].trainer.step > steps[1] + 20

    play(scenario(f'kind = "suspend"\nat_s = {FIRST_S}\nfor_s = 10\nmachines = [1]'), script)


def test_a_slow_machine_takes_so_many_times_as_long() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 1)
        node = scene.machine(1).node
        assert node is not None
        before = node.trainer.step
        await trio.sleep(25)
        assert 8 <= node.trainer.step - before <= 11

    play(scenario(f'kind = "slow"\nat_s = {FIRST_S}\nfor_s = 30\nmachines = [1]\ntimes = 25'), script)


def test_one_bit_of_each_machine_rots() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 1)
        assert [len(machine.disk.damaged) for machine in scene.world.machines] == [0, 1, 1, 0]

    play(scenario(f'kind = "bit-flip"\nat_s = {FIRST_S}\nmachines = [1, 2]'), script)


AILMENTS = {
    "slow": ("times = 5", (5.0, 0.0, 1 << 30, None, None, math.inf, math.inf)),
    "throttle": ("bytes_per_s = 1e4", (1.0, 0.0, 1 << 30, None, None, 1e4, 1e4)),
    "disk-full": ("", (1.0, 0.0, 0, None, None, math.inf, math.inf)),
    "disk-slow": ("operation_s = 0.25", (1.0, 0.25, 1 << 30, None, None, math.inf, math.inf)),
}
WELL = (1.0, 0.0, 1 << 30, None, None, math.inf, math.inf)


@pytest.mark.parametrize("kind", AILMENTS)
def test_hardware_is_worse_for_a_while(kind: str) -> None:
    keys, ill = AILMENTS[kind]

    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 1)
        assert scene.hardware() == [WELL, WELL, ill, WELL]
        await trio.sleep(3.5)
        assert scene.hardware() == [WELL] * 4
        await scene.over.wait()

    play(scenario(f'kind = "{kind}"\nat_s = {FIRST_S}\nfor_s = 4\nmachines = [2]\n{keys}'), script)


def test_ailments_of_different_kinds_leave_each_other_alone() -> None:
    faults = [
        f'kind = "{kind}"\nat_s = {FIRST_S}\nfor_s = {4 + 4 * place}\nmachines = [2]\n{keys}'
        for place, (kind, (keys, _)) in enumerate(AILMENTS.items())
    ]

    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 1)
        ill = (5.0, 0.25, 0, None, None, 1e4, 1e4)
        assert scene.hardware()[2] == ill
        for changed in ({0: 1.0}, {5: math.inf, 6: math.inf}, {2: 1 << 30}, {1: 0.0}):
            await trio.sleep(4)
            ill = tuple(changed.get(place, value) for place, value in enumerate(ill))  # type: ignore[assignment]
            assert scene.hardware()[2] == ill
        assert ill == WELL

    play(scenario(*faults), script)


def test_of_two_of_one_kind_the_worse_holds_while_it_lasts() -> None:
    mild = f'kind = "throttle"\nat_s = {FIRST_S}\nfor_s = 20\nmachines = [1]\nbytes_per_s = 5e4'
    severe = 'kind = "throttle"\nat_s = 6\nfor_s = 4\nmachines = [1]\nbytes_per_s = 1e4'

    async def script(scene: Scene) -> None:
        rates = []
        for _ in range(5):
            await trio.sleep(5.25)
            rates.append(scene.hardware()[1][5])
        assert rates == [5e4, 5e4, 5e4, 5e4, math.inf]

    async def look_within(scene: Scene) -> None:
        await trio.sleep(8)
        assert scene.hardware()[1][5] == 1e4

    play(scenario(mild, severe), script)
    play(scenario(mild, severe), look_within)


def test_the_power_goes_within_a_disk_operation() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 0.01)
        disk = scene.machine(2).disk
        at, lives = disk.operations, disk._lives
        while disk._lives == lives:
            await trio.sleep(0.01)
        assert disk.operations == at + 4
        assert disk.on_operation is disk.on_effect is None
        assert scene.up() == [0, 1, 3]
        await trio.sleep(4)
        assert scene.up() == list(ALL)

    play(scenario(f'kind = "crash"\nat_s = {FIRST_S}\nfor_s = 3\nmachines = [2]\noperation = 3'), script)


def test_a_machine_awaits_one_crash_at_a_time() -> None:
    first = f'kind = "crash"\nat_s = {FIRST_S}\nfor_s = 3\nmachines = [2]\noperation = 1'
    again = f'kind = "crash"\nat_s = {FIRST_S}\nfor_s = 3\nmachines = [2]\noperation = 3'

    async def script(scene: Scene) -> None:
        await trio.sleep(60)
        assert scene.over.is_set()
        assert len(scene.machine(2).starts_s) == 2
        assert scene.hardware() == [WELL] * 4

    play(scenario(first, again), script)


def test_the_power_may_go_before_a_node_is_there() -> None:
    """Its first operations read and write the number of its life."""
    kill = 'kind = "kill"\nat_s = 4\nfor_s = 1\nmachines = [2]'
    crash = 'kind = "crash"\nat_s = 3.999\nfor_s = 3\nmachines = [2]\noperation = {operation}'

    async def script(scene: Scene) -> None:
        await trio.sleep(4.5)
        assert scene.machine(2).disk.on_operation or scene.machine(2).disk.on_effect
        await trio.sleep(2.5)
        assert scene.up() == [0, 1, 3]
        assert len(scene.machine(2).starts_s) == 1, "the second life never came to a node"
        await trio.sleep(4)
        assert scene.up() == list(ALL)

    play(scenario(kill, crash.format(operation=1)), script)


def test_an_attacker_comes_and_goes() -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 1)
        assert scene.up() == [0, 1, 2, 3, 4]
        assert [machine.honest for machine in scene.world.machines] == [True] * 4 + [False]
        await trio.sleep(10)
        assert scene.up() == [0, 1, 2, 3]
        told = [
            (machines, detail, until_s)
            for _, what, machines, detail, until_s in scene.told
            if what == "attack"
        ]
        assert told == [((4,), ATTACKERS["replays"].about, 12)]

    play(scenario(f'kind = "attack"\nat_s = {FIRST_S}\nfor_s = 10\nattacker = "replays"'), script)


# --- the end ----------------------------------------------------------------------------------------------------


def test_the_world_is_calm_while_nothing_goes_wrong() -> None:
    faults = ('kind = "slow"\nat_s = 5\nfor_s = 10', 'kind = "disk-slow"\nat_s = 10\nfor_s = 10')

    async def script(scene: Scene) -> None:
        seen = []
        for _ in range(5):
            await trio.sleep(4.1)
            seen.append(scene.world.calm_since_s)
        await trio.sleep(0.5)
        assert [*seen, scene.world.calm_since_s] == [0, None, None, None, 20, 20]

    play(scenario(*faults), script)


LASTING = {
    "partition": "flaps = 1",
    "stall": "",
    "slow": "",
    "throttle": "",
    "disk-full": "",
    "disk-slow": "",
    "crash": "operation = 500",
    "attack": 'attacker = "replays"',
}


@pytest.mark.parametrize("kind", LASTING)
@pytest.mark.parametrize("for_s", [0, 500], ids=["for good", "for a while"])
def test_what_is_cancelled_is_undone(kind: str, for_s: float) -> None:
    async def script(scene: Scene) -> None:
        await trio.sleep(FIRST_S + 2)
        assert scene.world.calm_since_s is None
        if kind == "attack":
            assert 4 in scene.up()
        else:
            assert scene.hardware() != [WELL] * 4 or scene.ways() != WHOLE
        scene.scope.cancel()
        await scene.over.wait()
        assert scene.hardware() == [WELL] * len(scene.world.machines)
        assert scene.ways() == WHOLE
        assert scene.world.network.cuts.active == []
        assert scene.up() == list(ALL)
        assert scene.world.calm_since_s == trio.current_time()

    play(scenario(f'kind = "{kind}"\nat_s = {FIRST_S}\nfor_s = {for_s}\n{LASTING[kind]}'), script)
