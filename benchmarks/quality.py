"""How well swarms train over home links, method by method, on the same work: prints a table.

    python -m benchmarks.quality [--seeds N] [--steps N] [--only NAME ...] [--keep FOLDER]

Eight nodes train a byte-level GPT of 0.37 M parameters on the standard library's sources, every method the same number
of tokens from the same weights, over home links of 20 Mbit/s; the time over 100 Mbit/s is measured too, and exact
data-parallel training stands beside them. What is done is kept in ``--keep``, under the code and the spec that it is
of, so a run that was stopped goes on where it was.

Relies on: ``benchmarks.quality_runs`` for the trials, which come to the same wherever they run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks.experiments import as_markdown
from benchmarks.quality_runs import (
    Outcome,
    Trial,
    alone,
    base_spec,
    data_parallel,
    digest,
    swarm,
)
from training.data import Corpus

DILOCO = {"kind": "nesterov", "rate": 0.7, "momentum": 0.9, "wire": "fp32"}


@dataclass(frozen=True, slots=True)
class Method:
    """A row: a name, what it changes in the spec, and how it is trained."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    how: Literal["swarm", "data-parallel", "alone"] = "swarm"


def every(steps: int, **more: Any) -> dict[str, Any]:
    """A merge every so many steps."""
    return {"schedule": {"preset": "every"}, "exchange": {"every_steps": steps}} | more


FROM_SCRATCH = (
    Method("data-parallel", how="data-parallel"),
    Method("local only", how="alone"),
    Method("final-only", {"schedule": {"preset": "final-only"}}),
    Method("FedAvg, H = 50", every(50)),
    Method("DiLoCo, H = 50", every(50, outer=DILOCO)),
    Method(
        "Streaming DiLoCo, fp32",
        {
            "schedule": {"preset": "every"},
            "exchange": {"every_steps": 12, "fragments": 4},
            "outer": DILOCO | {"streaming": True},
        },
    ),
    Method(
        "Streaming DiLoCo, E3M0",
        {
            "schedule": {"preset": "every"},
            "exchange": {"every_steps": 12, "fragments": 4},
            "outer": DILOCO | {"streaming": True, "wire": "e3m0"},
        },
    ),
    Method("NoLoCo, H = 50", {"exchange": {"every_steps": 50}, "outer": {"kind": "pairs"}}),
    Method("SparseLoCo, H = 30", every(30, outer=DILOCO | {"rate": 1.0, "momentum": 0.0, "wire": "top64"})),
    Method("pull, mean", {"exchange": {"every_steps": 50, "rule": "mean"}}),
    Method("pull, variance-corrected", {"exchange": {"every_steps": 50}}),
    Method("late-heavy", {"schedule": {"preset": "late-heavy"}, "exchange": {"every_steps": 10}}),
    Method("E3M0, H = 10", every(10, outer=DILOCO | {"momentum": 0.8, "wire": "e3m0"})),
    Method("int8, H = 10", every(10, outer=DILOCO | {"momentum": 0.8, "wire": "int8"})),
    Method(
        "early-dense, E3M0",
        {
            "schedule": {"preset": "early-dense"},
            "exchange": {"every_steps": 5},
            "outer": DILOCO | {"momentum": 0.8, "wire": "e3m0"},
        },
    ),
)


class Kept:
    """Outcomes in a folder, by their digest."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def of(self, name: str, key: str, make: Callable[[], Outcome]) -> Outcome:
        """What was kept under ``key``, or what ``make`` comes to, kept from now on."""
        file = None if self._folder is None else self._folder / f"{key}.json"
        if file is not None and file.exists():
            return msgspec.json.decode(file.read_bytes(), type=Outcome)
        began_s = time.perf_counter()
        outcome = make()
        print(f"{name}: {outcome.loss:.4f}, took {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
        if file is not None:
            file.write_bytes(msgspec.json.encode(outcome))
        return outcome


def measured(method: Method, corpus: Corpus, *, steps: int, seed: int, kept: Kept) -> Outcome:
    """One row for one seed."""
    trial = Trial(spec=base_spec(steps, seed, method.changes))

    def make() -> Outcome:
        match method.how:
            case "data-parallel":
                return data_parallel(trial, corpus)[0]
            case "alone":
                return alone(trial, corpus)
            case _:
                return swarm(trial, corpus, seed=seed)

    return kept.of(f"{method.name}, seed {seed}", digest(trial, method.how), make)


def table(methods: Sequence[Method], outcomes: dict[str, list[Outcome]], *, baseline: str) -> list[list[str]]:
    """A header and a row for each method, best loss first."""
    exact = statistics.fmean(outcome.loss for outcome in outcomes[baseline])
    exact_bytes = outcomes[baseline][0].bytes_per_node
    rows = []
    for method in methods:
        of = outcomes[method.name]
        loss = statistics.fmean(outcome.loss for outcome in of)
        spread = max(outcome.loss for outcome in of) - min(outcome.loss for outcome in of)
        sent = statistics.fmean(outcome.bytes_per_node for outcome in of)
        rows.append(
            (
                loss,
                [
                    method.name,
                    f"{loss:.4f} ± {spread / 2:.4f}",
                    f"{100 * (loss / exact - 1):+.1f}",
                    f"{statistics.fmean(outcome.local_loss for outcome in of):.4f}",
                    f"{sent / 1e6:.1f}",
                    f"{exact_bytes / sent:.0f} ×" if sent else "-",
                    f"{max(outcome.peak_bytes_per_s for outcome in of) / 1e6:.2f}",
                    f"{statistics.fmean(outcome.slow_s for outcome in of):.0f}",
                    f"{statistics.fmean(outcome.fast_s for outcome in of):.0f}",
                    str(of[0].merges),
                ],
            )
        )
    head = [
        "method",
        "held-out loss",
        "% over data-parallel",
        "nodes before the last merge",
        "MB sent per node",
        "fewer than data-parallel",
        "peak MB/s",
        "s at 20 Mbit/s",
        "s at 100 Mbit/s",
        "merges",
    ]
    return [head, *(row for _, row in sorted(rows, key=lambda row: row[0]))]


def main() -> int:
    """Print the table; 0 whatever it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--keep", type=Path, default=Path("quality"))
    arguments = parser.parse_args()
    corpus = Corpus.load("stdlib", None)
    kept = Kept(arguments.keep)
    wanted = [m for m in FROM_SCRATCH if not arguments.only or m.name in (*arguments.only, "data-parallel")]
    outcomes = {
        method.name: [
            measured(
                method,
                corpus,
                steps=arguments.steps,
                seed=seed,
                kept=kept,
            )
            for seed in range(1, arguments.seeds + 1)
        ]
        for method in wanted
    }
    made = table(wanted, outcomes, baseline="data-parallel")
    print(as_markdown(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
