"""How well swarms train over home links, method by method, on the same work: writes the tables of docs/QUALITY.md.

    python -m benchmarks.quality [--tables NAME ...] [--methods NAME ...] [--seeds N] [--steps N] [--page FILE]

Swarms of the product's own nodes train a byte-level GPT of 0.37 M parameters on the standard library's sources in the
simulator, every method of a table the same number of tokens from the same weights, over home links of 20 Mbit/s; the
time over 100 Mbit/s is measured too, and exact data-parallel training stands beside them. What is done is kept in
docs/quality/outcomes.jsonl, under the code and the spec that it is of, so a run that was stopped goes on where it was,
and a table of which some trials are missing is written from those that are done. Exit code 1 where the default misses
its bar.

Relies on: ``benchmarks.quality_runs`` for the trials, which come to the same wherever they run.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog

from benchmarks.experiments import as_markdown, replaced
from benchmarks.kept import KeptRow, KeptRows
from benchmarks.quality_picture import draw
from benchmarks.quality_runs import (
    Outcome,
    Trial,
    alone,
    base_spec,
    data_parallel,
    digest,
    started_at,
    swarm,
)
from training.data import Corpus
from training.default_run import default_run

PAGE = Path("docs/QUALITY.md")
KEPT = Path("docs/quality/outcomes.jsonl")
BASELINE = "data-parallel"
DEFAULT = "the default"
DILOCO = {"kind": "nesterov", "rate": 0.7, "momentum": 0.9, "wire": "fp32"}


@dataclass(frozen=True, slots=True)
class Method:
    """A row: a name, what it changes in the spec, and how it is trained."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    how: Literal["swarm", "data-parallel", "alone"] = "swarm"


@dataclass(frozen=True, slots=True)
class Table:
    """A comparison: who trains what for how long, and what the default has to come to in it."""

    name: str
    methods: tuple[Method, ...]
    nodes: int
    batch: int
    steps: int
    start_step: int = 0
    seeds: int = 2
    over_percent_max: float | None = None
    """Of the default, over data-parallel training, held-out loss against held-out loss."""
    fewer_times_min: float | None = None
    """By how many times fewer bytes it sends."""


def every(steps: int, **more: Any) -> dict[str, Any]:
    """A merge every so many steps."""
    return {"schedule": {"preset": "every"}, "exchange": {"every_steps": steps}} | more


def by_default() -> dict[str, Any]:
    """What ``gossamer train new`` writes of merges."""
    chosen = msgspec.to_builtins(default_run("chosen"))
    return {section: chosen[section] for section in ("schedule", "exchange", "outer")}


EXACT = Method(BASELINE, how="data-parallel")
CHOSEN = Method(DEFAULT, by_default())
FROM_SCRATCH = (
    EXACT,
    CHOSEN,
    Method("local only", how="alone"),
    Method("final-only", {"schedule": {"preset": "final-only"}}),
    Method("FedAvg, H = 50", every(50)),
    Method("DiLoCo, H = 50", every(50, outer=DILOCO)),
    Method(
        "Streaming DiLoCo, fp32",
        {
            "schedule": {"preset": "every"},
            "exchange": {"every_steps": 12, "fragments": 3},
            "outer": DILOCO | {"streaming": True},
        },
    ),
    Method(
        "Streaming DiLoCo, E3M0",
        {
            "schedule": {"preset": "every"},
            "exchange": {"every_steps": 12, "fragments": 3},
            "outer": DILOCO | {"streaming": True, "wire": "e3m0"},
        },
    ),
    Method("NoLoCo, H = 50", {"exchange": {"every_steps": 50}, "outer": {"kind": "pairs"}}),
    Method("SparseLoCo, H = 30", every(30, outer=DILOCO | {"rate": 1.0, "momentum": 0.0, "wire": "top64"})),
    Method("pull, mean", {"exchange": {"every_steps": 50, "rule": "mean"}}),
    Method("pull, variance-corrected", {"exchange": {"every_steps": 50}}),
    Method("late-heavy", {"schedule": {"preset": "late-heavy"}, "exchange": {"every_steps": 10}}),
    Method("int8, H = 20", every(20, outer=DILOCO | {"momentum": 0.8, "wire": "int8"})),
    Method("evenly, H = 13", every(13, outer=by_default()["outer"])),
    Method("early-dense without warm-up", by_default() | {"outer": by_default()["outer"] | {"warmup": 0.0}}),
)
TABLES = (
    Table("eight-nodes", FROM_SCRATCH, nodes=8, batch=4, steps=1000),
    Table(
        "four-nodes",
        (EXACT, CHOSEN),
        nodes=4,
        batch=8,
        steps=2000,
        over_percent_max=6.0,
        fewer_times_min=80.0,
    ),
    Table(
        "common-start",
        (EXACT, CHOSEN),
        nodes=4,
        batch=8,
        steps=2000,
        start_step=1000,
        over_percent_max=1.0,
        fewer_times_min=200.0,
    ),
)


class Done(KeptRow, frozen=True, kw_only=True):
    """A trial that is done."""

    table: str
    method: str
    seed: int
    outcome: Outcome


