"""Is it worth it? Real swarms against the same nodes alone, and against plain averaging, seed by seed.

    python -m benchmarks.compare examples/compare.toml [--seeds 1 2 3] [--nodes 4] [--steps N]

For each seed one testnet with variance-corrected mixing, its nodes' twins training alone beside it, and one testnet
that differs in the mixing rule only. All take the same number of steps on the same disjoint parts of the text, from
different initial weights. Losses are nats per byte on the same held-out text. Exit code 1 when a bar is missed.
``benchmarks/lockstep.py`` asks the same without a network, in a fraction of the time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cli.testnet_report import Report
from training.run_spec import RunSpec, load_run_spec, spec_as_toml

GAIN_OVER_ALONE = 0.01
GAIN_OVER_MEAN = 0.05


@dataclass(frozen=True)
class Outcome:
    """Held-out losses of one seed."""

    seed: int
    alone: tuple[float, ...]
    mean: float
    corrected: float

    @property
    def passed(self) -> bool:
        """Whether the variance-corrected merged model is as much better as it should be."""
        return (
            self.corrected <= min(self.alone) - GAIN_OVER_ALONE
            and self.corrected <= self.mean - GAIN_OVER_MEAN
        )


def main() -> int:
    """Run all seeds and print one line for each as it comes."""
    parser = argparse.ArgumentParser(
        description="A swarm against its nodes alone and against plain averaging."
    )
    parser.add_argument("spec", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--steps", type=int, help="instead of the spec's")
    options = parser.parse_args()
    spec = load_run_spec(options.spec)
    if options.steps is not None:
        spec = msgspec.structs.replace(spec, train=msgspec.structs.replace(spec.train, steps=options.steps))
    print(
        f"{spec.name}: {options.nodes} nodes, {spec.train.steps} steps each, held-out loss in nats per byte"
    )
    print(
        f"{'seed':>4} {'alone, each node':>{8 * options.nodes}} {'best alone':>11} {'mean':>8} {'corrected':>10}"
    )
    outcomes = []
    for seed in options.seeds:
        outcome = compare(spec, seed, options.nodes)
        outcomes.append(outcome)
        each = " ".join(f"{loss:.4f}" for loss in outcome.alone)
        verdict = "pass" if outcome.passed else "MISSED"
        print(
            f"{seed:>4} {each:>{8 * options.nodes}} {min(outcome.alone):>11.4f} {outcome.mean:>8.4f}"
            f" {outcome.corrected:>10.4f}  {outcome.corrected - min(outcome.alone):+.4f} to the best alone,"
            f" {outcome.corrected - outcome.mean:+.4f} to the mean: {verdict}",
            flush=True,
        )
    print(f"bars: {-GAIN_OVER_ALONE:+.2f} and {-GAIN_OVER_MEAN:+.2f}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def compare(spec: RunSpec, seed: int, nodes: int) -> Outcome:
    """The two testnets of one seed."""
    corrected = testnet(with_rule(spec, "variance_corrected"), seed, nodes, alone=nodes)
    mean = testnet(with_rule(spec, "mean"), seed, nodes, alone=0)
    alone = tuple(result.loss for result in corrected.alone if result.loss is not None)
    assert len(alone) == nodes, "a node alone did not finish"
    assert corrected.merged_loss is not None
    assert mean.merged_loss is not None
    return Outcome(seed, alone, mean.merged_loss, corrected.merged_loss)


def with_rule(spec: RunSpec, rule: str) -> RunSpec:
    """``spec`` with another mixing rule."""
    return msgspec.structs.replace(spec, exchange=msgspec.structs.replace(spec.exchange, rule=rule))


def testnet(spec: RunSpec, seed: int, nodes: int, *, alone: int) -> Report:
    """Run one testnet to its end; a failed one raises, its reason on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        spec_file = Path(folder, "spec.toml")
        spec_file.write_text(spec_as_toml(spec))
        command = [sys.executable, "-m", "cli", "testnet", "up", "--json", "--quiet"]
        command += ["--run", str(spec_file), "--dir", f"{folder}/swarm"]
        command += ["--nodes", str(nodes), "--alone", str(alone), "--seed", str(seed)]
        shown = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        return msgspec.json.decode(shown.stdout, type=Report)


if __name__ == "__main__":
    sys.exit(main())
