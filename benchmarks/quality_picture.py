"""The picture of a table of ``benchmarks.quality``: what each method learns, for the bytes and the time that it takes.

Owns the drawing. Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.quality_runs import Outcome
from netsim.plots import COLOURS, DPI

INCHES = (32 / 3, 4.6)


def draw(outcomes: Mapping[str, Sequence[Outcome]], out: Path, *, baseline: str, default: str) -> None:
    """Losses over megabytes sent, and over seconds on lines of 20 Mbit/s; bars from the best seed to the worst."""
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    sent, took = figure.subplots(1, 2, sharey=True)
    exact = statistics.fmean(outcome.loss for outcome in outcomes[baseline])
    sent.set_xlabel("MB sent per node, everything included", fontsize=9)
    took.set_xlabel("seconds over home links of 20 Mbit/s", fontsize=9)
    for axes in (sent, took):
        axes.axhline(exact, color="#777777", linewidth=0.9, linestyle="--")
        axes.set_xscale("log")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    sent.set_ylabel("held-out loss, nats per byte", fontsize=9)
    for number, (name, of) in enumerate(outcomes.items()):
        losses = [outcome.loss for outcome in of]
        middle = statistics.fmean(losses)
        bar = [[middle - min(losses)], [max(losses) - middle]]
        look = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": "*" if name == default else "os^DvP"[number // len(COLOURS) % 6],
            "markersize": 12 if name == default else 6,
            "linestyle": "none",
            "label": name,
        }
        bytes_sent = statistics.fmean(outcome.bytes_per_node for outcome in of)
        if bytes_sent:
            sent.errorbar([bytes_sent / 1e6], [middle], yerr=bar, **look)
        took.errorbar([statistics.fmean(outcome.slow_s for outcome in of)], [middle], yerr=bar, **look)
    figure.legend(*took.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
