"""What a simulation is: the swarm, its network, its machines, what goes wrong, and what must hold. Values only.

Owns the schema of a scenario. A scenario and a seed decide everything that happens (``netsim.determinism``); nothing
here runs. Reading files, names and ``--set`` is ``netsim.registry``'s, drawing from ranges ``netsim.draw``'s.

A ``Range`` is one number, or ``[low, high]`` to draw from per machine, pair or seed.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from training.run_spec import RunSpec
from training.spec_sections import Init, OuterSpec

FORMAT = 1
"""Version of the schema; results carry it too."""

NODES_MAX = 1024
"""As many as a swarm may have members (``Limits.members_max``)."""

Amount = Annotated[float, Meta(ge=0, le=1e15)]
Range: TypeAlias = Amount | Annotated[tuple[Amount, ...], Meta(min_length=2, max_length=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Setting: TypeAlias = bool | int | float | str | list[bool | int | float | str]
"""A value of one key, as TOML has it."""
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Machines: TypeAlias = (
    Annotated[int, Meta(ge=0, lt=NODES_MAX)] | Annotated[str, Meta(pattern=r"^(all|founder)\Z")]
)


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, every key known, every value bounded."""


class NetworkSpec(_Section, frozen=True, kw_only=True):
    """The links between machines. Rates of 0 are unlimited."""

    latency_s: Range = 0.02
    """One way, drawn once for each pair of machines."""
    latency_matrix_s: tuple[tuple[Seconds, ...], ...] = ()
    """Instead: latency between regions; machine i stands in region i modulo their number."""
    jitter_s: Amount = 0.0
    """Uniform extra delay of each frame; order is kept, as TCP keeps it."""
    up_bytes_per_s: Range = 0.0
    """Of each machine's line, shared fairly by what it sends at the same time."""
    down_bytes_per_s: Range = 0.0
    breaks_per_hour: Amount = 0.0
    """How often each connection breaks by itself."""
    undiallable: Share = 0.0
    """Share of machines that can dial out but not be dialled, as behind most NATs; the founder is never one."""


class MachinesSpec(_Section, frozen=True, kw_only=True):
    """The computers. Slowness and the like are drawn per machine, on a logarithmic scale."""

    step_s: Amount = 0.1
    """Virtual seconds of one inner step on a machine of slowness 1."""
    slowness: Range = 1.0
    disk_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 40)] = 64 << 20
    disk_s: Range = 0.0
    """Each disk operation takes this long."""
    signatures: Literal["stub", "ed25519"] = "stub"
    """``stub``: a keyed hash, which costs a hundredth; good wherever forging is not the question."""


class LearnerSpec(_Section, frozen=True, kw_only=True):
    """What is learned. ``torch`` trains the run's own model on its own data."""

    kind: Literal["quadratic", "torch"] = "quadratic"
    dimension: Annotated[int, Meta(ge=8, le=1 << 20)] = 64
    """Parameters of the quadratic."""
    noise: Amount = 0.3
    """Standard deviation of each element of its gradients."""
    heterogeneity: Amount = 1.0
    """How far apart the machines' own optima lie."""
    learning_rate: Annotated[float, Meta(gt=0, lt=2)] = 0.05
    """Of the quadratic's descent; next to nothing where only what mixing does is of interest."""
    dataset: Literal["", "digits"] = ""
    """For ``torch`` with labelled data: what the machines share among them."""
    dirichlet: Amount = 0.0
    """How unlike the machines' labels are (small is unlike); 0 deals them out evenly."""
    resampled: bool = False
    """Each machine draws from all of the data by its own preference, instead of owning a part."""


class ArrivalsSpec(_Section, frozen=True, kw_only=True):
    """When machines start. The founder starts at 0 and is everybody's bootstrap unless ``bootstrap`` says otherwise."""

    over_s: Seconds = 0.0
    """The others start at times spread evenly over this long."""
    later: Annotated[int, Meta(ge=0, lt=NODES_MAX)] = 0
    """This many machines, the last ones, start only at ``later_at_s``, spread over ``later_over_s``."""
    later_at_s: Seconds = 0.0
    later_over_s: Seconds = 0.0
    bootstrap: Literal["founder", "random"] = "founder"


