"""How a testnet ended: held-out losses before and after the merge, and whether all nodes hold the same weights.

Pure functions of the nodes' last statuses; asking the nodes is the supervisor's work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cli.live_view import NodeRow
from cli.views import duration, loss, printable
from node.config import format_bytes
from p2p.errors import GossamerError


class WeightsDiffer(GossamerError):
    """The nodes of a testnet ended with different merged weights, or with none."""


class NodeResult(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the swarm at the end. Losses are nats per byte on the held-out text."""

    name: str
    peer: str
    state: str
    steps: int
    loss_before: float | None
    """Just before it took the merged weights."""
    loss_merged: float | None
    weights_hash: str | None
    record: str | None
    contributed: bool
    bytes_sent: int
    bytes_received: int
    restarts: int


class AloneResult(msgspec.Struct, frozen=True, kw_only=True):
    """One node that trained without exchanging anything."""

    name: str
    part: str
    steps: int
    loss: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one testnet run."""

    schema: int = 1
    run_name: str
    run_id: str
    seconds: float
    nodes: list[NodeResult]
    alone: list[AloneResult]
    merged_loss: float | None
    weights_hash: str | None
    """The merged weights of most nodes, BLAKE3, hex."""
    weights_agree: bool
    """Whether every node that is up holds exactly those, under one merge record."""
    record: str | None
    """The merge record of these weights; in one-byte mode the digest of the version vector."""
    records: int | None = None
    """One-byte mode: how many records the weights hold."""
    held_out_bytes: int | None = None
    held_out_digest: str | None = None
    sample: str | None = None
    exported: str | None = None
    exported_bytes: int | None = None


def build_report(rows: Sequence[NodeRow], *, run_id: str, seconds: float) -> Report:
    """The report on ``rows``, whose statuses must be recent; what only a node can tell is left None."""
    nodes = [_node_result(row) for row in rows if not row.alone]
    up = [node for node in nodes if node.state == "finished"]
    ends = Counter((node.record, node.weights_hash) for node in up if node.record is not None)
    (record, weights_hash), holders = ends.most_common(1)[0] if ends else ((None, None), 0)
    merged = [node.loss_merged for node in up if node.weights_hash == weights_hash]
    return Report(
        run_name=next((row.status.run_name for row in rows if row.status and not row.alone), ""),
        run_id=run_id,
        seconds=seconds,
        nodes=nodes,
        alone=[_alone_result(row) for row in rows if row.alone],
        merged_loss=next((value for value in merged if value is not None), None),
        weights_hash=weights_hash,
        weights_agree=holders > 0 and holders == len(up),
        record=record,
        records=next((row.status.records.applied for row in rows if row.status and row.status.records), None),
    )


def check_weights(report: Report) -> None:
    """Raise WeightsDiffer unless all nodes ended with the same merged weights."""
    if report.weights_agree:
        return
    held = [f"{node.name}: {node.weights_hash or 'no merge'}" for node in report.nodes]
    raise WeightsDiffer(
        "the nodes do not hold the same merged weights: " + ", ".join(held),
        why="a committed merge record names one result, bit for bit, for everyone",
        fix="look for the first problem in the logs: gossamer testnet logs",
    )


def report_view(report: Report) -> RenderableType:
    """The final table, the verdict under it, and the sample."""
    parts: list[RenderableType] = [Text(), _losses_table(report), Text()]
    holders = sum(node.weights_hash == report.weights_hash for node in report.nodes)
    averaged = sum(node.contributed for node in report.nodes)
    if report.weights_agree:
        of_what = f"the average of {averaged}" if report.records is None else f"of {report.records:,} records"
        verdict = f"{holders} of {len(report.nodes)} nodes hold the same weights, {of_what}"
        parts.append(Text(verdict, style="green"))
    else:
        parts.append(Text("THE NODES HOLD DIFFERENT WEIGHTS", style="bold red"))
    facts = [
        ("weights", f"BLAKE3 {report.weights_hash}" if report.weights_hash else "no merge was committed"),
        ("record", report.record or "-"),
    ]
    if report.held_out_bytes is not None:
        facts.append(
            ("held out", f"{report.held_out_bytes:,} bytes, BLAKE3 {(report.held_out_digest or '')[:16]}")
        )
    if report.exported is not None:
        facts.append(("exported", f"{report.exported}  ({format_bytes(report.exported_bytes or 0)})"))
    facts.append(("took", duration(report.seconds)))
    parts += [Text(f"{label:<9}{text}") for label, text in facts]
    if report.sample is not None:
        parts += [Text("\nThe merged model writes:", style="bold"), Text(printable(report.sample))]
    return Group(*parts)


def _losses_table(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("", "steps", "held-out loss", "sent", "received", "weights in the end"):
        table.add_column(title, justify="left" if title in ("", "weights in the end") else "right")
    for node in report.nodes:
        name = node.name + (f" (restarted {node.restarts}x)" if node.restarts else "")
        table.add_row(
            name if node.state == "finished" else f"{name} ({node.state})",
            str(node.steps),
            loss(node.loss_before),
            format_bytes(node.bytes_sent),
            format_bytes(node.bytes_received),
            node.weights_hash or "-",
        )
    for alone in report.alone:
        table.add_row(
            f"{alone.name} (part {alone.part}, no exchange)", str(alone.steps), loss(alone.loss), "", "", ""
        )
    best = min((alone.loss for alone in report.alone if alone.loss is not None), default=None)
    gain = ""
    if best is not None and report.merged_loss is not None:
        gain = f"{abs(best - report.merged_loss):.4f} {'below' if report.merged_loss < best else 'ABOVE'}"
        gain += " the node alone" if len(report.alone) == 1 else " the best node alone"
    table.add_row("[bold]merged model[/]", "", f"[bold]{loss(report.merged_loss)}[/]", "", "", escape(gain))
    return table


def _node_result(row: NodeRow) -> NodeResult:
    status, merge = row.status, row.status.last_merge if row.status else None
    records = status.records if status else None
    return NodeResult(
        name=row.name,
        peer=status.peer if status else "",
        state=row.state,
        steps=status.step if status else 0,
        loss_before=merge.loss_before if merge else None,
        loss_merged=merge.loss_merged if merge else None,
        weights_hash=merge.weights_hash if merge else records.state if records else None,
        record=merge.record if merge else records.vector if records else None,
        contributed=merge.contributed if merge else records is not None,
        bytes_sent=status.bytes_sent if status else 0,
        bytes_received=status.bytes_received if status else 0,
        restarts=row.restarts,
    )


def _alone_result(row: NodeRow) -> AloneResult:
    """A node alone merges with nobody: its loss before that merge is its own model's."""
    merge = row.status.last_merge if row.status else None
    return AloneResult(
        name=row.name,
        part=row.part,
        steps=row.status.step if row.status else 0,
        loss=merge.loss_before if merge else None,
    )
