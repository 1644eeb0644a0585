"""The check of the node that runs in this home, by what it says itself."""

from __future__ import annotations

from collections.abc import Sequence

from cli.checks.finding import Finding, Subject
from cli.checks.software import DISTRIBUTION, installed_version
from cli.views import reach_text
from node.control import NoDaemon, ask
from node.status import NodeStatus
from p2p.errors import GossamerError

ANSWER_S_MAX = 10.0


async def check_node(subject: Subject) -> Sequence[Finding]:
    """Its phase, what stands in its way, whom it has refused, and whether it is the version that is installed."""
    try:
        status = await ask_status(subject)
    except NoDaemon:
        return [
            Finding(
                check="node",
                level="skip",
                found="no node runs in this home",
                why="what only a running node knows is not looked at",
                fix="start it: gossamer run",
            )
        ]
    refused = ", ".join(f"{reason} {count}" for reason, count in sorted(status.refusals.items())) or "nothing"
    connected = sum(peer.connected for peer in status.peers)
    found = (
        f"{status.phase}, step {status.step} of {status.steps_total}, {connected} of {len(status.peers)} members"
        f" connected, refused: {refused}"
    )
    if status.reach != "unknown":
        found += f"; {reach_text(status)}"
    if status.mapped:
        found += f"; the router says that it forwards {', '.join(status.mapped)}"
    elif status.reach == "private":
        found += "; no router forwards a port to it by UPnP"
    if status.problem:
        return [
            Finding(
                check="node",
                level="warn",
                found=f"{found}; {status.problem}",
                why="a node that runs does not get ahead while something stands in its way",
                fix="gossamer peers    gossamer status --watch",
            )
        ]
    if status.reach == "private" and not status.relays:
        return [
            Finding(
                check="node",
                level="warn",
                found=found,
                why="members that nobody can dial either do not reach this node, and merges lack one of the two",
                fix="forward the port on the router, or have a member that can be dialled stay in the swarm:"
                " gossamer run --bootstrap-only",
            )
        ]
    installed = installed_version(DISTRIBUTION)
    if status.version != installed:
        return [
            Finding(
                check="node",
                level="warn",
                found=f"{found}; it runs version {status.version}, and {installed} is installed",
                why="what was mended since is not mended in a process that was started before",
                fix="gossamer stop --hand-over    and unless a service does so: gossamer run",
            )
        ]
    return [Finding(check="node", level="ok", found=found)]


async def ask_status(subject: Subject) -> NodeStatus:
    """What the node of the home says. Raises NoDaemon, or another GossamerError when it does not answer in time."""
    return await ask(subject.home.control_socket, "status", result_type=NodeStatus, timeout_s=ANSWER_S_MAX)


async def status_if_any(subject: Subject) -> NodeStatus | None:
    """The same; None where there is no answer."""
    try:
        return await ask_status(subject)
    except GossamerError:
        return None
