"""The trials of ``benchmarks.quality``: one method, one seed, one setting, and what decides its figures.

Owns how a swarm is trained in the simulator over home links, the two ways of training without one (exact data-parallel
training, and every node for itself), and the digest under which results may be kept. Never compares anything.

Swarms are the product's nodes with its own trainer, in virtual time; bytes are counted where the simulated network
takes them. Data-parallel training averages the nodes' gradients and takes one step with the product's optimizer; its
bytes are those of a ring all-reduce in fp32, 8 d (N - 1) / N for d parameters at every step, and its time is its steps
and those bytes on the line.
"""

from __future__ import annotations

import math
import random
from typing import Any, TypeVar

import msgspec
import torch
import trio
from blake3 import blake3
from torch.nn import functional as F

from benchmarks.kept import code_digest
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.network import LinkModel, open_sim_network
from netsim.world import Machine, World
from node.checkpoints import Checkpoints
from node.costs import Costs
from node.gossip_node import GossipNode
from training.data import Corpus
from training.default_run import default_run
from training.learner import Learner, SliceReport
from training.optimizers import learning_rate
from training.run_spec import RunSpec, canonical_bytes, parse_run_spec, run_id
from training.trainer import Trainer

T = TypeVar("T", bound=Trainer)

LATENCY_S = 0.03
STEP_S = 0.1
"""An inner step takes as long on every machine."""
QUICK_BYTES = 4096
"""Of held-out text, where nodes measure for themselves: here only the last figure counts."""
SLOW_BITS_PER_S, FAST_BITS_PER_S = 20e6, 100e6
"""What the line of each machine carries, up and down."""
FINISHED_S_MAX = 3e5
LOCALS_EXAMINED = 3
"""Nodes whose own models are measured before the last merge."""

BASE = """
name = "quality"
init = "shared"
[model]
layers = 3
width = 96
heads = 3
[data]
held_out_bytes = 262144
[train]
batch = 4
[merge]
wait_s_max = 20
"""
"""369,312 parameters, and 512 bytes of text for each node and step."""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A swarm of ``nodes`` with this spec over home links.

    ``start_step``: all begin with the weights and the optimizer that data-parallel training has after so many steps.
    """

    spec: RunSpec
    nodes: int = 8
    start_step: int = 0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial came to. ``loss`` is held out, in nats per byte; of the merged model, where there is one."""

    loss: float
    bytes_per_node: float
    """Sent, everything included."""
    peak_bytes_per_s: float
    """By the busiest node in its busiest second."""
    slow_s: float
    """Virtual seconds over home links of 20 Mbit/s, from the first step until all nodes hold the result."""
    fast_s: float
    """The same over 100 Mbit/s."""
    merges: int
    local_loss: float
    """Mean over the nodes, of their own models before the last merge."""


def base_spec(steps: int, seed: int, changes: dict[str, Any]) -> RunSpec:
    """The spec of all trials with sections changed; the same text, model and optimizer for all."""
    spec = parse_run_spec(BASE, origin="the benchmark")
    fields = msgspec.to_builtins(msgspec.structs.replace(spec, optimizer=default_run("chosen").optimizer))
    fields["seed"] = seed
    fields["train"]["steps"] = steps
    for section, values in changes.items():
        # A section that comes in kinds has no keys in common with another kind.
        fields[section] = values if "kind" in values else fields[section] | values
    return msgspec.convert(fields, RunSpec)


def digest(trial: Trial, how: str) -> str:
    """What a kept outcome is of: the trial, how it is trained, and the code of everything that takes part."""
    hasher = blake3(how.encode())
    hasher.update(code_digest("benchmarks.quality_runs"))
    hasher.update(canonical_bytes(trial.spec))
    hasher.update(msgspec.json.encode([trial.nodes, trial.start_step]))
    return hasher.hexdigest()


# --- without a swarm ----------------------------------------------------------------------------------------------


