"""What people see of a simulation: how far it is, how it ended, what happened when, and the list of scenarios.

Owns drawing only, on a terminal and as plain lines anywhere else. Figures come from ``netsim.results``; nothing is
judged here.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import msgspec
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cli.common import Common
from cli.views import duration
from netsim.campaign import Job
from netsim.experiments import Verdict
from netsim.results import METRICS, Event, Sample, SeedResult, encode_line
from netsim.scenario import ExpectSpec, Scenario
from node.config import format_bytes

LINES_EVERY_S = 5.0
FAILURES_SHOWN = 5
"""Of one seed; the results file has them all."""
VARIANT_FIGURES = {
    "final_loss": "loss",
    "loss_spread": "spread of it",
    "local_accuracy": "accuracy",
    "merged_accuracy": "if averaged",
    "dispersion": "dispersion",
    "commit_share": "merges",
    "mixes_per_node": "mixes",
    "bytes_per_node": "bytes/node",
}
"""What is shown of each variant, and as which column."""


# --- while it runs ------------------------------------------------------------------------------------------------


class ProgressView(Protocol):
    """Shows how a campaign gets on; a context manager around the time it may draw. Is a ``netsim.campaign.View``."""

    def __enter__(self) -> ProgressView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def progress(self, job: Job, virtual_s: float) -> None:
        """``job`` has come so far."""

    def finished(self, result: SeedResult) -> None:
        """A seed has ended."""


def progress_view(console: Console, name: str, jobs: Sequence[Job]) -> ProgressView:
    """A bar when ``console`` is a terminal, else plain lines."""
    return (BarView if console.is_terminal else LinesView)(console, name, jobs)


class _Count:
    """How far all jobs together are."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.seeds = len(jobs)
        self.total_s = sum(job.scenario.duration_s for job in jobs)
        self.ended = 0
        self.failed = 0
        self._lengths = {(job.variant, job.seed): job.scenario.duration_s for job in jobs}
        self._under_way: dict[tuple[str, int], float] = {}
        self._ended_s = 0.0

    @property
    def virtual_s(self) -> float:
        """Virtual time simulated; what failed early counts in full."""
        return self._ended_s + sum(self._under_way.values())

    @property
    def text(self) -> str:
        """In a few words."""
        words = (
            f"{self.ended} of {self.seeds} seeds"
            if self.seeds > 1
            else f"{duration(self.virtual_s)} simulated"
        )
        return words + (f", {self.failed} failed" if self.failed else "")

    def progress(self, job: Job, virtual_s: float) -> None:
        self._under_way[job.variant, job.seed] = virtual_s

    def finished(self, result: SeedResult) -> None:
        key = (result.variant, result.seed)
        self._under_way.pop(key, None)
        self._ended_s += self._lengths[key]
        self.ended += 1
        self.failed += result.verdict == "failed"


class BarView:
    """One bar over the virtual time of all seeds; failures stay above it."""

    def __init__(self, console: Console, name: str, jobs: Sequence[Job]) -> None:
        self._count = _Count(jobs)
        self._bar = Progress(
            TextColumn("[bold]{task.description}[/]"),
            BarColumn(bar_width=40),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(name, total=self._count.total_s, text=self._count.text)

    def __enter__(self) -> BarView:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def progress(self, job: Job, virtual_s: float) -> None:
        """Move the bar."""
        self._count.progress(job, virtual_s)
        self._show()

    def finished(self, result: SeedResult) -> None:
        """Count it; say so at once if it failed."""
        self._count.finished(result)
        if result.verdict == "failed":
            self._bar.console.print(_failed_line(result), style="red", markup=False, soft_wrap=True)
        self._show()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._count.virtual_s, text=self._count.text)


