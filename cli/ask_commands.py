"""Commands that ask a running node: status, top, peers, invite, merge, export, eval, sample, stop."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.live import Live
from rich.markup import escape

from cli.common import Common, command
from cli.top import top
from cli.views import logs_table, peers_table, printable, status_text
from node.config import format_bytes
from p2p.errors import GossamerError

MERGE_TIMEOUT_S = 150.0
WORK_TIMEOUT_S = 600.0
"""Evaluating, sampling and exporting wait for the weights and then for the work."""
REFRESH_S = 2.0
HAND_OVER_WAIT_S = 120.0
"""For a merge under way to end."""
EXIT_S_MAX = 20.0
"""A node that stops promises to be gone within ten seconds."""
LOOK_S = 0.1
EXPIRES_DEFAULT = "7d"
"""Long enough for a person to answer, and about as long as addresses of homes stay what they are."""

merge_app = typer.Typer(help="The global merge: one exact average over all members.", no_args_is_help=True)

log_app = typer.Typer(help="One-byte mode: the logs of records.", no_args_is_help=True)

Which = Annotated[
    Literal["anchor", "live"],
    typer.Option("--which", help="anchor: the last merge's weights; live: this node's own."),
]


class RecordsDiffer(GossamerError):
    """The weights of a node in one-byte mode are not what its records say."""


class RecordsDamaged(GossamerError):
    """What a node wrote of its records is not what lies on its disk."""


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    panel = "Ask a running node"
    before: dict[str, Callable[..., None]] = {
        "status": status,
        "top": top,
        "peers": peers,
        "invite": invite,
    }
    after: dict[str, Callable[..., None]] = {
        "export": export,
        "eval": evaluate,
        "sample": sample,
        "stop": stop,
    }
    for name, function in before.items():
        command(app, name, rich_help_panel=panel)(function)
    app.add_typer(merge_app, name="merge", rich_help_panel=panel)
    app.add_typer(log_app, name="log", rich_help_panel=panel)
    for name, function in after.items():
        command(app, name, rich_help_panel=panel)(function)


def status(
    common: Common,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it anew every two seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """One screen about the node; exit code 0 when it runs, 4 when not."""
    from node.status import NodeStatus

    def look() -> NodeStatus:
        return common.ask("status", result_type=NodeStatus)

    if not watch:
        now = look()
        common.print(now, status_text(now))
        return
    pause = threading.Event()
    out = common.out()
    if common.json or not out.is_terminal:
        while True:
            now = look()
            common.print(now, status_text(now) + "\n")
            pause.wait(REFRESH_S)
    with Live(status_text(look()), console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.update(status_text(look()), refresh=True)
            pause.wait(REFRESH_S)


def peers(common: Common) -> None:
    """Every member this node knows: how far it is, when it was last heard, what went wrong with it."""
    from node.status import NodeStatus

    members = common.ask("status", result_type=NodeStatus).peers
    common.print(members, peers_table(members) if members else "no other member is known yet")


def invite(
    common: Common,
    peers: Annotated[int, typer.Option("--peers", min=1, max=8, help="Addresses to put in, at most.")] = 3,
    expires: Annotated[
        str, typer.Option("--expires", help="For example 12h or 7d, or never.")
    ] = EXPIRES_DEFAULT,
) -> None:
    """Print one line that lets another machine join: gossamer join 'LINE'. Of a private swarm it is a secret."""
    from node.control import MakeInvite
    from p2p.invite import utc_text

    expires_s = None if expires == "never" else parse_duration_s(expires)
    answer: dict[str, Any] = common.ask("invite", MakeInvite(peers=peers, expires_s=expires_s))
    common.print(answer, escape(answer["invite"]))
    err, expires_unix_s = common.err(), answer["expires_unix_s"]
    err.print("expires  " + ("never" if expires_unix_s is None else utc_text(expires_unix_s)))
    if answer["secret"]:
        err.print("secret   the swarm's key is in it: whoever reads it can connect, also when it has expired")
        err.print("next     send it where nobody else reads it; there: gossamer join -    and paste it")


@command(merge_app, "now")
def merge_now(common: Common) -> None:
    """Merge with every member that is alive, now, and wait until the merge is committed."""
    from node.control import MergeNow
    from node.status import MergeReport

    common.err().print("merging: waiting for the others' weights")
    report = common.ask("merge_now", MergeNow(), result_type=MergeReport, timeout_s=MERGE_TIMEOUT_S)
    lines = [
        f"merged   {len(report.contributors)} members in {report.duration_s:.1f} s",
        f"record   {report.record}  (height {report.height})",
        f"weights  {report.weights_hash}",
    ]
    if report.loss_merged is not None:
        before = "" if report.loss_before is None else f", {report.loss_before:.4f} before it here"
        lines.append(f"loss     {report.loss_merged:.4f} on held-out text{before}")
    common.print(report, "\n".join(lines))


@command(merge_app, "foretell")
def merge_foretell(
    common: Common,
    text: Annotated[
        int, typer.Option("--bytes", min=1, help="Held-out text that each model is measured on, at most.")
    ] = 1 << 16,
) -> None:
    """What a merge would come to now: everybody's weights are pulled and averaged here, measured, and let go of."""
    from node.control import ForetellMerge
    from node.status import Foretold

    common.err().print("pulling everybody's weights; nothing is changed")
    told = common.ask(
        "foretell_merge",
        ForetellMerge(bytes_max=text),
        result_type=Foretold,
        timeout_s=WORK_TIMEOUT_S,
    )
    verdict = (
        "a merge would be worth having"
        if told.merged < told.local
        else "the models have drifted too far apart: let them exchange more often before they merge"
    )
    common.print(
        told,
        f"merged   {told.merged:.4f} on held-out text\n"
        f"local    {told.local:.4f}, the mean of {len(told.losses)} models\n"
        f"gain     {told.local - told.merged:+.4f}: {verdict}",
    )