def trainers(trial: Trial, corpus: Corpus) -> list[Trainer]:
    """The nodes' trainers, each on its part, all from the same weights."""
    return [
        trainer_of(Trainer, trial, corpus, number, peer=f"node-{number}") for number in range(trial.nodes)
    ]


def trainer_of(kind: type[T], trial: Trial, corpus: Corpus, number: int, *, peer: str) -> T:
    """Of the node ``number``, on its part of the text."""
    part = (number % trial.nodes + 1, trial.nodes)
    run = run_id(trial.spec)
    trainer = kind(trial.spec, corpus, run=run, peer=peer, part=part, device="cpu", threads=1)
    if isinstance(trainer, _Restless):
        trainer.peer = peer
    return trainer


def data_parallel(trial: Trial, corpus: Corpus, *, until: int | None = None) -> tuple[Outcome, Trainer]:
    """Exact data-parallel training: one model, the mean of the nodes' gradients at every step; ``until`` some step."""
    spec = trial.spec
    nodes = trainers(trial, corpus)
    model = nodes[0]
    for step in range(until or spec.train.steps):
        model._gradient.zero_()
        for node in nodes:
            inputs, targets = node.task.batch(step)
            logits = model._model(inputs)
            (F.cross_entropy(logits.flatten(0, -2), targets.flatten()) / trial.nodes).backward()  # type: ignore[no-untyped-call]
        model._clip()
        model._optimizer.take_step(learning_rate(spec.optimizer, spec.train.steps, step))
        model.step += 1
    steps = spec.train.steps
    step_bytes = 8 * model.layout.total * (trial.nodes - 1) / trial.nodes
    hops_s = 2 * (trial.nodes - 1) * LATENCY_S
    loss = model.evaluate() if until is None else math.nan
    outcome = Outcome(
        loss=loss,
        bytes_per_node=steps * step_bytes,
        peak_bytes_per_s=SLOW_BITS_PER_S / 8,
        slow_s=steps * (STEP_S + hops_s + step_bytes / (SLOW_BITS_PER_S / 8)),
        fast_s=steps * (STEP_S + hops_s + step_bytes / (FAST_BITS_PER_S / 8)),
        merges=steps,
        local_loss=loss,
    )
    return outcome, model


def alone(trial: Trial, corpus: Corpus) -> Outcome:
    """Every node for itself, and nothing ever sent: the mean of what they come to."""
    losses = []
    for node in trainers(trial, corpus):
        node.run_slice(trial.spec.train.steps)
        losses.append(node.evaluate())
    return Outcome(
        loss=sum(losses) / len(losses),
        bytes_per_node=0.0,
        peak_bytes_per_s=0.0,
        slow_s=trial.spec.train.steps * STEP_S,
        fast_s=trial.spec.train.steps * STEP_S,
        merges=0,
        local_loss=sum(losses) / len(losses),
    )


# --- with one -----------------------------------------------------------------------------------------------------


class Examined(Trainer):
    """The daemon's trainer, which measures less on the way."""

    def evaluate(self, values: torch.Tensor | None = None, *, bytes_max: int | None = None) -> float:
        """As the daemon's, on a little text."""
        return super().evaluate(values, bytes_max=bytes_max or QUICK_BYTES)

    def examine(self, values: torch.Tensor | None = None) -> float:
        """On all of it."""
        return super().evaluate(values)


class _Restless(Examined):
    """A trainer that only pretends: for measuring time, which does not depend on what is learned."""

    peer = ""

    def run_slice(self, steps: int) -> SliceReport:
        """Weights that change a little, so that no two shards are alike."""
        self.step += steps
        tokens = steps * self.task.batch_tokens
        self.tokens += tokens
        generator = torch.Generator().manual_seed(id_of(self.peer, self.step))
        noise = torch.randn(self.layout.total, generator=generator)
        self.add(None, noise.mul_(1e-4))
        return SliceReport(steps, tokens, 1.0)


def id_of(peer: str, step: int) -> int:
    """A number for each node and step."""
    return int.from_bytes(blake3(f"{peer}/{step}".encode()).digest(length=7), "little")


