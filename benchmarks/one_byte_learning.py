"""Is a byte as good as a float? Fine-tuning a language model from one byte per probe, against MeZO in fp32.

    python -m benchmarks.one_byte_learning [--small] [--dir FOLDER]

A model that a gossip swarm trained on source code is tuned to another text, by one-byte mode and by MeZO with normal
directions (``benchmarks.one_byte_runs``), each at the best of four step sizes; then by four nodes in one-byte mode.
``benchmarks.one_byte_outcome`` has the two criteria; the exit code is 1 when one is missed. ``--small`` takes less than
a minute and shows that all of this works; its figures say nothing.

Owns the plan, and the rows that are kept, so that a run which was interrupted goes on where it stopped. Never judges.

Relies on: a row's key changes with everything that its figures depend on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
from blake3 import blake3
from torch import Tensor

from benchmarks.experiments import PAGE, PICTURES, as_markdown, replaced
from benchmarks.kept import KeptRow, KeptRows, code_digest
from benchmarks.one_byte_outcome import Outcome, draw
from benchmarks.one_byte_runs import (
    Course,
    Method,
    Setting,
    Trial,
    character_names,
    gossip_base,
    run_trial,
)
from training.export import read_safetensors
from training.run_spec import RunSpec, canonical_bytes
from training.spec_sections import GptSpec, OneByteSpec, StdlibDataSpec, TextDataSpec, TrainSpec

NAME = "one-byte-learning"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained and compared; as it is, the full comparison. A step size is what one record is multiplied by."""

    layers: int = 3
    width: int = 96
    heads: int = 4
    context: int = 128
    base_steps: int = 600
    """Of each node of the gossip swarm."""
    batch: int = 8
    held_out_bytes: int = 32 << 10
    step_sizes: tuple[float, ...] = (2e-4, 4e-4, 8e-4, 1.6e-3)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    nodes: int = 4
    steps: int = 600
    """Of one node, each of them a record."""
    swarm_steps: int = 180
    """Of each of ``nodes``: with more of them than three tenths of one node's, the swarm is too slow anyway."""
    every: int = 60
    """Records, of all nodes together, between evaluations."""

    @property
    def model(self) -> GptSpec:
        """Of both runs."""
        return GptSpec(layers=self.layers, width=self.width, heads=self.heads, context=self.context)

    @property
    def base(self) -> RunSpec:
        """Of the gossip run: different initial weights, disjoint data, one merge at the end."""
        return RunSpec(
            name=f"{NAME}-base",
            seed=1,
            model=self.model,
            data=StdlibDataSpec(held_out_bytes=self.held_out_bytes),
            train=TrainSpec(steps=self.base_steps, batch=self.batch),
        )

    @property
    def tuned(self) -> RunSpec:
        """Of the fine-tuning: what the product does unless it is told otherwise."""
        return RunSpec(
            name=NAME,
            init="shared",
            model=self.model,
            data=TextDataSpec(held_out_bytes=self.held_out_bytes),
            train=TrainSpec(steps=self.steps, batch=self.batch),
            one_byte=OneByteSpec(),
        )

    def trials(self) -> Iterator[Trial]:
        """All of them, seed by seed."""
        arms: list[tuple[Method, int]] = [("bytes", 1), ("floats", 1), ("bytes", self.nodes)]
        for seed in self.seeds:
            for step_size in self.step_sizes:
                for method, nodes in arms:
                    yield Trial(
                        method=method,
                        nodes=nodes,
                        step_size=step_size,
                        seed=seed,
                        steps=self.steps if nodes == 1 else self.swarm_steps,
                        every=self.every // nodes,
                    )


SMALL = Plan(
    layers=2,
    width=32,
    heads=2,
    context=32,
    base_steps=60,
    held_out_bytes=4 << 10,
    step_sizes=(1e-3, 2e-3),
    seeds=(1, 2),
    steps=96,
    swarm_steps=28,
    every=16,
)


class Row(KeptRow, frozen=True, kw_only=True):
    """One line of the results."""

    trial: Trial
    course: Course
    seconds: float
    """Of processor time."""


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(plan: Plan, folder: Path) -> list[Row]:
    """A row for each trial of ``plan``: those kept in ``folder``, and the others run now."""
    kept = KeptRows(folder / "rows.jsonl", Row)
    setting = Setting(plan.tuned, base_of(plan, folder), character_names())
    rows = []
    for trial in plan.trials():
        key = setting.key(trial)
        if (row := kept.get(key)) is None:
            began_s = time.process_time()
            course = run_trial(setting, trial)
            row = Row(key=key, trial=trial, course=course, seconds=time.process_time() - began_s)
            kept.add(row)
            print(
                f"seed {trial.seed}, {trial.method:<6} on {trial.nodes}, step size {trial.step_size:g}:"
                f" {course.losses[0]:.4f} -> {course.losses[-1]:.4f} in {row.seconds:.0f} s",
                flush=True,
            )
        rows.append(row)
    return rows


def base_of(plan: Plan, folder: Path) -> Mapping[str, Tensor]:
    """The base of ``plan``, trained unless ``folder`` has it."""
    key = (
        blake3(canonical_bytes(plan.base))
        .update(code_digest("benchmarks.one_byte_runs"))
        .hexdigest(length=16)
    )
    file = folder / f"base-{key}.safetensors"
    if not file.exists():
        print(f"training the base: {plan.nodes} nodes, {plan.base_steps} steps each", flush=True)
        whole = file.with_suffix(".new")
        whole.write_bytes(gossip_base(plan.base, machines=plan.nodes))
        whole.replace(file)
    return read_safetensors(file.read_bytes())[0]


def main() -> int:
    """Measure what is not kept yet, and show everything; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="One-byte mode against MeZO in fp32, and four nodes against one."
    )
    parser.add_argument("--small", action="store_true", help="a minute, to see that it works; writes no page")
    parser.add_argument("--dir", type=Path, default=Path(NAME), help="where the base and the rows are kept")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    outcome = Outcome.of(
        (row.trial, row.course) for row in measure(SMALL if options.small else Plan(), options.dir)
    )
    draw(outcome, (options.dir if options.small else PICTURES) / f"{NAME}.png")
    table = as_markdown(outcome.table())
    print(table, *outcome.sentences(), sep="\n")
    if not options.small:
        part = "\n\n".join([*outcome.sentences(), table, f"![{NAME}](experiments/{NAME}.png)"])
        PAGE.write_text(
            replaced(PAGE.read_text(encoding="utf-8"), NAME, part, by=f"make {NAME}"), encoding="utf-8"
        )
    return 0 if outcome.as_good and outcome.as_fast else 1


if __name__ == "__main__":
    sys.exit(main())
