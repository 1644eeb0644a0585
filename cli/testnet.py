"""``gossamer testnet``: a whole swarm of real node processes on this machine, in one command.

Owns the commands; processes belong to ``cli.supervisor``, files to ``cli.testnet_folder``, drawing to ``cli.live_view``
and ``cli.testnet_report``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer

from cli.common import Common, command
from p2p.errors import GossamerError

if TYPE_CHECKING:
    from node.control import Params
    from training.run_spec import RunSpec

T = TypeVar("T")
POLL_S = 0.3
DOWN_S_MAX = 30.0

testnet_app = typer.Typer(help="A swarm of real nodes on this machine, in one command.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option("--dir", metavar="FOLDER", help="Where the testnet lives.")]
Number = Annotated[int, typer.Argument(min=1, metavar="NODE", help="The node's number.")]
FOLDER = Path("swarm")


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.add_typer(testnet_app, name="testnet", rich_help_panel="Try it here")


@command(testnet_app, "up")
def up(
    common: Common,
    nodes: Annotated[int, typer.Option("-n", "--nodes", min=1, max=64, help="Node processes.")] = 4,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="SPEC.toml", help="The run; a small default one if absent."),
    ] = None,
    folder: Folder = FOLDER,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Replace the seed in the run spec.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Replace the steps in the run spec.")
    ] = None,
    alone: Annotated[
        int,
        typer.Option("--alone", min=0, max=64, help="Nodes to train without any exchange, to compare with."),
    ] = 0,
    kill_demo: Annotated[
        bool, typer.Option("--kill-demo", help="Kill the last node at 40 %, start it again 10 s later.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="PATH",
            help="What a one-byte run starts from: weights (safetensors), or a Hugging Face model's directory.",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the nodes up after the report.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what an earlier testnet left there.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background.")] = False,
) -> None:
    """Start node processes that find each other, train, exchange and merge; show them live; report."""
    if alone > nodes:
        raise typer.BadParameter(
            "nodes alone train on the swarm's parts, so there are at most as many as nodes"
        )
    spec = _spec(run, seed, steps, base, nodes)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if detach:
        arguments = ["-n", str(nodes), "--dir", str(folder), "--alone", str(alone), "--keep"]
        arguments += [flag for flag, given in [("--kill-demo", kill_demo), ("--fresh", fresh)] if given]
        for name, value in [
            ("--run", run and run.resolve()),
            ("--seed", seed),
            ("--steps", steps),
            ("--base", base and base.resolve()),
        ]:
            arguments += [] if value is None else [name, str(value)]
        _detach(common, folder, arguments)
        return
    import trio

    from cli.live_view import view_for
    from cli.supervisor import Supervisor
    from cli.testnet_folder import Plan
    from cli.testnet_report import check_weights, report_view

    plan = Plan(folder, spec, nodes, alone, keep, kill_demo, fresh, base and base.resolve())
    err = common.err()
    err.print(
        f"{nodes} nodes on 127.0.0.1, run {spec.name}: {spec.model.parameters:,} parameters,"
        f" {spec.train.steps:,} steps each    logs: gossamer testnet logs -f --dir {_shown(folder)}",
        soft_wrap=True,
    )
    supervisor = Supervisor(
        plan,
        view_for(err, f"testnet {spec.name}"),
        reported=lambda report: common.print(report, report_view(report)),
    )
    report = trio.run(supervisor.run)
    if report is None:
        raise KeyboardInterrupt
    check_weights(report)


@command(testnet_app, "status")
def status(common: Common, folder: Folder = FOLDER) -> None:
    """The nodes as they are now; once they have merged, the report too."""
    from cli.live_view import NodeRow, nodes_table
    from cli.testnet_report import Report, report_view

    file = folder / "report.json"
    report = msgspec.json.decode(file.read_bytes(), type=Report) if file.exists() else None
    try:
        rows = _ask(folder, "status", result_type=list[NodeRow])
    except GossamerError:
        if report is None:
            raise
        rows = []
    if common.json:
        common.print({"nodes": rows, "report": report}, "")
        return
    common.print(rows, nodes_table(rows) if rows else "not running; this is how it ended:")
    if report is not None:
        common.print(report, report_view(report))


@command(testnet_app, "logs")
def logs(
    common: Common,
    node: Annotated[int | None, typer.Argument(min=1, metavar="NODE", help="One node only.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come in.")] = False,
    folder: Folder = FOLDER,
) -> None:
    """Print the nodes' logs."""
    pattern = "*-*" if node is None else f"node-{node}"
    files = sorted(folder.glob(f"{pattern}/logs/node.log"))
    if not files:
        raise GossamerError(
            f"no logs under {folder}",
            why="no such node has been started there",
            fix="gossamer testnet up    or name its folder: --dir FOLDER",
        )
    common.out().file.flush()
    os.execvp("tail", ["tail", "-n", "+1", *(["-F"] if follow else []), *map(str, files)])  # noqa: S606, S607