@command(log_app, "show")
def log_show(common: Common) -> None:
    """Every log this node holds: whose, how many records of it count, and where it ends."""
    from node.status import LogStatus

    logs = common.ask("logs", result_type=list[LogStatus])
    common.print(logs, logs_table(logs) if logs else "no records yet")


@command(log_app, "verify")
def log_verify(common: Common) -> None:
    """Check every signature and rule again, and that the weights are exactly what the records say."""
    from node.control import VerifyLogs
    from node.status import Verification

    found = common.ask("verify_logs", VerifyLogs(), result_type=Verification, timeout_s=WORK_TIMEOUT_S)
    origin = f"the snapshot of {found.settled:,} records" if found.settled else "the base weights"
    common.print(
        found,
        f"batches  {found.batches:,} checked again, {found.records:,} records\n"
        f"state    {found.state}\n"
        f"counting {'the same' if found.counts_alike else '[bold red]DIFFERENT[/]'} when read anew\n"
        f"weights  without these records {'are' if found.comes_back else '[bold red]ARE NOT[/]'} {origin}\n"
        f"files    {', '.join(f'[bold red]{escape(path)}[/]' for path in found.damaged) or 'all'}"
        f" {'damaged' if found.damaged else 'whole'}",
    )
    if not (found.counts_alike and found.comes_back):
        raise RecordsDiffer(
            "the weights are not what the records say",
            why="memory or disk of this machine has changed them, or this is a bug",
            fix="stop the node, delete its checkpoints folder, and start it again: it replays the records",
        )
    if found.damaged:
        raise RecordsDamaged(
            f"{len(found.damaged)} of the files that this node wrote of its records are damaged",
            why="a disk that rots or somebody else changed them; what is in memory is sound",
            fix="check the disk; when the node is started again it asks its peers for what they held",
        )


