"""``gossamer doctor``: looks at this machine and this home, and says what is wrong and what to type.

Owns how findings are shown; which checks there are and what is right is decided in ``cli.checks``. Changes nothing, and
starts nothing but processes and connections that end with it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cli.common import Common, command
from cli.exit_codes import ExitCode
from p2p.errors import SwarmKeyError

if TYPE_CHECKING:
    from cli.checks.finding import Finding, Subject
    from node.home import Home
    from p2p.swarm_key import SwarmKey

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def register(app: typer.Typer) -> None:
    """Add this module's command to ``app``."""
    command(app, "doctor", rich_help_panel="This machine")(doctor)


def doctor(
    common: Common,
    invite: Annotated[
        str | None, typer.Argument(metavar="INVITE", help="Whether the peers in this invite answer.")
    ] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option("--bootstrap", metavar="ADDR", help="Whether this peer answers; may be repeated."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="FILE.zip", help="Write what a maintainer needs; never the key."),
    ] = None,
) -> None:
    """Check this machine and this home; exit code 0 when nothing failed, 7 when something did."""
    import trio

    from cli.checks.finding import CHECK_S_MAX, examine
    from cli.checks.registry import CHECKS
    from cli.checks.running import status_if_any

    subject = _subject(common, invite, bootstrap or [])
    common.err().print(f"checking; {CHECK_S_MAX:g} s at the most")
    findings = trio.run(examine, subject, CHECKS)
    result: dict[str, Any] = {"findings": findings, "failed": _count(findings, "fail")}
    lines = [text for finding in findings for text in _lines(finding)]
    lines.append(
        f"{len(findings)} checks: {result['failed']} failed, {_count(findings, 'warn')} to look at,"
        f" {_count(findings, 'skip')} not possible"
    )
    if bundle is not None:
        from cli.doctor_bundle import write_bundle

        holds = write_bundle(bundle, subject, findings, trio.run(status_if_any, subject))
        result["bundle"] = {"file": str(bundle), "holds": holds}
        lines.append(f"wrote {escape(str(bundle))}; look at it before you send it. In it, and nothing else:")
        lines += [f"      {escape(name):<16} {about}" for name, about in holds.items()]
    common.print(result, "\n".join(lines))
    if result["failed"]:
        raise typer.Exit(ExitCode.CHECK_FAILED)


def _subject(common: Common, invite: str | None, bootstrap: Sequence[str]) -> Subject:
    from cli.checks.finding import Subject
    from node.config import ConfigError, NodeConfig, load_config
    from p2p.invite import Invite

    home, now_unix_s = common.home, _now_unix_s()
    parsed = None if invite is None else Invite.parse(invite, now_unix_s=now_unix_s)
    try:
        config = load_config(home.config_file, os.environ).config
    except ConfigError:  # A check of its own tells of it.
        config = NodeConfig()
    run = home.remembered_run() if parsed is None else parsed.run
    return Subject(
        home=home,
        config=config,
        environ=os.environ,
        run=run,
        bootstrap=[*(parsed.addresses if parsed is not None else ()), *bootstrap],
        now_unix_s=now_unix_s,
        swarm_key=(parsed and parsed.swarm_key) or _key_of(home, run),
    )


def _key_of(home: Home, run: bytes | None) -> SwarmKey | None:
    from p2p.swarm_key import SwarmKey

    try:
        return None if run is None else SwarmKey.load(home.swarm_key_file(run))
    except SwarmKeyError:  # A check of its own tells of it.
        return None


def _now_unix_s() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


def _count(findings: Sequence[Finding], level: str) -> int:
    return sum(finding.level == level for finding in findings)


def _lines(finding: Finding) -> list[str]:
    style = STYLES[finding.level]
    lines = [f"[{style}]{finding.level:<5}[/] {finding.check:<12} {escape(finding.found)}"]
    if finding.level != "ok":
        told = [("why", finding.why), ("fix", finding.fix)]
        lines += [f"      {'':<7} {label:<4} {escape(text)}" for label, text in told if text]
    return lines