class _Fault(_Section, frozen=True, kw_only=True, tag_field="kind"):
    """Something that happens at a time. ``at_s`` may be drawn; ``for_s`` 0 is for good."""

    at_s: Range
    for_s: Range = 0.0
    machines: tuple[Machines, ...] = ()
    """Which machines it happens to; none named: ``count`` of those that ``pick`` says."""
    count: Annotated[int, Meta(ge=0, lt=NODES_MAX)] = 0
    share: Share = 0.0
    """Instead of ``count``: of all that run now."""
    pick: Literal["random", "hubs"] = "random"
    """``hubs``: those with the most neighbours in the topology."""


class Kill(_Fault, frozen=True, kw_only=True, tag="kill"):
    """The process dies (SIGKILL). After ``for_s`` it is started again."""


class PowerCut(_Fault, frozen=True, kw_only=True, tag="power-cut"):
    """The machine dies, and with it what was not synced to disk. After ``for_s`` it comes back."""


class Leave(_Fault, frozen=True, kw_only=True, tag="leave"):
    """A clean stop: checkpoint and goodbye. After ``for_s`` it is started again."""


class Partition(_Fault, frozen=True, kw_only=True, tag="partition"):
    """``machines`` are cut off from all others, or all are split in ``parts`` at random; healed after ``for_s``."""

    parts: Annotated[int, Meta(ge=2, le=4)] = 2
    one_way: bool = False
    """Frames from the first part to the others are lost, the other way they pass."""
    flaps: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Cut and healed so many times, in equal turns, within ``for_s``."""


class Stall(_Fault, frozen=True, kw_only=True, tag="stall"):
    """Nothing leaves or reaches the machines for ``for_s``, and then everything does; connections stay up."""


class Suspend(_Fault, frozen=True, kw_only=True, tag="suspend"):
    """The machine computes nothing for ``for_s``, as if closed and opened again."""


class Slow(_Fault, frozen=True, kw_only=True, tag="slow"):
    """Computing takes ``times`` as long for ``for_s``."""

    times: Range = 10.0


class Throttle(_Fault, frozen=True, kw_only=True, tag="throttle"):
    """The machine's line carries ``bytes_per_s`` each way for ``for_s``."""

    bytes_per_s: Range = 16384.0


class Break(_Fault, frozen=True, kw_only=True, tag="break"):
    """All connections of the machines break at once; they may dial again at once."""


class DiskFull(_Fault, frozen=True, kw_only=True, tag="disk-full"):
    """No byte more fits on the disk for ``for_s``."""


class DiskSlow(_Fault, frozen=True, kw_only=True, tag="disk-slow"):
    """Each disk operation takes ``operation_s`` for ``for_s``."""

    operation_s: Range = 0.5


class BitFlip(_Fault, frozen=True, kw_only=True, tag="bit-flip"):
    """One bit of one file of each machine changes where it lies."""


class Crash(_Fault, frozen=True, kw_only=True, tag="crash"):
    """The power goes within a disk operation: before or after its effect, of the ``operation``-th from ``at_s`` on."""

    operation: Range = (0.0, 40.0)


class Join(_Fault, frozen=True, kw_only=True, tag="join"):
    """``count`` machines that were never there join, spread over ``for_s``, bootstrapped from any that is up."""


class Attack(_Fault, frozen=True, kw_only=True, tag="attack"):
    """A hostile member of ``netsim.attackers`` for ``for_s``."""

    attacker: str


Fault: TypeAlias = (
    Kill
    | PowerCut
    | Leave
    | Partition
    | Stall
    | Suspend
    | Slow
    | Throttle
    | Break
    | DiskFull
    | DiskSlow
    | BitFlip
    | Crash
    | Join
    | Attack
)


