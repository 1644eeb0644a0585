"""What a testnet looks like while it runs: a live table on a terminal, plain lines anywhere else.

Owns drawing only. ``NodeRow`` is also what ``gossamer testnet status --json`` prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.views import arrival_text, duration, linked, loss, mix_text, progress_text
from node.config import format_bytes
from node.status import NodeStatus

LINES_EVERY_S = 5.0
BAR_CELLS = 16


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One node process of a testnet, as its supervisor sees it."""

    name: str
    alone: bool
    """Trains without exchanging anything, for comparison."""
    part: str
    """The part of the data it trains on, k/n."""
    state: str
    """Its own phase (starting, training, merging, finished, stopping); killed; or died, with the exit code."""
    pid: int | None
    home: str
    restarts: int
    status: NodeStatus | None
    """The last answer from its control socket; kept after its death."""


class View(Protocol):
    """Shows rows again and again; a context manager around the time it may draw."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, rows: Sequence[NodeRow], elapsed_s: float) -> None:
        """Draw ``rows`` as they are ``elapsed_s`` seconds after the start."""

    def say(self, text: str) -> None:
        """Add one remark that stays."""


def view_for(console: Console, title: str) -> View:
    """The live table when ``console`` is a terminal, else plain lines."""
    return LiveView(console, title) if console.is_terminal else PlainView(console)


class LiveView:
    """A table that redraws itself in place."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, rows: Sequence[NodeRow], elapsed_s: float) -> None:
        """Redraw the table."""
        head = Text.assemble(
            (self._title, "bold"), f"   {duration(elapsed_s)}   Ctrl-C stops everything cleanly"
        )
        self._live.update(Group(head, nodes_table(rows)), refresh=True)

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._live.console.print(escape(text), soft_wrap=True)


class PlainView:
    """One line per node about every five seconds; a node's first loss at once, and its end once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: set[str] = set()
        self._ended: set[str] = set()
        self._lines_due_s = LINES_EVERY_S

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, rows: Sequence[NodeRow], elapsed_s: float) -> None:
        """Print the lines that are due."""
        names = names_of(rows)
        first = [
            row for row in rows if row.status and row.status.loss is not None and row.name not in self._seen
        ]
        self._seen |= {row.name for row in first}
        due = elapsed_s >= self._lines_due_s
        if due:
            self._lines_due_s = elapsed_s + LINES_EVERY_S
        for row in rows if due else first:
            if row.name not in self._ended:
                self.say(f"{duration(elapsed_s):>6}  {row_line(row, names)}")
        if due:
            self._ended = {row.name for row in rows if row.state in ("finished", "killed")}

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, soft_wrap=True)


def names_of(rows: Sequence[NodeRow]) -> dict[str, str]:
    """The names of the nodes by peer id, as far as they have answered."""
    return {row.status.peer: row.name for row in rows if row.status is not None}


def row_line(row: NodeRow, names: Mapping[str, str]) -> str:
    """One node in one line of plain text."""
    status = row.status
    if status is None:
        return f"{row.name:<8} {row.state}"
    line = f"{row.name:<8} {row.state:<9} {progress_text(status)}"
    if status.records is not None:
        line += f"  {exchange_text(status, names)}"
    elif status.last_mix is not None:
        line += f"  mix {mix_text(status.last_mix, names)}"
    return line + (f"  ! {status.problem}" if status.problem else "")


def exchange_text(status: NodeStatus, names: Mapping[str, str]) -> str:
    """What it exchanged last, in a few words."""
    if status.arrival is not None:
        return arrival_text(status.arrival)
    if status.records is None:
        return mix_text(status.last_mix, names)
    state = f", state {status.records.state[:8]}" if status.records.state else ""
    return f"{status.records.applied:,} records{state}"


def nodes_table(rows: Sequence[NodeRow]) -> Table:
    """All nodes, one row each."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    speed = next((f"{row.status.unit}s/s" for row in rows if row.status is not None), "bytes/s")
    for title in ("node", "phase", "progress", "step", "loss", speed, "peers", "up", "down", "exchanged"):
        right = title in ("step", "loss", speed, "peers", "up", "down")
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "exchanged")
    for row in rows:
        table.add_row(*_cells(row, names_of(rows)))
    return table


def _cells(row: NodeRow, names: Mapping[str, str]) -> list[Text | ProgressBar | str]:
    status = row.status
    name = Text(row.name, style="dim" if row.alone else "")
    phase = Text(row.state, style=_PHASE_STYLES.get(row.state.split()[0], ""))
    if status is None:
        return [name, phase, *[""] * 8]
    last = "trains alone" if row.alone else exchange_text(status, names)
    return [
        name,
        phase,
        ProgressBar(total=max(status.steps_total, 1), completed=status.step, width=BAR_CELLS),
        f"{status.step}/{status.steps_total}",
        loss(status.loss),
        f"{status.tokens_per_s:,.0f}" if status.phase == "training" else "",
        str(linked(status)),
        format_bytes(status.bytes_sent),
        format_bytes(status.bytes_received),
        Text(status.problem, style="yellow") if status.problem else Text(last),
    ]


_PHASE_STYLES = {
    "starting": "dim",
    "training": "cyan",
    "waiting": "yellow",
    "merging": "magenta",
    "finished": "green",
    "stopping": "dim",
    "killed": "bold red",
    "died": "bold red",
}
