"""One figure from a results file: loss, dispersion, bytes and membership over virtual time, and the faults below them.

Owns the drawing and what is drawn together: the variants of an experiment, or a few seeds, each in a colour of its own;
many seeds as one. Reads line by line and keeps no more than it draws. Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from netsim.registry import parse_scenario
from netsim.results import Event, ResultsError, Sample, SeedResult, read_header, read_lines
from netsim.scenario import Scenario
from p2p.errors import GossamerError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which people tell apart whatever their eyes do."""
STYLES = ("-", "--", ":")
SEEDS_APART_MAX = 5
"""More seeds than these are drawn as one."""
BANDS_MAX = 7
"""More groups than these are drawn without bands, which would hide each other."""
INCHES, DPI = (32 / 3, 8.0), 150
"""1600 x 1200 pixels."""
SUFFIXES = (".png", ".svg", ".pdf")
DOWN = ("kill", "power-cut", "leave")
"""Kinds that take a machine down until it is started again."""
MOMENTS = ("break", "bit-flip", "join", "crash")
"""Kinds that are over at once."""
COMMIT = "commit"
QUIET = ("start", "stop", "heal", "phase", COMMIT)
"""Events that are no faults."""

Group: TypeAlias = str
"""What has one colour: a variant, a seed, or everything."""
Bars: TypeAlias = dict[str, list[tuple[float, float]]]
"""Kind of fault -> from when to when, in seconds."""


def plot_results(results: Path, out: Path) -> None:
    """Draw ``results`` into ``out``, a .png, .svg or .pdf file. Raises ResultsError, GossamerError."""
    if out.suffix not in SUFFIXES:
        raise GossamerError(
            f"cannot draw into {out}",
            why=f"the kind of picture follows from the name, which must end in {', '.join(SUFFIXES)}",
            fix=f"--out {out.with_suffix('.png')}",
        )
    scenario = parse_scenario(read_header(results).scenario, origin=f"in {results}")
    story = _read(results, scenario)
    figure = _figure(story, scenario)
    try:
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": scenario.name}):
            figure.savefig(out, dpi=DPI, metadata={"Date": None} if out.suffix == ".svg" else None)
    except OSError as error:
        raise GossamerError(
            f"cannot write {out}: {error.strerror}",
            why="the picture has to go somewhere",
            fix="name a file in a folder that exists: --out FILE.png",
        ) from error


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Moment:
    """All samples of one group at one time."""

    losses: list[float] = field(default_factory=list)
    """Of every node of every seed."""
    accuracies: list[float] = field(default_factory=list)
    """Likewise; none unless there are labelled examples."""
    merged_losses: list[float] = field(default_factory=list)
    """Of the plain average of all nodes, of each seed."""
    merged_accuracies: list[float] = field(default_factory=list)
    """Likewise."""
    dispersions: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """Bytes per second and node that is up, of each seed."""
    up: list[int] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Story:
    """What is drawn."""

    moments: dict[Group, dict[float, _Moment]]
    events: list[Event]
    """Of the first seed only."""
    first: str
    """Which one that is, in words."""
    verdicts: dict[str, int]
    ends_s: float


def _read(results: Path, scenario: Scenario) -> _Story:
    grouped = _grouping(results)
    moments: dict[Group, dict[float, _Moment]] = defaultdict(lambda: defaultdict(_Moment))
    before: dict[tuple[str, int], Sample] = {}
    verdicts = {"passed": 0, "failed": 0}
    events: list[Event] = []
    first: tuple[str, int] | None = None
    for line in read_lines(results):
        key = (line.variant, line.seed)
        first = first or key
        match line:
            case SeedResult():
                verdicts[line.verdict] += 1
            case Event() if key == first:
                events.append(line)
            case Sample():
                at_s = round(line.at_s / scenario.sample_every_s) * scenario.sample_every_s
                _gather(moments[grouped[key]][at_s], line, before.get(key))
                before[key] = line
    if not moments:
        raise ResultsError(
            f"there is nothing to draw in {results}",
            why="it holds no sample: no seed came so far",
            fix="gossamer sim run, with a --duration of some samples",
        )
    assert first is not None
    return _Story(
        moments={group: dict(sorted(moments[group].items())) for group in dict.fromkeys(grouped.values())},
        events=events,
        first=f"seed {first[1]}" + (f" of {first[0]}" if first[0] else ""),
        verdicts=verdicts,
        ends_s=max(scenario.sample_every_s, *(at_s for times in moments.values() for at_s in times)),
    )


def _grouping(results: Path) -> dict[tuple[str, int], Group]:
    """Which group each seed of each variant belongs to, in the order of the file."""
    keys = dict.fromkeys(
        (line.variant, line.seed) for line in read_lines(results) if isinstance(line, Sample)
    )
    if any(variant for variant, _ in keys):
        return {(variant, seed): variant for variant, seed in keys}
    if len(keys) <= SEEDS_APART_MAX:
        return {(variant, seed): f"seed {seed}" for variant, seed in keys}
    return dict.fromkeys(keys, f"{len(keys)} seeds")


