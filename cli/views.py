"""How a node's status looks to people: one screen, and one table of peers. Pure functions of NodeStatus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from node.config import format_bytes
from node.status import members_by_state

if TYPE_CHECKING:
    from node.status import Arrival, LogStatus, MixReport, NodeStatus, PeerStatus

MIX_PEERS_SHOWN = 3
ARRIVAL_CELLS = 20


def status_text(status: NodeStatus) -> str:
    """One screen, in rich markup."""
    return "\n".join(labelled(label, text) for label, text in status_lines(status))


def labelled(label: str, text: str) -> str:
    """One line of the screen, in rich markup."""
    return f"[dim]{label:<7}[/] {text}"


def status_lines(status: NodeStatus) -> list[tuple[str, str]]:
    """What there is to say, each with its label, in rich markup."""
    lines = [
        (
            "node",
            f"{escape(status.name)} ({short(status.peer)})  up {duration(status.uptime_s)}  v{status.version}",
        ),
        *(_rendezvous_lines(status) if status.phase == "rendezvous" else _member_lines(status)),
    ]
    if status.refusals:
        counted = ", ".join(f"{reason} {count}" for reason, count in sorted(status.refusals.items()))
        lines.append(("refused", escape(counted)))
    if status.problem:
        lines.append(("warn", f"[yellow]{escape(one_line(status.problem))}[/]"))
    return lines


def members_text(status: NodeStatus) -> str:
    """How many of the other members are alive, and how many are not."""
    counts = members_by_state(status)
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "alive")


def linked(status: NodeStatus) -> int:
    """How many members it is connected to."""
    return sum(peer.connected for peer in status.peers)


def progress_text(status: NodeStatus) -> str:
    """How far it is and with whom, in one line of plain text."""
    return (
        f"step {status.step}/{status.steps_total}  loss {loss(status.loss)}"
        f"  {status.tokens_per_s:,.0f} {status.unit}s/s  {linked(status)} peers"
        f"  up {format_bytes(status.bytes_sent)}  down {format_bytes(status.bytes_received)}"
    )


def peers_table(peers: Sequence[PeerStatus], *, rows_max: int | None = None) -> Table:
    """One row for each member: who has just fallen silent comes first, then the connected, and among them the advanced.

    With ``rows_max``, only so many, each in one line of a screen that may be narrow.
    """
    one_byte = any(peer.records is not None for peer in peers)
    mode = ("records", "behind", "influence", "same") if one_byte else ("merges", "pulled")
    left = ("peer", "state", "linked", "same", "last problem")
    cut = rows_max is not None
    table = Table(box=None, pad_edge=False, collapse_padding=cut, header_style="bold")
    for title in ("peer", "state", "linked", "step", "loss", "heard", *mode, "standing", "last problem"):
        table.add_column(
            Text(title, no_wrap=True),
            justify="left" if title in left else "right",
            no_wrap=title != "last problem",
        )
    for peer in sorted(peers, key=_interest)[:rows_max]:
        table.add_row(
            short(peer.peer),
            f"[{_STATE_STYLES[peer.state]}]{peer.state}[/]",
            _LINKED[peer.connected, peer.relay is not None],
            f"{peer.step:,}",
            loss(peer.loss),
            f"{duration(peer.heard_s_ago)} ago",
            *(_record_cells(peer) if one_byte else (str(peer.head_height), format_bytes(peer.bytes_pulled))),
            f"{peer.standing:+.1f}",
            Text(one_line(peer.last_problem) or "-", no_wrap=cut, overflow="ellipsis" if cut else "fold"),
        )
    return table


def _interest(peer: PeerStatus) -> tuple[bool, bool, int, str]:
    return peer.state != "suspect", not peer.connected, -peer.step, peer.peer


_STATE_STYLES = {"alive": "green", "suspect": "yellow", "gone": "red", "left": "dim", "banned": "bold red"}


_LINKED = {(True, False): "yes", (True, True): "by relay", (False, False): "no", (False, True): "no"}


def _record_cells(peer: PeerStatus) -> tuple[str, str, str, str]:
    same = {True: "yes", False: "[bold red]NO[/]", None: "-"}[peer.agrees]
    return f"{peer.records or 0:,}", f"{peer.behind or 0:,}", f"{peer.influence or 0.0:.1%}", same


def logs_table(logs: Sequence[LogStatus]) -> Table:
    """One row for each log."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("log", "author", "batches", "records", "waiting", "clock", "last batch", ""):
        table.add_column(
            title, justify="right" if title in ("batches", "records", "waiting", "clock") else "left"
        )
    for log in logs:
        table.add_row(
            log.log[:8],
            short(log.author),
            f"{log.batches:,}",
            f"{log.records:,}",
            f"{log.waiting:,}",
            f"{log.clock:,}",
            log.last[:16],
            "[bold red]forked[/]" if log.forked else "",
        )
    return table