def measured(table: Table, method: Method, corpus: Corpus, *, seed: int, kept: KeptRows[Done]) -> Outcome:
    """One row for one seed."""
    spec = base_spec(table.steps, seed, {"train": {"batch": table.batch}} | method.changes)
    trial = Trial(spec=spec, nodes=table.nodes, start_step=table.start_step)

    if method.how == "data-parallel":
        # All of its steps are trained once, wherever the comparison begins.
        trial = msgspec.structs.replace(trial, start_step=0)
    key = digest(trial, method.how)
    if (done := kept.get(key)) is None:
        began_s = time.perf_counter()
        outcome = trained(trial, method, corpus, seed=seed)
        took_s = time.perf_counter() - began_s
        told = f"{table.name}: {method.name}, seed {seed}: {outcome.loss:.4f}, took {took_s:.0f} s"
        print(told, file=sys.stderr, flush=True)
        done = Done(key=key, table=table.name, method=method.name, seed=seed, outcome=outcome)
        kept.add(done)
    if method.how != "data-parallel":
        return done.outcome
    whole = done.outcome
    share = 1 - table.start_step / table.steps
    return msgspec.structs.replace(
        whole,
        bytes_per_node=whole.bytes_per_node * share,
        slow_s=whole.slow_s * share,
        fast_s=whole.fast_s * share,
        merges=round(whole.merges * share),
    )


def trained(trial: Trial, method: Method, corpus: Corpus, *, seed: int) -> Outcome:
    """What ``trial`` comes to."""
    match method.how:
        case "data-parallel":
            return data_parallel(trial, corpus)[0]
        case "alone":
            return alone(trial, corpus)
        case _:
            return swarm(trial, corpus, seed=seed, start=_start(trial, corpus))


def _start(trial: Trial, corpus: Corpus) -> bytes | None:
    """The state that all begin with; None where that is what the spec says anyway."""
    if not trial.start_step:
        return None
    _, model = data_parallel(trial, corpus, until=trial.start_step)
    return started_at(trial, corpus, model)


def rows(methods: Sequence[Method], outcomes: dict[str, list[Outcome]]) -> list[list[str]]:
    """A header and a row for each method, best loss first."""
    exact = statistics.fmean(outcome.loss for outcome in outcomes[BASELINE])
    exact_bytes = outcomes[BASELINE][0].bytes_per_node
    lines = []
    for method in methods:
        of = outcomes[method.name]
        loss = statistics.fmean(outcome.loss for outcome in of)
        spread = max(outcome.loss for outcome in of) - min(outcome.loss for outcome in of)
        sent = statistics.fmean(outcome.bytes_per_node for outcome in of)
        lines.append(
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
                    str(len(of)),
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
        "seeds",
    ]
    return [head, *(line for _, line in sorted(lines, key=lambda line: line[0]))]


def verdict(table: Table, outcomes: dict[str, list[Outcome]]) -> tuple[bool, str]:
    """Whether the default comes to what it has to, and a sentence that says so."""
    if table.over_percent_max is None or table.fewer_times_min is None or DEFAULT not in outcomes:
        return True, ""
    exact, chosen = outcomes[BASELINE], outcomes[DEFAULT]
    over = 100 * (statistics.fmean(o.loss for o in chosen) / statistics.fmean(o.loss for o in exact) - 1)
    fewer = exact[0].bytes_per_node / statistics.fmean(o.bytes_per_node for o in chosen)
    met = over <= table.over_percent_max and fewer >= table.fewer_times_min
    return met, (
        f"**{'Shown' if met else 'Not shown'}:** {DEFAULT} ends {over:+.1f} % over data-parallel training, at most "
        f"{table.over_percent_max:g} allowed, at {fewer:.0f} times fewer bytes, at least {table.fewer_times_min:g}."
    )


def main() -> int:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="*", default=[], metavar="NAME", help="instead of all")
    parser.add_argument("--methods", nargs="*", default=[], metavar="NAME", help="instead of all")
    parser.add_argument("--seeds", type=int, help="instead of each table's own")
    parser.add_argument("--steps", type=int, help="instead of each table's own")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--kept", type=Path, default=KEPT)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    corpus, kept, met = cache(lambda: Corpus.load("stdlib", None)), KeptRows(arguments.kept, Done), True
    for table in TABLES:
        if arguments.tables and table.name not in arguments.tables:
            continue
        own = replace(table, seeds=arguments.seeds or table.seeds, steps=arguments.steps or table.steps)
        wanted = [m for m in own.methods if not arguments.methods or m.name in (*arguments.methods, BASELINE)]
        # Seed by seed, so that every method has one before any has two.
        outcomes: dict[str, list[Outcome]] = {method.name: [] for method in wanted}
        for seed in range(1, own.seeds + 1):
            for method in wanted:
                outcomes[method.name].append(measured(own, method, corpus(), seed=seed, kept=kept))
        passed, sentence = verdict(own, outcomes)
        met = met and passed
        shown = as_markdown(rows(wanted, outcomes))
        print(f"{shown}\n\n{sentence}\n", flush=True)
        picture = arguments.page.parent / "quality" / f"{own.name}.png"
        draw(outcomes, picture, baseline=BASELINE, default=DEFAULT)
        part = f"{sentence}\n\n" * bool(sentence)
        part += f"{own.nodes} nodes, {own.steps - own.start_step:,} steps"
        part += f" from where data-parallel training has come after {own.start_step:,}" * bool(own.start_step)
        part += f", {own.batch * 128:,} bytes of text a node and step.\n\n{shown}\n\n"
        part += f"![{own.name}](quality/{own.name}.png)"
        page = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(replaced(page, own.name, part, by="make quality"), encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
