"""The mixing rates of exchanges as a page of Markdown and a figure.

Owns how they look. What is measured, and the theory beside it, is ``netsim.research.rates``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from netsim.research.lockstep import Outcome
from netsim.research.rates import EXACT, FAN_OUT_ROUNDS, Rate, curves, fan_out_rates, mixing_rates

MEMBERS = (16, 64)
FAN_OUT_MEMBERS = 96
FAN_OUTS = (1, 2, 4, 7)
FIGURE_ROUNDS = 40
FIGURE_SEED = 1

DRIFT_SHOWN = 1e-9
"""A mean that moves by less has met nothing but rounding."""

LOOKS = (
    ("#000000", "-"),
    ("#000000", "--"),
    ("#000000", ":"),
    ("#D55E00", "-"),
    ("#0072B2", "-"),
    ("#009E73", "-"),
    ("#CC79A7", "-"),
    ("#CC79A7", "--"),
    ("#E69F00", ":"),
    ("#E69F00", "-"),
)
"""Colour and dash of each curve in turn: Okabe and Ito's palette, which colour-blind readers can tell apart."""


def write_report(folder: Path, *, seeds: int = 3) -> None:
    """Measure everything (minutes) and write ``mixing.md`` and ``mixing.png`` into ``folder``."""
    tables = [rates_table(members, mixing_rates(members, seeds=seeds)) for members in MEMBERS]
    tables.append(fan_out_table(FAN_OUT_MEMBERS, fan_out_rates(FAN_OUT_MEMBERS, FAN_OUTS, seeds=seeds)))
    members = MEMBERS[-1]
    tables.append(f"![Deviation and error over rounds, {members} members](mixing.png)\n")
    (folder / "mixing.md").write_text("\n".join(tables), encoding="utf-8")
    draw_curves(curves(members, rounds=FIGURE_ROUNDS, seed=FIGURE_SEED), folder / "mixing.png")


def rates_table(members: int, rates: Sequence[Rate]) -> str:
    """One line for each scheme."""
    lines = [
        f"**{members} members.** rho: factor by which the deviation from the mean shrinks per round. Mean moves: in"
        " standard deviations of the mean of so many members.",
        "",
        "| exchange | models sent per member and round | rho | by theory | rho per model sent | mean moves |",
        "|---|---|---|---|---|---|",
    ]
    for rate in rates:
        if rate.exact_after:
            rho, per_model = f"exact after {rate.exact_after} rounds", "-"
        else:
            rho, per_model = f"{rate.rho:.3f}", f"{rate.rho ** (1 / rate.models_sent):.3f}"
        theory = f"{rate.rho_theory:.3f}" if rate.rho_theory else "exact"
        moves = f"{rate.drift:.2f}" if rate.drift > DRIFT_SHOWN else "no"
        lines.append(f"| {rate.scheme} | {rate.models_sent:.3g} | {rho} | {theory} | {per_model} | {moves} |")
    return "\n".join([*lines, ""])


def fan_out_table(members: int, table: Mapping[int, Sequence[Rate]]) -> str:
    """One line for each s: variance ratios per round, by theory in brackets."""
    lines = [
        f"**{members} members, by fan-out.** Variance ratio per round over the first {FAN_OUT_ROUNDS} rounds; theory in"
        " brackets.",
        "",
        "| s | EL-Local (push) | random pull | EL-Oracle | one s-regular graph |",
        "|---|---|---|---|---|",
    ]
    for s, rates in table.items():
        cells = [f"{rate.rho**2:.3f} ({rate.rho_theory**2:.3f})" for rate in rates]
        cells += ["-"] * (4 - len(cells))
        lines.append(f"| {s} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def draw_curves(outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Two panels as PNG: how far apart the members are, and how far from the mean they began with."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    apart, off = figure.subplots(1, 2, sharey=True)
    for (name, outcome), (colour, dash) in zip(outcomes.items(), LOOKS, strict=True):
        label = f"{name} ({outcome.models_sent:.2g})"
        for axes, values in ((apart, outcome.deviation), (off, outcome.error)):
            # An exact average is 0, which a logarithmic axis cannot show: let it fall out of the picture.
            axes.semilogy(values.clip(min=EXACT), color=colour, linestyle=dash, linewidth=1.7, label=label)
    _, members, _ = outcomes[next(iter(outcomes))].estimates.shape
    figure.suptitle(f"{members} members average what they hold, one run of each exchange")
    apart.set_title("Do they agree? Distance from their own mean", fontsize=10.5)
    off.set_title("On the right value? Distance from the initial mean", fontsize=10.5)
    apart.set_ylabel("norm, as a share of that at the start")
    for axes in (apart, off):
        axes.set_xlabel("round")
        axes.set_ylim(1e-8, 2)
        axes.set_xlim(0, FIGURE_ROUNDS)
        axes.minorticks_off()
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *apart.get_legend_handles_labels(),
        title="exchange (models sent per member and round)",
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
