"""In how many rounds does variance-corrected averaging come to what plain averaging ends at? Sixteen nodes in lockstep.

    python -m benchmarks.variance_correction [--seeds 1 2] [--nodes 16] [--steps N]

The byte-level GPT of ``benchmarks.quality`` on the standard library's sources: from different initial weights, where
averages of unlike models lose variance, and from equal ones, where nothing is lost that could be corrected. A round is
an exchange, one random peer each, every five steps. Losses are held out, in nats per byte, mean over the nodes: what a
node has if the swarm stops now. Exit code 1 where the corrected swarm needs more than half the plain one's rounds from
different weights; from equal ones the table says what comes of it, and no bar holds.

Relies on ``benchmarks.lockstep`` for one exchange without a network.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.experiments import as_markdown
from benchmarks.lockstep import changed, exchange_once
from benchmarks.quality_runs import Trial, base_spec, trainers
from training.codecs.named import WIRES
from training.data import Corpus
from training.merge_math import weighted_average
from training.run_spec import RunSpec
from training.spec_sections import MixingRuleName

EVERY_STEPS = 5
MEASURED_EVERY = 6
"""Rounds between two measurements."""
MEASURED_BYTES = 16_384
"""Of held-out text, for each node and measurement."""
SHARE_OF_ROUNDS_MAX = 0.5


@dataclass(frozen=True, slots=True)
class Course:
    """One swarm over its rounds."""

    rounds: tuple[int, ...]
    losses: tuple[float, ...]
    """Mean over the nodes, after so many rounds."""
    merged: float
    """Of the exact average of all nodes at the end."""

    def reaches(self, loss: float) -> int | None:
        """The first measured round at or below ``loss``."""
        return next((at for at, own in zip(self.rounds, self.losses, strict=True) if own <= loss), None)


def course(spec: RunSpec, rule: MixingRuleName, corpus: Corpus, nodes: int) -> Course:
    """Train a swarm in lockstep by ``rule``."""
    spec = changed(spec, [f'exchange.rule="{rule}"'])
    swarm = trainers(Trial(spec=spec, nodes=nodes), corpus)
    rng = random.Random(spec.seed)
    codec = WIRES[spec.exchange.wire]
    rounds, losses = [], []
    total = spec.train.steps // EVERY_STEPS
    for round_ in range(1, total + 1):
        for trainer in swarm:
            trainer.run_slice(EVERY_STEPS)
        exchange_once(swarm, 0, [codec.encode(trainer.read(0)) for trainer in swarm], spec, rng)
        if round_ % MEASURED_EVERY == 0 or round_ == total:
            rounds.append(round_)
            losses.append(statistics.fmean(own.evaluate(bytes_max=MEASURED_BYTES) for own in swarm))
    average = weighted_average([(trainer.read(), trainer.tokens) for trainer in swarm])
    return Course(tuple(rounds), tuple(losses), swarm[0].evaluate(average, bytes_max=MEASURED_BYTES))


def main() -> int:
    """Run all seeds, both beginnings, both rules; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus.load("stdlib", None)
    rows, met = [], True
    for init in ("per-peer", "shared"):
        for seed in arguments.seeds:
            spec = changed(
                base_spec(arguments.steps, seed, {"exchange": {"every_steps": EVERY_STEPS}}),
                [f'init="{init}"', 'schedule.preset="constant"'],
            )
            plain, corrected = (
                course(spec, rule, corpus, arguments.nodes) for rule in ("mean", "variance_corrected")
            )
            rows.append(row(init, seed, plain, corrected))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            reached = corrected.reaches(plain.losses[-1])
            if init == "per-peer":
                met = met and reached is not None and reached <= SHARE_OF_ROUNDS_MAX * plain.rounds[-1]
    print(as_markdown([HEAD, *rows]))
    return 0 if met else 1


HEAD = [
    "initial weights",
    "seed",
    "plain mean, its rounds",
    "its loss then",
    "corrected there after",
    "share of the rounds",
    "corrected, loss at the end",
    "averages of all: plain, corrected",
]


def row(init: str, seed: int, plain: Course, corrected: Course) -> Sequence[str]:
    """One line of the table."""
    reached = corrected.reaches(plain.losses[-1])
    return [
        {"per-peer": "different", "shared": "equal"}[init],
        str(seed),
        str(plain.rounds[-1]),
        f"{plain.losses[-1]:.4f}",
        "never" if reached is None else str(reached),
        "-" if reached is None else f"{reached / plain.rounds[-1]:.2f}",
        f"{corrected.losses[-1]:.4f}",
        f"{plain.merged:.4f}, {corrected.merged:.4f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
