"""What one hostile member of eight does to what a swarm learns.

Real nodes with their trainer, in virtual time over home links, on the standard library. The eighth joins like anybody,
trains, and turns round what it tells, about as large as the bounds on size let through: its contributions to merges in
a run of the default spec, its snapshots in one that mixes by pulls. The measure is the same swarm, its eighth honest.

Usage: python -m benchmarks.hostile_member
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from typing import Any

import structlog
import torch
import trio

from benchmarks.harness import Figure
from benchmarks.quality import by_default
from benchmarks.quality_runs import LATENCY_S, SLOW_BITS_PER_S, STEP_S, Examined, Trial, base_spec, trainer_of
from netsim.attackers import ATTACKERS
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.network import LinkModel, open_sim_network
from netsim.world import Machine, World
from node.costs import Costs
from node.gossip_node import GossipNode
from training.data import Corpus
from training.learner import Learner
from training.run_spec import RunSpec

MEMBERS = 8
STEPS = 400
LOSS_RATIO_MAX = 1.05
ROUNDS_MAX = 10
EVERY_STEPS = 8
PULLS: dict[str, Any] = {
    "schedule": {
        "preset": "custom",
        "phases": [{"until": 1.0, "peers": 2, "merges": 2}],
    },
    "exchange": {"every_steps": EVERY_STEPS},
}
"""Two members are asked at a time, and the whole swarm merges half-way and at the end."""
ATTACKS = (("turned-inputs", by_default()), ("turned-fragments", PULLS))


@dataclass(slots=True)
class Outcome:
    """What a swarm came to."""

    loss: float
    """Of the merged model, held out."""
    rounds: int | None
    """Of merges or exchanges, until somebody had told of the liar's offence; None: nobody did."""


def train(spec: RunSpec, corpus: Corpus, attack: str | None) -> Outcome:
    """One run, with a liar or without."""
    with deterministic_scheduling(spec.seed):
        return trio.run(_train, spec, corpus, attack, clock=SimClock())


async def _train(spec: RunSpec, corpus: Corpus, attack: str | None) -> Outcome:
    trial = Trial(spec=spec, nodes=MEMBERS)

    def learner(machine: Machine) -> Learner:
        return trainer_of(Examined, trial, corpus, machine.number, peer=machine.peer)

    async with (
        open_sim_network(random.Random(spec.seed), link=LinkModel(latency_s=LATENCY_S)) as network,
        trio.open_nursery() as nursery,
    ):
        world = World(network, nursery, spec=spec, seed=spec.seed, learners=learner)
        for _ in range(MEMBERS):
            machine = world.add_machine()
            machine.costs = Costs(step_s=STEP_S, evaluate_s=0.0)
            rate = SLOW_BITS_PER_S / 8
            network.set_line(machine.peer, up_bytes_per_s=rate, down_bytes_per_s=rate)
        last = world.machines[-1]
        if attack is not None:
            last.spoil = ATTACKERS[attack].spoil
        outcome = await _watched(world, last, None if attack is None else ATTACKERS[attack].refused_as)
        nursery.cancel_scope.cancel()
    return outcome


async def _watched(world: World, liar: Machine, offence: str | None) -> Outcome:
    nodes = [node for node in await world.start_all() if isinstance(node, GossipNode)]
    honest = [node for node in nodes if node.local != liar.peer]
    rounds: int | None = None
    while not all(node.phase == "finished" for node in honest):
        await trio.sleep(STEP_S)
        if offence is None or rounds is not None or not isinstance(liar.node, GossipNode):
            continue
        if any(node.ledger.last_problem(liar.peer).startswith(offence) for node in honest):
            rounds = liar.node.trainer.step // EVERY_STEPS
    anchor = honest[0].merge_host.anchor
    assert anchor is not None
    trainer = honest[0].trainer
    assert isinstance(trainer, Examined)
    return Outcome(trainer.examine(anchor), rounds)


def main() -> None:
    """Train the four swarms and print what became of them."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    torch.set_num_threads(1)
    corpus = Corpus.load("stdlib", None)
    figures = []
    for attack, changes in ATTACKS:
        spec = base_spec(STEPS, 1, changes)
        clean, attacked = train(spec, corpus, None), train(spec, corpus, attack)
        rounds = float("inf") if attacked.rounds is None else float(attacked.rounds)
        figures += [
            Figure(f"{attack}: held-out loss without it", "nats", (clean.loss,)),
            Figure(
                f"{attack}: with it, as a multiple", "", (attacked.loss / clean.loss,), at_most=LOSS_RATIO_MAX
            ),
            Figure(f"{attack}: rounds until it was named", "", (rounds,), at_most=ROUNDS_MAX),
        ]
        for figure in figures[-3:]:
            print(figure.line(), flush=True)
    if any(figure.met is False for figure in figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