def _gather(moment: _Moment, sample: Sample, before: Sample | None) -> None:
    moment.losses += [loss for loss in sample.loss if loss is not None]
    moment.accuracies += [accuracy for accuracy in sample.accuracy if accuracy is not None]
    if sample.merged_loss is not None:
        moment.merged_losses.append(sample.merged_loss)
    if sample.merged_accuracy is not None:
        moment.merged_accuracies.append(sample.merged_accuracy)
    if sample.dispersion is not None and sample.up > 1:
        moment.dispersions.append(sample.dispersion)
    moment.up.append(sample.up)
    moment.seen += [seen for seen in sample.seen if seen is not None]
    if before is not None and sample.at_s > before.at_s:
        sent = sum(sample.bytes_sent) - sum(before.bytes_sent)
        node_s = (sample.at_s - before.at_s) * max(1, sample.up + before.up) / 2
        moment.rates.append(sent / node_s)


# --- drawing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Look:
    """How one group is drawn."""

    group: Group
    colour: str
    style: str
    banded: bool


def _figure(story: _Story, scenario: Scenario) -> Figure:
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    bars, marks = _faults(story)
    kinds = sorted([*bars, *(kind for kind in marks if kind not in bars)], key=lambda kind: kind != COMMIT)
    labelled = any(moment.accuracies for moments in story.moments.values() for moment in moments.values())
    heights = {"loss": 3.0} | ({"accuracy": 2.2} if labelled else {})
    heights |= {"dispersion": 1.6, "rate": 1.6, "members": 1.6, "faults": 0.35 + 0.24 * max(1, len(kinds))}
    panels = dict(
        zip(
            heights,
            figure.subplots(len(heights), 1, sharex=True, height_ratios=list(heights.values())),
            strict=True,
        )
    )
    for number, (group, moments) in enumerate(story.moments.items()):
        look = _Look(
            group=group,
            colour=COLOURS[number % len(COLOURS)],
            style=STYLES[number // len(COLOURS) % len(STYLES)],
            banded=len(story.moments) <= BANDS_MAX,
        )
        _draw_spread(panels["loss"], moments, "losses", look)
        _draw_merged(panels["loss"], moments, "merged_losses", look)
        _draw_spread(panels["dispersion"], moments, "dispersions", look)
        _draw_spread(panels["rate"], moments, "rates", look)
        _draw_members(panels["members"], moments, look)
        if labelled:
            _draw_spread(panels["accuracy"], moments, "accuracies", look)
            _draw_merged(panels["accuracy"], moments, "merged_accuracies", look)
    for name, (label, what) in _PANELS.items():
        if name in panels:
            _label(panels[name], label, what)
    for name in ("loss", "dispersion"):
        _scale(panels[name])
    panels["rate"].set_ylim(bottom=0)
    _bytes_axis(panels["rate"])
    panels["members"].set_ylim(bottom=0)
    panels["members"].yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    _draw_faults(panels["faults"], kinds, bars, marks)
    panels["faults"].set_title(f"what happened in {story.first}", loc="left", fontsize=8, color="#555555")
    _draw_phases(panels.values(), story)
    _time_axis(panels["faults"], story.ends_s)
    if len(story.moments) > 1:
        handles = panels["loss"].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", fontsize=8, frameon=False)
    figure.align_ylabels(list(panels.values()))
    figure.suptitle(_title(story, scenario), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


_SPREAD = "median of the nodes; band: 10 % to 90 % of them; thin: of the average of their weights"

_PANELS = {
    "loss": ("loss", _SPREAD),
    "accuracy": ("accuracy", _SPREAD),
    "dispersion": ("dispersion", "how far the nodes' weights are from their mean, relative"),
    "rate": ("sent per node", "bytes per second, mean over the nodes that are up"),
    "members": ("machines", "line: up; dashed: believed alive, median; dotted: by the node that sees fewest"),
}
"""What stands at the side of a panel, and above it."""


def _draw_spread(axes: Axes, moments: dict[float, _Moment], name: str, look: _Look) -> None:
    """The median over time, and the band within which 80 % lie."""
    times = list(moments)
    values = [getattr(moment, name) for moment in moments.values()]
    if not any(values):
        return
    low, middle, high = np.array([np.percentile(some or [math.nan], (10, 50, 90)) for some in values]).T
    axes.plot(times, middle, label=look.group, linewidth=1.4, color=look.colour, linestyle=look.style)
    if look.banded:
        axes.fill_between(times, low, high, color=look.colour, alpha=0.18, linewidth=0)


def _draw_merged(axes: Axes, moments: dict[float, _Moment], name: str, look: _Look) -> None:
    """What averaging at that moment would come to; nothing where nobody measured it."""
    if not any(values := [getattr(moment, name) for moment in moments.values()]):
        return
    merged = [statistics.median(some or [math.nan]) for some in values]
    axes.plot(list(moments), merged, color=look.colour, linestyle=look.style, linewidth=0.7)


def _draw_members(axes: Axes, moments: dict[float, _Moment], look: _Look) -> None:
    colour = look.colour
    times = list(moments)
    axes.plot(
        times, [statistics.fmean(moment.up) for moment in moments.values()], color=colour, linewidth=1.6
    )
    seen = [moment.seen or [math.nan] for moment in moments.values()]
    axes.plot(times, [statistics.median(some) for some in seen], color=colour, linestyle="--", linewidth=1.0)
    axes.plot(times, [min(some) for some in seen], color=colour, linestyle=":", linewidth=1.0)


def _draw_faults(axes: Axes, kinds: Sequence[str], bars: Bars, marks: dict[str, list[float]]) -> None:
    """A row for each kind: bars for what lasts, marks for what does not."""
    for row, kind in enumerate(kinds):
        colour = "#009E73" if kind == COMMIT else "#D55E00"
        spans = [(begins_s, ends_s - begins_s) for begins_s, ends_s in bars.get(kind, ())]
        axes.broken_barh(spans, (row - 0.35, 0.7), facecolors=colour, alpha=0.45, linewidth=0.8)
        axes.plot(
            marks.get(kind, []),
            [row] * len(marks.get(kind, [])),
            "|",
            color=colour,
            markersize=7,
            markeredgewidth=1.2,
        )
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_ylim(max(1, len(kinds)) - 0.4, -0.6)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_phases(panels: Iterable[Axes], story: _Story) -> None:
    """The liveness phase as a shade over all panels."""
    for event in story.events:
        if event.what == "phase":
            for number, axes in enumerate(panels):
                axes.axvspan(event.at_s, story.ends_s, color="#000000", alpha=0.06, linewidth=0)
                if not number:
                    axes.text(
                        event.at_s, 0.99, " no more faults", transform=axes.get_xaxis_transform(),
                        fontsize=8, color="#555555", va="top",
                    )  # fmt: skip


def _faults(story: _Story) -> tuple[Bars, dict[str, list[float]]]:
    """What lasted, and what was over at once; merges are among the latter, above everything."""
    marks: dict[str, list[float]] = defaultdict(list)
    bars: Bars = defaultdict(list)
    for event in story.events:
        if event.what == COMMIT:
            marks[COMMIT].append(event.at_s)
    for event in story.events:
        if event.what in QUIET:
            continue
        if event.what in MOMENTS:
            marks[event.what].append(event.at_s)
        elif event.what in DOWN and event.until_s is None:
            for machine in event.machines:
                if (back_s := _back_s(story, machine, event.at_s)) is None:
                    marks[event.what].append(event.at_s)
                else:
                    bars[event.what].append((event.at_s, back_s))
        else:
            bars[event.what].append((event.at_s, story.ends_s if event.until_s is None else event.until_s))
    return bars, marks


def _back_s(story: _Story, machine: int, down_s: float) -> float | None:
    """When a machine that went down was started again; None if it never was."""
    starts = (event for event in story.events if event.what == "start" and machine in event.machines)
    return next((event.at_s for event in starts if event.at_s > down_s), None)


def _label(axes: Axes, name: str, what: str) -> None:
    axes.set_ylabel(name, fontsize=9)
    axes.set_title(what, loc="left", fontsize=8, color="#555555")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _scale(axes: Axes) -> None:
    """Logarithmic where what is drawn spans more than a decade."""
    values: list[NDArray[np.float64]] = [
        np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()
    ]
    drawn = np.concatenate(values) if values else np.array([1.0])
    positive = drawn[drawn > 0]
    if len(positive) and positive.max() > 10 * positive.min():
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(positive.min() / 1.5, positive.max() * 1.5)
    else:
        axes.set_ylim(bottom=0)


def _time_axis(axes: Axes, ends_s: float) -> None:
    unit, seconds = (
        ("hours", 3600.0) if ends_s > 3 * 3600 else ("minutes", 60.0) if ends_s > 300 else ("seconds", 1.0)
    )
    axes.set_xlim(0, ends_s)
    steps = MaxNLocator(nbins=12, steps=[1, 2, 2.5, 5, 6, 10])
    axes.set_xticks(
        [tick * seconds for tick in steps.tick_values(0, ends_s / seconds) if tick * seconds <= ends_s]
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at_s, _: f"{at_s / seconds:g}"))
    axes.set_xlabel(f"virtual time, {unit}", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)


def _bytes_axis(axes: Axes) -> None:
    """Round numbers of the unit that fits."""
    top = axes.get_ylim()[1]
    unit, size = next(((unit, size) for unit, size in _UNITS if top >= 2 * size), _UNITS[-1])
    ticks = MaxNLocator(nbins=4).tick_values(0, top / size)
    axes.set_yticks([tick * size for tick in ticks if tick * size <= top])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:g} {unit}"))


_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))


def _title(story: _Story, scenario: Scenario) -> str:
    ended = {verdict: count for verdict, count in story.verdicts.items() if count}
    match sum(ended.values()):
        case 0:
            seeds = "no seed has ended"
        case 1:
            seeds = f"1 seed {next(iter(ended))}"
        case total:
            seeds = f"{total} seeds: {', '.join(f'{count} {verdict}' for verdict, count in ended.items())}"
    return f"{scenario.name}   {scenario.nodes} nodes   {seeds}"