class LinesView:
    """A line about every five seconds, and one for each seed that failed."""

    def __init__(self, console: Console, name: str, jobs: Sequence[Job]) -> None:
        self._console = console
        self._name = name
        self._count = _Count(jobs)
        self._began_s = time.perf_counter()
        self._due_s = LINES_EVERY_S

    def __enter__(self) -> LinesView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def progress(self, job: Job, virtual_s: float) -> None:
        """Print the line if it is due."""
        self._count.progress(job, virtual_s)
        self._show()

    def finished(self, result: SeedResult) -> None:
        """Count it; say so at once if it failed."""
        self._count.finished(result)
        if result.verdict == "failed":
            self._say(_failed_line(result))
        self._show()

    def _show(self) -> None:
        elapsed_s = time.perf_counter() - self._began_s
        if elapsed_s >= self._due_s:
            self._due_s = elapsed_s + LINES_EVERY_S
            share = self._count.virtual_s / self._count.total_s
            self._say(f"{duration(elapsed_s):>6}  {self._name}  {share:4.0%}  {self._count.text}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def _failed_line(result: SeedResult) -> str:
    first = result.failures[0]
    return f"{_seed(result)} failed at {first.at_s:.1f} s: {first.checker}: {first.what}"


# --- how it ended -------------------------------------------------------------------------------------------------


def figures_view(scenario: Scenario, results: Sequence[SeedResult]) -> RenderableType:
    """The main figures: one row for each figure, or for each variant of an experiment."""
    if scenario.experiment is not None:
        return _variants_table(results)
    return _figures_table(scenario.expect, results)


def seeds_view(results: Sequence[SeedResult], replay_command: Callable[[SeedResult], str]) -> RenderableType:
    """How many seeds passed, and all there is to know about those that did not."""
    failed = [result for result in results if result.verdict == "failed"]
    parts = [Text()]
    for result in failed:
        parts += [failures_text(result), Text(f"  replay   {replay_command(result)}\n")]
    passed = len(results) - len(failed)
    words = "1 seed" if len(results) == 1 else f"{passed} of {len(results)} seeds"
    took = f"in {duration(sum(result.wall_s for result in results))} of one core"
    if failed:
        parts.append(Text(f"{len(failed)} of {len(results)} seeds FAILED, {took}", style="bold red"))
    else:
        parts.append(Text(f"{words} passed, {took}", style="green"))
    return Group(*parts)


def failures_text(result: SeedResult, *, until_s: float | None = None) -> Text:
    """One seed: that it passed, or what was found, when, and what the seed had drawn; ``until_s``: it was cut short."""
    if result.verdict == "passed":
        ended = "passed" if until_s is None else f"has nothing wrong up to {result.virtual_s:g} s"
        return Text(f"{_seed(result)} {ended}   trace {result.trace[:16]}", style="green")
    text = Text(f"{_seed(result)} FAILED\n", style="bold red")
    text.append(f"  drawn    {_drawn(result.drawn)}", style="not bold default")
    for failure in result.failures[:FAILURES_SHOWN]:
        machine = "" if failure.machine is None else f", machine {failure.machine}"
        text.append(f"\n  {failure.checker} at {failure.at_s:.1f} s{machine}: ", style="not bold yellow")
        text.append(failure.what, style="not bold default")
    if (more := len(result.failures) - FAILURES_SHOWN) > 0:
        text.append(f"\n  and {more} more", style="not bold default")
    return text


def verdict_view(verdict: Verdict) -> RenderableType:
    """The table that a criterion rests on, and what it found."""
    table = _table(*verdict.table[0], right=verdict.table[0][1:]) if verdict.table else Table(box=None)
    for row in verdict.table[1:]:
        table.add_row(*map(Text, row))
    mark = ("REPRODUCED  ", "green") if verdict.passed else ("NOT REPRODUCED  ", "bold red")
    return Group(Text(), table, Text(), Text.assemble(mark, verdict.sentence))


def scenarios_table(scenarios: Sequence[Scenario]) -> Table:
    """One row each."""
    table = _table("scenario", "nodes", "time", "what it shows", right=("nodes", "time"))
    for scenario in scenarios:
        table.add_row(scenario.name, str(scenario.nodes), duration(scenario.duration_s), Text(scenario.about))
    return table


def _figures_table(expect: Sequence[ExpectSpec], results: Sequence[SeedResult]) -> Table:
    several = len(results) > 1
    columns = ["", "median", "lowest", "highest"] if several else ["", "value"]
    table = _table(*columns, "must be", right=columns[1:])
    table.add_column(no_wrap=True, overflow="ellipsis")  # words, which a narrow terminal cuts short
    bounds = {expected.metric: expected for expected in expect}
    for name in _names(results):
        values = _values(results, name)
        shown = [statistics.median(values), min(values), max(values)] if several else values
        table.add_row(
            name,
            *(_figure(name, value) for value in shown),
            _bound(name, bounds.get(name)),
            METRICS.get(name, ""),
        )
    return table


def _variants_table(results: Sequence[SeedResult]) -> Table:
    names = [name for name in VARIANT_FIGURES if _values(results, name)]
    columns = [VARIANT_FIGURES[name] for name in names]
    table = _table("variant", "passed", *columns, right=("passed", *columns))
    for variant in dict.fromkeys(result.variant for result in results):
        own = [result for result in results if result.variant == variant]
        passed = sum(result.verdict == "passed" for result in own)
        table.add_row(
            variant, f"{passed} of {len(own)}", *(_spread(name, _values(own, name)) for name in names)
        )
    return table


def _names(results: Sequence[SeedResult]) -> list[str]:
    """The figures that some seed has, the known ones first, in their order."""
    found = dict.fromkeys(name for result in results for name in result.summary)
    return [
        name
        for name in (*METRICS, *(name for name in found if name not in METRICS))
        if _values(results, name)
    ]


def _values(results: Sequence[SeedResult], name: str) -> list[float]:
    values = (result.summary.get(name, math.nan) for result in results)
    return [value for value in values if math.isfinite(value)]


def _figure(name: str, value: float) -> str:
    if name.startswith("bytes"):
        return format_bytes(int(value))
    if name.endswith("share"):
        return f"{value:.1%}"
    if name == "speedup":
        return f"{value:,.0f}x"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _spread(name: str, values: Sequence[float]) -> str:
    """The median, and how far the seeds lie from it."""
    if not values:
        return "-"
    middle = statistics.median(values)
    far = max(abs(value - middle) for value in values)
    return _figure(name, middle) + (f" ±{_figure(name, float(f'{far:.2g}'))}" if len(values) > 1 else "")


def _bound(name: str, expected: ExpectSpec | None) -> str:
    if expected is None:
        return ""
    low = f"≥ {_figure(name, expected.at_least)}" if expected.at_least is not None else ""
    high = f"≤ {_figure(name, expected.at_most)}" if expected.at_most is not None else ""
    return " and ".join(filter(None, (low, high)))


def _drawn(drawn: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in drawn.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "(" + (", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) or "none") + ")"
    if isinstance(value, list):
        return machines_text(value) if all(isinstance(item, int) for item in value) else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seed(result: SeedResult) -> str:
    return f"seed {result.seed}" + (f" of {result.variant}" if result.variant else "")


def _table(*titles: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", no_wrap=title in right)
    return table


# --- what happened ------------------------------------------------------------------------------------------------


class Timeline:
    """Prints events as they come, as lines or as JSON, and keeps the last sample."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self.last_sample: Sample | None = None

    def add(self, line: Sample | Event | SeedResult) -> None:
        """Take what the simulation wrote."""
        if isinstance(line, Sample):
            self.last_sample = line
        if self._common.json:
            self._common.print(msgspec.Raw(encode_line(line).strip()), "")
        elif isinstance(line, Event):
            self._common.out().print(event_text(line), soft_wrap=True)


def event_text(event: Event) -> Text:
    """One event in one line."""
    style = _EVENT_STYLES.get(event.what, "yellow")
    text = Text(f"{event.at_s:10.2f} s  ")
    text.append(f"{event.what:<10}", style=style)
    text.append(f"  {machines_text(event.machines)}" if event.machines else "")
    text.append(f"  {event.detail}" if event.detail else "", style="dim")
    text.append(f"  until {event.until_s:.0f} s" if event.until_s is not None else "", style="dim")
    return text


def state_view(sample: Sample | None) -> RenderableType:
    """All machines as they were at the last sample."""
    if sample is None:
        return Text("nothing was sampled yet")
    table = _table(
        "machine", "step", "loss", "sees", "merges", "sent", right=("step", "loss", "sees", "merges", "sent")
    )
    for machine, step in enumerate(sample.step):
        sent = format_bytes(sample.bytes_sent[machine])
        if step is None:
            table.add_row(str(machine), "off", "", "", "", sent, style="dim")
            continue
        loss, seen, height = sample.loss[machine], sample.seen[machine], sample.height[machine]
        cells = ["-" if loss is None else f"{loss:.4g}", str(seen), str(height)]
        table.add_row(str(machine), f"{step:,}", *cells, sent)
    far = "" if sample.dispersion is None else f", dispersion {sample.dispersion:.3g}"
    head = f"\nat {sample.at_s:.1f} s: {sample.up} of {len(sample.step)} machines up{far}"
    return Group(Text(head, style="bold"), table, Text())


def machines_text(machines: Sequence[int]) -> str:
    """``0-6, 9``."""
    runs: list[list[int]] = []
    for machine in sorted(machines):
        if runs and machine == runs[-1][-1] + 1:
            runs[-1].append(machine)
        else:
            runs.append([machine])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


_EVENT_STYLES = {"commit": "green", "start": "cyan", "stop": "dim", "phase": "bold", "heal": "cyan"}
