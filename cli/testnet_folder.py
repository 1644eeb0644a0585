"""The folder of a testnet: whose it is, and what lies where in it.

    run.toml, alone-<n>.toml      the run specs of the swarm and of the nodes alone
    testnet.json                  which testnet the folder belongs to
    node-<n>/, alone-<n>/         the homes of the nodes
    supervisor/, testnet.log      the supervisor's own corner, never deleted while it may be in use
    report.json                   how it ended; merged.safetensors: the merged model
    merged/                       in its place, of a Hugging Face model: a directory of one

Owns the layout, and the rule that a folder which holds other things is refused, because starting afresh empties it.
Starts no process.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cli.node_process import NodeProcess, free_ports
from node.home import Home
from p2p.errors import GossamerError
from training.run_spec import RunSpec, run_id, spec_as_toml
from training.spec_sections import ScheduleSpec


class TestnetError(GossamerError):
    """A testnet could not be started, or did not come to its end."""

    __test__ = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``gossamer testnet up`` was asked for."""

    folder: Path
    spec: RunSpec
    nodes: int
    alone: int
    keep: bool
    kill_demo: bool
    fresh: bool
    base: Path | None = None
    """Where what the run starts from lies: the first node's own, the others ask for it."""


def lay_out(plan: Plan) -> tuple[list[NodeProcess], list[NodeProcess]]:
    """Claim the folder and write the run specs; returns the swarm's nodes and the nodes alone, none of them started."""
    claim_folder(plan)
    ports = free_ports(plan.nodes + plan.alone)
    spec_file = plan.folder / "run.toml"
    spec_file.write_text(spec_as_toml(plan.spec))
    swarm = [
        NodeProcess(
            plan.folder,
            f"node-{number}",
            port=port,
            part=f"{number}/{plan.nodes}",
            spec_file=spec_file,
            alone=False,
            base=plan.base if number == 1 else None,
        )
        for number, port in enumerate(ports[: plan.nodes], start=1)
    ]
    alone = [_node_alone(plan, number, port) for number, port in enumerate(ports[plan.nodes :], start=1)]
    return swarm, alone


def _node_alone(plan: Plan, number: int, port: int) -> NodeProcess:
    """A node on the same part of the data as ``node-<number>``, in a run of its own."""
    # Another name makes another run, so nodes alone can never meet anyone.
    spec = msgspec.structs.replace(
        plan.spec,
        name=f"{plan.spec.name[:38]}.alone-{number}",
        schedule=ScheduleSpec(preset="final-only"),
    )
    name = f"alone-{number}"
    spec_file = plan.folder / f"{name}.toml"
    spec_file.write_text(spec_as_toml(spec))
    return NodeProcess(
        plan.folder, name, port=port, part=f"{number}/{plan.nodes}", spec_file=spec_file, alone=True
    )


def supervisor_home(folder: Path) -> Home:
    """Where a testnet's supervisor has its lock and its control socket."""
    return Home.at(folder / "supervisor")


def claim_folder(plan: Plan) -> None:
    """Make ``plan.folder`` this testnet's: new, or left by the same testnet, or emptied when ``plan.fresh``."""
    marker = plan.folder / "testnet.json"
    claim = {"run_id": run_id(plan.spec).hex(), "nodes": plan.nodes, "alone": plan.alone}
    others = [path for path in plan.folder.iterdir() if path.name not in ("supervisor", "testnet.log")]
    if others and not marker.exists():
        raise TestnetError(
            f"{plan.folder} holds other things",
            why="a testnet empties its folder when it starts afresh",
            fix="name another folder: --dir PATH",
        )
    if others and plan.fresh:
        purge(plan.folder)
    elif others and json.loads(marker.read_text()) != claim:
        raise TestnetError(
            f"{plan.folder} holds another testnet",
            why="its nodes could not go on with this run",
            fix="start afresh: --fresh    or name another folder: --dir PATH",
        )
    marker.write_text(json.dumps(claim) + "\n")


def purge(folder: Path) -> None:
    """Delete everything a testnet left in ``folder`` but its supervisor's own corner, which is in use."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != "supervisor":
            shutil.rmtree(path)
        elif not path.is_dir() and path.name != "testnet.log":
            path.unlink()