def mix_text(mix: MixReport | None, names: Mapping[str, str] | None = None) -> str:
    """The last mix in a few words: rule, peers (by ``names`` where they have one), and what it did to the variance."""
    if mix is None:
        return "none yet"
    peers = [(names or {}).get(peer, short(peer)) for peer in mix.peers]
    shown = ", ".join(peers[:MIX_PEERS_SHOWN]) + (" ..." if len(peers) > MIX_PEERS_SHOWN else "")
    ratios = f"variance {mix.variance_ratio_before:.2f} -> {mix.variance_ratio_after:.2f}"
    return f"{mix.rule} with {shown} at step {mix.step:,}, {ratios}"


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: models may write anything, and they learn from anyone."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def one_line(text: str) -> str:
    """``text``, some of which may be a peer's words, without anything that a terminal would obey."""
    return printable(" ".join(text.split()))


def short(peer: str) -> str:
    """The last eight characters of a peer id, which tell peers apart."""
    return peer[-8:]


def loss(value: float | None) -> str:
    """A loss with four decimals, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m07s, 2h05m or 4d03h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def _rendezvous_lines(status: NodeStatus) -> list[tuple[str, str]]:
    return [
        (
            "run",
            f"{_run_text(status)}  [bold]rendezvous[/]: holds no model, is no member",
        ),
        *_network_lines(status),
    ]


def _member_lines(status: NodeStatus) -> list[tuple[str, str]]:
    return [
        (
            "run",
            f"{_run_text(status)}  step {status.step:,} of {status.steps_total:,}  [bold]{status.phase}[/]",
        ),
        (
            "train",
            f"loss {loss(status.loss)}  {status.tokens_per_s:,.0f} {status.unit}s/s  {status.device}  "
            f"{status.parameters:,} parameters",
        ),
        *_exchange_lines(status),
        *_network_lines(status),
        (
            "disk",
            f"{format_bytes(status.disk_bytes)} of shards  checkpoint at step {status.checkpoint_step:,}",
        ),
    ]


def _run_text(status: NodeStatus) -> str:
    return f"{escape(status.run_name)} ({status.run_id[:16]})" + ("  private" if status.private else "")


def _network_lines(status: NodeStatus) -> list[tuple[str, str]]:
    return [
        ("members", f"{members_text(status)}   {linked(status)} connected"),
        (
            "net",
            f"sent {format_bytes(status.bytes_sent)}, received {format_bytes(status.bytes_received)}; "
            f"today {format_bytes(status.bytes_sent_today)} and {format_bytes(status.bytes_received_today)}",
        ),
        *([("reach", reach_text(status))] if status.reach != "unknown" else []),
        *([("router", f"forwards {', '.join(status.mapped)}")] if status.mapped else []),
    ]


def reach_text(status: NodeStatus) -> str:
    """Whether others can dial the node, and by which way where they cannot."""
    if status.reach == "public":
        return "others can dial this node"
    if not status.relays:
        return "nobody can dial this node, and no relay was found yet"
    return f"nobody can dial this node; it is reached through {', '.join(map(short, status.relays))}"


def _exchange_lines(status: NodeStatus) -> list[tuple[str, str]]:
    records = status.records
    if records is None:
        return [
            ("mix", f"{mix_text(status.last_mix)}   {_mixes_text(status)}"),
            ("merge", _merge_text(status)),
            *([("fetch", arrival_text(status.arrival))] if status.arrival is not None else []),
        ]
    also = "".join(
        f", {count:,} {what}"
        for count, what in [(records.unsent, "unsent"), (records.waiting, "waiting")]
        if count
    )
    forked = f", {records.forked} forked" if records.forked else ""
    alive = sum(peer.state == "alive" for peer in status.peers)
    state = "on the way" if records.state is None else records.state[:16]
    lines = [
        ("records", f"{records.applied:,} applied{also}   {records.logs} logs{forked}"),
        ("state", f"{state}   {records.agree} of {alive} other members alive hold the same"),
    ]
    if records.ceiling is not None:
        lines.append(
            ("ceiling", f"{records.ceiling:.0f} peers like this one, and applying takes as long as probing")
        )
    return lines


def arrival_text(arrival: Arrival) -> str:
    """How much of a merge's weights is here, as a bar and in figures."""
    filled = ARRIVAL_CELLS * arrival.received // arrival.total
    count = len(arrival.holders)
    return (
        f"{'█' * filled}{'░' * (ARRIVAL_CELLS - filled)}  {format_bytes(arrival.received)} of "
        f"{format_bytes(arrival.total)}, from {count} member{'' if count == 1 else 's'}"
    )


def _mixes_text(status: NodeStatus) -> str:
    one_sided = f", {status.mixes_one_sided} one-sided" if status.mixes_one_sided else ""
    return f"{status.mixes} mixes, {status.mixes_failed} failed{one_sided}"


def _merge_text(status: NodeStatus) -> str:
    merge = status.last_merge
    if merge is None:
        return "none yet"
    losses = (
        "" if merge.loss_merged is None else f"  loss {loss(merge.loss_before)} -> {loss(merge.loss_merged)}"
    )
    ago = "" if status.last_merge_s_ago is None else f", {duration(status.last_merge_s_ago)} ago"
    return (
        f"height {merge.height}, {len(merge.contributors)} contributors{ago}, took {merge.duration_s:.1f} s, "
        f"weights {merge.weights_hash[:16]}{losses}"
    )
