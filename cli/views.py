"""How a node's status looks to people: one screen, and one table of peers. Pure functions of NodeStatus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from node.config import format_bytes

if TYPE_CHECKING:
    from node.status import LogStatus, MixReport, NodeStatus, PeerStatus

MIX_PEERS_SHOWN = 3


def status_text(status: NodeStatus) -> str:
    """One screen, in rich markup."""
    lines = [
        (
            "node",
            f"{escape(status.name)} ({short(status.peer)})  up {duration(status.uptime_s)}  v{status.version}",
        ),
        (
            "run",
            f"{escape(status.run_name)} ({status.run_id[:16]})  step {status.step:,} of {status.steps_total:,}"
            f"  [bold]{status.phase}[/]",
        ),
        (
            "train",
            f"loss {loss(status.loss)}  {status.tokens_per_s:,.0f} {status.unit}s/s  {status.device}  "
            f"{status.parameters:,} parameters",
        ),
        *_exchange_lines(status),
        ("net", _net_text(status)),
        (
            "disk",
            f"{format_bytes(status.disk_bytes)} of shards  checkpoint at step {status.checkpoint_step:,}",
        ),
    ]
    if status.refusals:
        counted = ", ".join(f"{reason} {count}" for reason, count in sorted(status.refusals.items()))
        lines.append(("refused", escape(counted)))
    if status.problem:
        lines.append(("warn", f"[yellow]{escape(status.problem)}[/]"))
    return "\n".join(f"[dim]{label:<7}[/] {text}" for label, text in lines)


def peers_table(peers: Sequence[PeerStatus]) -> Table:
    """One row for each member, the connected and the advanced first."""
    one_byte = any(peer.records is not None for peer in peers)
    mode = ("records", "behind", "influence", "same") if one_byte else ("merges", "pulled")
    left = ("peer", "state", "linked", "same", "last problem")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("peer", "state", "linked", "step", "loss", "heard", *mode, "standing", "last problem"):
        table.add_column(title, justify="left" if title in left else "right")
    for peer in sorted(peers, key=lambda peer: (not peer.connected, -peer.step, peer.peer)):
        table.add_row(
            short(peer.peer),
            peer.state,
            "yes" if peer.connected else "no",
            f"{peer.step:,}",
            loss(peer.loss),
            f"{duration(peer.heard_s_ago)} ago",
            *(_record_cells(peer) if one_byte else (str(peer.head_height), format_bytes(peer.bytes_pulled))),
            f"{peer.standing:+.1f}",
            escape(peer.last_problem) or "-",
        )
    return table


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


def _exchange_lines(status: NodeStatus) -> list[tuple[str, str]]:
    records = status.records
    if records is None:
        return [
            ("mix", f"{mix_text(status.last_mix)}   {_mixes_text(status)}"),
            ("merge", _merge_text(status)),
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
    return (
        f"height {merge.height}, {len(merge.contributors)} contributors, "
        f"weights {merge.weights_hash[:16]}{losses}"
    )


def _net_text(status: NodeStatus) -> str:
    connected = sum(peer.connected for peer in status.peers)
    return (
        f"{connected} of {len(status.peers)} known members connected  "
        f"sent {format_bytes(status.bytes_sent)}, received {format_bytes(status.bytes_received)}"
    )
