"""What gossip is worth, without a network: nodes in lockstep in one process, on the product's own training code.

    python benchmarks/lockstep.py examples/compare.toml [--seeds 1 2 3] [--nodes 4] [--lag 0] [--set KEY=VALUE ...]

For each seed it trains the nodes alone, with plain averaging and with variance-corrected averaging, the same number of
steps on disjoint parts of the text, and prints held-out losses in nats per byte: the best node alone, and the exact
average of all nodes at the end ("merged"). ``--lag 1`` lets nodes mix with peers' snapshots from one exchange ago, as
on a slow network. ``--set`` tries another value of a spec key, such as ``exchange.every_steps=10``.
"""

from __future__ import annotations

import argparse
import random
import time
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import torch

from training.codecs.named import WIRES
from training.data import Corpus
from training.merge_math import weighted_average
from training.mixing import check_peer_values, mix
from training.run_spec import RunSpec, load_run_spec, run_id
from training.schedules import Schedule
from training.trainer import Trainer


def main() -> None:
    """Print one line per seed and the margins over all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--lag", type=int, default=0, help="exchanges between a snapshot and its use")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="spec keys to change, as TOML"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus.load("stdlib", None)
    print("seed   alone best   alone mean   plain merged   corrected merged   corrected local   ms/step")
    over_alone, over_plain = [], []
    for seed in arguments.seeds:
        spec = changed(load_run_spec(arguments.spec), [*arguments.set, f"seed={seed}"])
        began_s = time.perf_counter()
        alone, _ = swarm(spec, None, corpus, arguments.nodes, arguments.lag)
        step_ms = 1e3 * (time.perf_counter() - began_s) / (arguments.nodes * spec.train.steps)
        _, plain = swarm(spec, "mean", corpus, arguments.nodes, arguments.lag)
        local, corrected = swarm(spec, "variance_corrected", corpus, arguments.nodes, arguments.lag)
        over_alone.append(min(alone) - corrected)
        over_plain.append(plain - corrected)
        print(
            f"{seed:4} {min(alone):12.4f} {mean(alone):12.4f} {plain:14.4f} {corrected:18.4f} "
            f"{mean(local):17.4f} {step_ms:9.1f}",
            flush=True,
        )
    print(f"corrected merged is better than the best node alone by at least {min(over_alone):.4f} (bar 0.01)")
    print(f"and better than plain merged by at least                       {min(over_plain):.4f} (bar 0.05)")


def swarm(spec: RunSpec, rule: str | None, corpus: Corpus, nodes: int, lag: int) -> tuple[list[float], float]:
    """Train ``nodes`` nodes in lockstep; held-out loss of each, and of their exact average, at the end."""
    if rule is not None:
        spec = changed(spec, [f'exchange.rule="{rule}"'])
    trainers = [
        Trainer(
            spec,
            corpus,
            run=run_id(spec),
            peer=f"node-{index}",
            part=(index + 1, nodes),
            device="cpu",
            threads=None,
        )
        for index in range(nodes)
    ]
    rng = random.Random(spec.seed)
    published: list[list[bytes]] = []
    codec = WIRES[spec.exchange.wire]
    for exchange in range(spec.train.steps // spec.exchange.every_steps):
        for trainer in trainers:
            trainer.run_slice(spec.exchange.every_steps)
        if rule is None:
            continue
        fragment = exchange % spec.exchange.fragments
        published.append([codec.encode(trainer.read(fragment)) for trainer in trainers])
        # A snapshot of the same fragment is a whole cycle older for each exchange of lag.
        age = 1 + lag * spec.exchange.fragments
        if len(published) >= age:
            exchange_once(trainers, fragment, published[-age], spec, rng)
    merged = weighted_average([(trainer.read(), trainer.tokens) for trainer in trainers])
    return [trainer.evaluate() for trainer in trainers], trainers[0].evaluate(merged)


def exchange_once(
    trainers: list[Trainer], fragment: int, snapshots: list[bytes], spec: RunSpec, rng: random.Random
) -> None:
    """Every node pulls ``snapshots`` of its random peers and mixes them into its live weights."""
    phase = Schedule.of(spec).at(trainers[0].step / spec.train.steps)
    for index, trainer in enumerate(trainers):
        own = trainer.read(fragment)
        spans = trainer.layout.fragment_spans(fragment)
        peers = rng.sample([peer for peer in range(len(trainers)) if peer != index], phase.peers)
        pulled = [WIRES[spec.exchange.wire].decode(snapshots[peer], own.numel()) for peer in peers]
        for values in pulled:
            if refused := check_peer_values(own, values, spans):
                raise SystemExit(f"step {trainer.step}: {refused.text}")
        trainer.add(fragment, mix(spec.exchange.rule, own, pulled, spans).values - own)


def changed(spec: RunSpec, assignments: list[str]) -> RunSpec:
    """``spec`` with dotted keys set to TOML values."""
    fields: dict[str, Any] = msgspec.to_builtins(spec)
    for section, values in tomllib.loads("\n".join(assignments)).items():
        fields[section] = fields[section] | values if isinstance(values, dict) else values
    return msgspec.convert(fields, RunSpec)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