def export(
    common: Common,
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The safetensors file to write.")],
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option("--dtype", help="Precision in the file.")
    ] = "fp32",
    which: Which = "anchor",
) -> None:
    """Write the model as a safetensors file, which loads anywhere."""
    from node.control import Export

    request = Export(path=str(out.resolve()), dtype=dtype, which=which)
    answer: dict[str, Any] = common.ask("export", request, timeout_s=WORK_TIMEOUT_S)
    text = f"wrote    {answer['path']}  ({format_bytes(answer['bytes'])})\nweights  {answer['weights_hash']}"
    common.print(answer, text)


def evaluate(
    common: Common,
    which: Which = "live",
    bytes_max: Annotated[
        int | None, typer.Option("--bytes", min=1, help="Held-out bytes to read, at most.")
    ] = None,
) -> None:
    """Measure the loss on what is held out, in nats per byte or token of text, or per example."""
    from node.control import Evaluate

    request = Evaluate(which=which, bytes_max=bytes_max)
    answer: dict[str, Any] = common.ask("evaluate", request, timeout_s=WORK_TIMEOUT_S)
    text = (
        f"loss  {answer['loss']:.4f} nats per {answer['unit']}, {which} weights,"
        f" {answer['held_out_bytes']:,} held-out bytes"
    )
    common.print(answer, text)


def sample(
    common: Common,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")] = "",
    count: Annotated[int, typer.Option("--count", min=1, max=65536, help="Bytes to write.")] = 400,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=10)] = 0.8,
    which: Which = "live",
) -> None:
    """Let the model write text."""
    from node.control import Sample

    request = Sample(prompt=prompt, count=count, temperature=temperature, which=which)
    answer: dict[str, Any] = common.ask("sample", request, timeout_s=WORK_TIMEOUT_S)
    common.print(answer, escape(printable(answer["text"])))


def stop(
    common: Common,
    now: Annotated[bool, typer.Option("--now", help="At once: no checkpoint, no goodbye.")] = False,
    hand_over: Annotated[
        bool,
        typer.Option(
            "--hand-over", help="For an update: after a merge under way; returns when it has exited."
        ),
    ] = False,
) -> None:
    """Stop the node: it writes a checkpoint, tells its peers and exits within ten seconds."""
    from node.control import Stop

    if now and hand_over:
        raise typer.BadParameter("--now and --hand-over contradict each other")
    if hand_over:
        _hand_over(common)
        return
    common.ask("stop", Stop(now=now))
    common.print({"stopping": True, "now": now}, "stopped" if now else "stopping: checkpoint, goodbye")


def _hand_over(common: Common) -> None:
    from node.control import HandOver
    from node.status import NodeStatus

    before = common.ask("status", result_type=NodeStatus)
    common.err().print("handing over: a merge under way may end first, then checkpoint and goodbye")
    answer: dict[str, Any] = common.ask(
        "hand_over", HandOver(wait_s=HAND_OVER_WAIT_S), timeout_s=HAND_OVER_WAIT_S + EXIT_S_MAX
    )
    if not _await_end(before.pid, EXIT_S_MAX):
        raise GossamerError(
            f"the node (process {before.pid}) has not exited within {EXIT_S_MAX:g} s",
            why="a new one cannot start in this home before it has",
            fix="gossamer stop --now    it goes on from its last checkpoint then",
        )
    end = "no merge is lost" if answer["settled"] else "a merge that did not end will be caught up with"
    common.print(
        {"pid": before.pid, "settled": answer["settled"]},
        f"handed over: process {before.pid} has exited, {end}\n"
        "next         gossamer run goes on in this home; a service does so by itself",
    )


def _await_end(pid: int, timeout_s: float) -> bool:
    """Whether process ``pid`` ended within ``timeout_s``. Its socket goes earlier, its lock on the home with it."""
    pause = threading.Event()
    for _ in range(round(timeout_s / LOOK_S)):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        pause.wait(LOOK_S)
    return False


def parse_duration_s(text: str) -> int:
    """``90s``, ``30m``, ``12h`` or ``7d`` to seconds."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a duration; write for example 12h or 7d")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