class ChurnSpec(_Section, frozen=True, kw_only=True):
    """Machines that come and go all the time."""

    per_hour: Range = 0.0
    """Departures per hour, as a share of the machines that are up; drawn per seed."""
    killed: Share = 0.5
    """Share of departures that are kills or power cuts, the rest leave cleanly."""
    replaced: Share = 0.5
    """Share of departures that a newcomer takes the place of; the others return with what is on their disk."""
    away_s: Range = (10.0, 300.0)
    """How long until the machine, or the newcomer in its place, is there."""


class RandomFaultsSpec(_Section, frozen=True, kw_only=True):
    """Faults drawn for each seed: which kinds are on, how often and how strong each is (swarm testing)."""

    kinds: tuple[str, ...] = ()
    """Kinds that may be on, by the name a ``[[fault]]`` has; none: no random faults."""
    on: Share = 0.5
    """Chance of each kind to be on."""
    per_hour: Range = (2.0, 30.0)
    """How often a kind that is on strikes, drawn on a logarithmic scale."""
    for_s: Range = (1.0, 120.0)
    """How long it lasts, drawn for each strike on a logarithmic scale."""


class LivenessSpec(_Section, frozen=True, kw_only=True):
    """The end of a seed: faults stop, only a core stays, and it must agree."""

    last_s: Seconds = 0.0
    """Length of this phase, at the end of ``duration_s``; 0 leaves it out."""
    core: Annotated[float, Meta(gt=0, le=1)] = 0.7
    """Share of the machines that are in the core; all others are off for good."""


class ExpectSpec(_Section, frozen=True, kw_only=True):
    """A bound on one figure of the summary of a seed."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None


class Variant(_Section, frozen=True, kw_only=True):
    """One of the settings an experiment compares: the scenario with some keys changed."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._ =,-]{0,63}\Z")]
    change: dict[str, Setting]
    """Dotted key -> value, as for ``--set``."""
    small: bool = True
    """Whether the small form has it too."""


class ExperimentSpec(_Section, frozen=True, kw_only=True):
    """A finding to reproduce: variants, seeds of each, and the criterion that says whether it was."""

    criterion: str
    """The name of a function in ``netsim.experiments``."""
    seeds: Annotated[int, Meta(ge=1, le=1000)] = 3
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1, max_length=64)]
    small: dict[str, Setting] = {}
    """Changes that make it a test of a minute, ``experiment.seeds`` among them; ``--small`` applies them first."""


class Scenario(_Section, frozen=True, kw_only=True):
    """A whole scenario, as its TOML file says it."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9/._-]{0,63}\Z")]
    about: str = ""
    """One line for ``sim ls``."""
    nodes: Annotated[int, Meta(ge=1, le=NODES_MAX)] = 8
    """Machines there at the beginning; ``join`` faults and churn bring more."""
    duration_s: Annotated[float, Meta(gt=0, le=1e7)] = 600.0
    merge_every_s: Seconds = 0.0
    """If set, merges and inner steps of the run are made to fit a merge this often at slowness 1."""
    sample_every_s: Annotated[float, Meta(gt=0, le=1e6)] = 5.0
    topology: str = "full"
    """Who may mix with whom (``netsim.topology``)."""
    run: RunSpec
    outers: Annotated[tuple[OuterSpec, ...], Meta(max_length=16)] = ()
    """Outer steps of which each seed draws one for the run; none: the run's own."""
    inits: Annotated[tuple[Init, ...], Meta(max_length=2)] = ()
    """Likewise, whether members begin alike."""
    network: NetworkSpec = NetworkSpec()
    machines: MachinesSpec = MachinesSpec()
    learner: LearnerSpec = LearnerSpec()
    arrivals: ArrivalsSpec = ArrivalsSpec()
    fault: Annotated[tuple[Fault, ...], Meta(max_length=256)] = ()
    churn: ChurnSpec = ChurnSpec()
    random_faults: RandomFaultsSpec = RandomFaultsSpec()
    liveness: LivenessSpec = LivenessSpec()
    expect: Annotated[tuple[ExpectSpec, ...], Meta(max_length=64)] = ()
    experiment: ExperimentSpec | None = None