@command(testnet_app, "kill")
def kill(common: Common, node: Number, folder: Folder = FOLDER) -> None:
    """SIGKILL a node, as a power cut would; start it again with: gossamer testnet start NODE."""
    _pick(common, folder, "kill", node, "killed")


@command(testnet_app, "start")
def start(common: Common, node: Number, folder: Folder = FOLDER) -> None:
    """Start a killed node again, with its home: it resumes from its checkpoint."""
    _pick(common, folder, "start", node, "started")


@command(testnet_app, "down")
def down(
    common: Common,
    purge: Annotated[bool, typer.Option("--purge", help="Delete the testnet's folder too.")] = False,
    folder: Folder = FOLDER,
) -> None:
    """Stop all nodes, each with a checkpoint and a goodbye."""
    from cli.testnet_folder import purge as purge_folder
    from cli.testnet_folder import supervisor_home
    from node.control import NoDaemon
    from node.home import AlreadyRunning

    def ended() -> bool:
        # The socket goes first; who holds the lock still has nodes to stop.
        try:
            with home.lock():
                return True
        except AlreadyRunning:
            return False

    home = supervisor_home(folder.resolve())
    try:
        _ask(folder, "down")
        running = True
    except NoDaemon:
        if not purge:
            raise
        running = False
    if running:
        _wait_until(ended, DOWN_S_MAX, "the testnet is still stopping")
    if purge and (folder / "testnet.json").exists():
        with home.lock():
            purge_folder(folder)
    common.print({"down": True, "purged": purge}, "purged" if purge else "down")


def _spec(run: Path | None, seed: int | None, steps: int | None, base: Path | None, nodes: int) -> RunSpec:
    from training.default_run import default_run
    from training.run_spec import check_startable, load_run_spec
    from training.schedules import check_fan_out

    spec = default_run("testnet") if run is None else load_run_spec(run)
    if seed is not None:
        spec = msgspec.structs.replace(spec, seed=seed)
    if steps is not None:
        spec = msgspec.structs.replace(spec, train=msgspec.structs.replace(spec.train, steps=steps))
    if base is not None:
        import trio

        from node.base import spec_based_on

        spec = trio.run(spec_based_on, spec, base)
    check_startable(spec)
    check_fan_out(spec, nodes)
    return spec


def _detach(common: Common, folder: Path, arguments: Sequence[str]) -> None:
    """Start the same command in the background and return once its nodes are up."""
    from cli.supervisor import STARTUP_S_MAX
    from cli.testnet_folder import supervisor_home

    home = supervisor_home(folder)
    with home.lock():
        # Of a supervisor that was killed: it must not pass for the new one's.
        home.control_socket.unlink(missing_ok=True)
    log_file = folder / "testnet.log"
    with log_file.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter, our own arguments
            [sys.executable, "-P", "-m", "cli", "testnet", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def started() -> bool:
        if process.poll() is not None:
            raise GossamerError(
                f"the testnet ended while starting (exit code {process.returncode})",
                why=log_file.read_text(errors="replace").strip().rpartition("error")[2].strip(),
                fix=f"its log: {log_file}",
            )
        return home.control_socket.exists()

    _wait_until(started, STARTUP_S_MAX, "the testnet is still starting")
    shown = _shown(folder)
    common.print(
        {"folder": str(folder), "pid": process.pid},
        f"up in the background    see it: gossamer testnet status --dir {shown}"
        f"    stop it: gossamer testnet down --dir {shown}",
    )


def _pick(common: Common, folder: Path, method: str, number: int, done: str) -> None:
    from cli.live_view import NodeRow
    from cli.supervisor import PickNode

    row = _ask(folder, method, PickNode(node=number), result_type=NodeRow)
    common.print(row, f"{done} {row.name}")


def _ask(folder: Path, method: str, params: Params | None = None, *, result_type: type[T] = dict) -> T:  # type: ignore[assignment]
    from cli.testnet_folder import supervisor_home
    from node.control import NoDaemon, call

    try:
        return call(supervisor_home(folder.resolve()).control_socket, method, params, result_type=result_type)
    except NoDaemon as error:
        raise NoDaemon(
            f"no testnet is running in {_shown(folder.resolve())}",
            why="its supervisor does not answer",
            fix="start one: gossamer testnet up    or name its folder: --dir FOLDER",
        ) from error


def _wait_until(condition: Any, seconds_max: float, what: str) -> None:
    pause = threading.Event()
    for _ in range(int(seconds_max / POLL_S)):
        if condition():
            return
        pause.wait(POLL_S)
    raise GossamerError(f"{what} after {seconds_max:.0f} s", fix="look at the logs: gossamer testnet logs")


def _shown(folder: Path) -> str:
    """``folder`` as a person would type it from here."""
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)