def swarm(trial: Trial, corpus: Corpus, *, seed: int, start: bytes | None = None) -> Outcome:
    """Train a swarm in the simulator over slow lines; over fast ones it only pretends, to tell the time.

    ``start``: the state that all begin with, from ``started_at``.
    """
    torch.set_num_threads(1)
    outcomes = []
    for kind, bits_per_s in ((_Restless, FAST_BITS_PER_S), (Examined, SLOW_BITS_PER_S)):
        with deterministic_scheduling(seed):
            outcomes.append(trio.run(_swarm, trial, corpus, seed, start, kind, bits_per_s, clock=SimClock()))
    fast, slow = outcomes
    return msgspec.structs.replace(slow, fast_s=fast.slow_s)


async def _swarm(
    trial: Trial, corpus: Corpus, seed: int, start: bytes | None, kind: type[Examined], bits_per_s: float
) -> Outcome:
    def learner(machine: Machine) -> Learner:
        trainer = trainer_of(kind, trial, corpus, machine.number, peer=machine.peer)
        if start is not None:
            # What all begin with, so that the first merge is a difference from it.
            trainer.load(start)
        return trainer

    async with (
        open_sim_network(random.Random(seed), link=LinkModel(latency_s=LATENCY_S)) as network,
        trio.open_nursery() as nursery,
    ):
        world = World(network, nursery, spec=trial.spec, seed=seed, learners=learner)
        for _ in range(trial.nodes):
            machine = world.add_machine()
            machine.costs = Costs(step_s=STEP_S, evaluate_s=0.0)
            rate = bits_per_s / 8
            network.set_line(machine.peer, up_bytes_per_s=rate, down_bytes_per_s=rate)
            if start is not None:
                await Checkpoints(machine.disk).save(trial.start_step, start)
        outcome = await _watched(world)
        nursery.cancel_scope.cancel()
    return outcome


async def _watched(world: World) -> Outcome:
    nodes = [node for node in await world.start_all() if isinstance(node, GossipNode)]
    began_s, peak = trio.current_time(), 0.0
    sent = [0] * len(nodes)
    own: dict[int, torch.Tensor] = {}
    while not all(node.phase == "finished" for node in nodes):
        await trio.sleep(1.0)
        now = [machine.bytes_sent for machine in world.machines]
        peak = max(peak, *(after - before for after, before in zip(now, sent, strict=True)))
        sent = now
        for number, node in enumerate(nodes):
            # Where training is over the last merge is yet to come.
            if node.phase == "merging" and number not in own:
                own[number] = node.trainer.read()
        if trio.current_time() - began_s > FINISHED_S_MAX:
            raise SystemExit("the swarm did not finish")
    time_s = trio.current_time() - began_s
    anchors = [node.merge_host.anchor for node in nodes]
    first, examiner = anchors[0], nodes[0].trainer
    assert first is not None
    assert isinstance(examiner, Examined)
    assert all(anchor is not None and torch.equal(anchor, first) for anchor in anchors)
    locals_ = [examiner.examine(values) for values in list(own.values())[:LOCALS_EXAMINED]]
    return Outcome(
        loss=examiner.examine(first),
        bytes_per_node=sum(sent) / len(nodes),
        peak_bytes_per_s=float(peak),
        slow_s=time_s,
        fast_s=math.nan,
        merges=nodes[0].merger.head_height,
        local_loss=sum(locals_) / len(locals_) if locals_ else math.nan,
    )


def started_at(trial: Trial, corpus: Corpus, model: Trainer) -> bytes:
    """The state of a node of ``trial`` that begins where ``model`` is: its weights, its optimizer's state, its step."""
    node = trainers(trial, corpus)[0]
    for name, vector in node._vectors().items():
        theirs = model.layout.views(model._vectors()[name])
        for tensor, values in node.layout.views(vector).items():
            values.copy_(theirs[tensor])
    node.step, node.tokens = model.step, model.step * model.task.batch_tokens
    return node.save()
