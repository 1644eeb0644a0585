"""What ``gossamer top`` shows: one node as it is, and how it came to that since the view was opened.

Owns the history of loss and traffic, and the drawing. Lines and table are those of ``gossamer status`` and
``gossamer peers`` (``cli.views``). Never touches a terminal or a socket.

Relies on: the time between two snapshots is what the node's own uptime says, however late they arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from cli.views import (
    duration,
    labelled,
    loss,
    members_text,
    one_line,
    peers_table,
    progress_text,
    status_lines,
)
from node.config import format_bytes
from node.status import NodeStatus, members_by_state

SAMPLES_MAX = 3600
"""An hour, one sample a second."""
SPEED_SAMPLES = 5
"""Over how many samples traffic is averaged; below that, it is bursts."""
CURVE_CELLS = 48
CURVE_BESIDE_CELLS = 40
"""What the label and the figures beside the curve take."""
SPEED_CELLS = 16
LINES_BESIDE = 4
"""Of the screen: above the status one, then an empty one, the table's head, and one below it."""
BARS = "▁▂▃▄▅▆▇█"


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """The node at one refresh; what ``gossamer top --json`` prints."""

    members: dict[str, int]
    """Other members by state."""
    bytes_sent_per_s: float
    bytes_received_per_s: float
    status: NodeStatus


class _Sample(NamedTuple):
    uptime_s: float
    loss: float | None
    sent: int
    received: int


class History:
    """What the node was at every refresh; at most SAMPLES_MAX of them."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES_MAX)

    def add(self, status: NodeStatus) -> Moment:
        """Remember ``status``. A node that has been restarted begins a new history."""
        if self._samples and status.uptime_s < self._samples[-1].uptime_s:
            self._samples.clear()
        self._samples.append(_Sample(status.uptime_s, status.loss, status.bytes_sent, status.bytes_received))
        recent = list(self._samples)[-SPEED_SAMPLES - 1 :]
        sent, received = _speed(recent[0], recent[-1])
        return Moment(
            members=members_by_state(status),
            bytes_sent_per_s=sent,
            bytes_received_per_s=received,
            status=status,
        )

    def seconds(self) -> float:
        """The time it covers."""
        return self._samples[-1].uptime_s - self._samples[0].uptime_s

    def losses(self) -> list[float]:
        """The losses, oldest first."""
        return [sample.loss for sample in self._samples if sample.loss is not None]

    def speeds(self, count: int) -> tuple[list[float], list[float]]:
        """Bytes sent and received per second, from each of the last ``count`` samples to the next."""
        found = [_speed(*pair) for pair in pairwise(list(self._samples)[-count - 1 :])]
        return [sent for sent, _ in found], [received for _, received in found]


def _speed(before: _Sample, after: _Sample) -> tuple[float, float]:
    elapsed_s = after.uptime_s - before.uptime_s
    if elapsed_s == 0:
        return 0.0, 0.0
    return (after.sent - before.sent) / elapsed_s, (after.received - before.received) / elapsed_s


def curve(values: Sequence[float], cells: int, *, low: float | None = None) -> str:
    """``values`` as bars of eight heights in at most ``cells`` cells, each the mean of as many values as must share it.

    The lowest bar is ``low``, or else the least of what is shown.
    """
    count = min(len(values), cells)
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    if not means:
        return ""
    low = min(means) if low is None else low
    span = max(means) - low
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def moment_line(moment: Moment) -> str:
    """One line of plain text, for where there is no terminal."""
    status = moment.status
    problem = f"  ! {one_line(status.problem)}" if status.problem else ""
    return (
        f"{duration(status.uptime_s):>6}  {status.phase:<9} {progress_text(status)}"
        f"  {_speed_text(moment)}  {members_text(status)}{problem}"
    )


def screen(moment: Moment, history: History, *, width: int, height: int, remark: str = "") -> RenderableType:
    """The whole screen. ``remark``: why it is an old one; everything is dim then."""
    status = moment.status
    courses = {"train": _loss_course(history, width), "net": _speed_course(moment, history)}
    lines = []
    for label, text in status_lines(status):
        lines.append(labelled(label, text))
        if course := courses.get(label):
            lines.append(labelled("", course))
    rows = max(1, height - len(lines) - LINES_BESIDE)
    hidden = len(status.peers) - rows
    more = f"and {hidden} more: gossamer peers" if hidden > 0 else ""
    body = Group(
        *(_cut(Text.from_markup(line)) for line in lines),
        "",
        peers_table(status.peers, rows_max=rows),
        Text(more, style="dim"),
    )
    return Group(_head(status, remark), Styled(body, "dim") if remark else body)


def _head(status: NodeStatus, remark: str) -> Table:
    head = Table.grid(expand=True, padding=(0, 2))
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    said = Text(remark, "bold red") if remark else Text("q leaves", "dim")
    bar = ProgressBar(total=max(status.steps_total, 1), completed=status.step)
    head.add_row(Text.assemble(("gossamer top", "bold"), "  ", said), bar)
    return head


def _cut(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _loss_course(history: History, width: int) -> str:
    losses = history.losses()
    if len(losses) < 2:
        return ""
    span = f"{loss(max(losses))} .. {loss(min(losses))}"
    cells = max(1, min(CURVE_CELLS, width - CURVE_BESIDE_CELLS))
    return f"[cyan]{curve(losses, cells)}[/]  {span} in {duration(history.seconds())}"


def _speed_course(moment: Moment, history: History) -> str:
    sent, received = (curve(values, SPEED_CELLS, low=0.0) for values in history.speeds(SPEED_CELLS))
    return (
        f"[magenta]{sent}[/] {format_bytes(moment.bytes_sent_per_s)}/s up"
        f"   [blue]{received}[/] {format_bytes(moment.bytes_received_per_s)}/s down"
    )


def _speed_text(moment: Moment) -> str:
    return f"{format_bytes(moment.bytes_sent_per_s)}/s up  {format_bytes(moment.bytes_received_per_s)}/s down"
