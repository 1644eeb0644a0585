"""The owner of a testnet's processes: starts nodes, watches them, kills and restarts them, and never leaves one behind.

Owns the folder of a testnet and the life of its node processes, from ``run`` (which opens the one nursery) to its end.
Nodes are ordinary ``gossamer run`` processes, each with a home of its own; what is known about them comes from their
control sockets. While a testnet runs, this process answers on a control socket too, so ``gossamer testnet kill`` in
another terminal ends a node that stays a child of this one. A node whose supervisor dies, however it dies, ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from cli.live_view import NodeRow, View
from cli.node_commands import prepare_home
from cli.testnet_report import Report, build_report
from node.control import Evaluate, Export, Params, Sample, ask, serve_control
from node.home import Home
from node.status import NodeStatus
from p2p.errors import GossamerError
from training.run_spec import RunSpec, run_id, spec_as_toml

NODES_MAX = 64
WATCH_EVERY_S = 0.5
STATUS_TIMEOUT_S = 10.0
STARTUP_S_MAX = 120.0
STOP_S_MAX = 12.0
"""Nodes promise to stop within ten seconds; two more and they are killed."""
STALL_S_MAX = 300.0
"""A testnet in which no node takes a step or changes phase for this long has failed."""
AGREE_S_MAX = 60.0
"""From the last node's finish until every node has measured and reported its merge."""
WORK_S_MAX = 300.0
KILL_AT, RESTART_AFTER_S = 0.4, 10.0
SAMPLE_PROMPT, SAMPLE_BYTES = "def ", 300
LOG_LINES_SHOWN = 3


class TestnetError(GossamerError):
    """A testnet could not be started, or did not come to its end."""

    __test__ = False


class PickNode(Params, frozen=True):
    """``kill`` and ``start`` -> NodeRow: by number, node-1 being 1."""

    node: int


class GetRows(Params, frozen=True):
    """``status`` -> list of NodeRow."""


class Down(Params, frozen=True):
    """``down`` -> {}: stop all nodes and the supervisor."""


TESTNET_METHODS: dict[str, type[Params]] = {
    "status": GetRows,
    "kill": PickNode,
    "start": PickNode,
    "down": Down,
}


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


class NodeProcess:
    """One ``gossamer run`` process and its home; can be killed and started again under the same identity."""

    def __init__(
        self, folder: Path, name: str, *, port: int, part: str, spec_file: Path, alone: bool
    ) -> None:
        self.name = name
        self.part = part
        self.alone = alone
        self.home = Home.at(folder / name)
        self.log_file = self.home.logs_folder / "node.log"
        self.starts = 0
        self.status: NodeStatus | None = None
        self._port = port
        self._spec_file = spec_file
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._answered = False

    @property
    def up(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def finished(self) -> bool:
        """Whether it trained and merged to the end, and has measured the result."""
        return self.up and self._answered and self.status is not None and self.status.phase == "finished"

    @property
    def state(self) -> str:
        """Its phase, as it says itself, or how it ended."""
        if not self.up:
            if self._killed:
                return "killed"
            return "starting" if self._process is None else f"died ({self._process.returncode})"
        return self.status.phase if self.status is not None and self._answered else "starting"

    @property
    def address(self) -> str:
        """Where it listens, at every start the same; its peer id included."""
        return f"/ip4/127.0.0.1/tcp/{self._port}/p2p/{prepare_home(self.home)[0]}"

    def start(self, bootstrap: Sequence[str]) -> None:
        """Start the process. Its home and its port are those of its last life, so that others find it again."""
        prepare_home(self.home)
        command = [sys.executable, "-P", "-m", "cli", "run", "--home", str(self.home.data_folder)]
        command += ["--run", str(self._spec_file), "--part", self.part, "--threads", "1"]
        command += ["--listen", f"/ip4/127.0.0.1/tcp/{self._port}", "--parent", str(os.getpid())]
        for address in bootstrap:
            command += ["--bootstrap", address]
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches the supervisor, which stops nodes in order.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, our own arguments
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_node_environment(self.name),
                start_new_session=True,
            )
        self.starts += 1
        self._killed = self._answered = False

    def kill(self) -> None:
        """SIGKILL: what a power cut looks like to the others."""
        if self._process is not None and self.up:
            self._killed = True
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM: checkpoint, goodbye, end."""
        if self._process is not None and self.up:
            self._process.terminate()

    async def look(self) -> None:
        """Ask the process for its status; one that does not answer yet, or any more, keeps its last one."""
        if not self.up:
            return
        try:
            self.status = await ask(
                self.home.control_socket, "status", result_type=NodeStatus, timeout_s=STATUS_TIMEOUT_S
            )
            self._answered = True
        except GossamerError:
            return

    async def ask(self, method: str, params: Params) -> dict[str, Any]:
        """Ask the process anything that may take a while."""
        return await ask(self.home.control_socket, method, params, timeout_s=WORK_S_MAX)

    def row(self) -> NodeRow:
        """How it is now."""
        return NodeRow(
            name=self.name,
            alone=self.alone,
            part=self.part,
            state=self.state,
            pid=self._process.pid if self._process is not None and self.up else None,
            home=str(self.home.data_folder),
            restarts=max(self.starts - 1, 0),
            status=self.status,
        )

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.exists() else []
        return " / ".join(line.strip() for line in lines[-LOG_LINES_SHOWN:]) or "it said nothing"


class Supervisor:
    """Runs one testnet from its first process to its last."""

    def __init__(self, plan: Plan, view: View, *, reported: Callable[[Report], None]) -> None:
        self._plan = plan
        self._view = view
        self._reported = reported
        self._home = supervisor_home(plan.folder)
        self._down = trio.Event()
        self._swarm: list[NodeProcess] = []
        self._alone: list[NodeProcess] = []
        self._began_s = 0.0

    async def run(self) -> Report | None:
        """The whole life of the testnet. Returns its report; None when it was stopped before the end."""
        report: Report | None = None
        with self._home.lock():
            self._lay_out()
            self._began_s = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._obey_signals)
                nursery.start_soon(self._cancel_when_down, nursery.cancel_scope)
                try:
                    with self._view:
                        await self._start_all()
                        await nursery.start(
                            partial(
                                serve_control,
                                self._home.control_socket,
                                self._handlers(),
                                methods=TESTNET_METHODS,
                            )
                        )
                        await self._watch_to_the_end()
                        report = await self._collect()
                    (self._plan.folder / "report.json").write_bytes(msgspec.json.encode(report))
                    self._reported(report)
                    if self._plan.keep:
                        self._view.say("the nodes stay up; stop them with Ctrl-C or: gossamer testnet down")
                        await self._down.wait()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._stop_all()
                nursery.cancel_scope.cancel()
        return report

    @property
    def _nodes(self) -> list[NodeProcess]:
        return [*self._swarm, *self._alone]

    # --- starting ---------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        plan = self._plan
        claim_folder(plan)
        spec_file = plan.folder / "run.toml"
        spec_file.write_text(spec_as_toml(plan.spec))
        ports = iter(free_ports(plan.nodes + plan.alone))
        for number in range(1, plan.nodes + 1):
            part = f"{number}/{plan.nodes}"
            self._swarm.append(
                NodeProcess(
                    plan.folder,
                    f"node-{number}",
                    port=next(ports),
                    part=part,
                    spec_file=spec_file,
                    alone=False,
                )
            )
        for number in range(1, plan.alone + 1):
            # Another name makes another run, so nodes alone can never meet anyone.
            spec = msgspec.structs.replace(
                plan.spec,
                name=f"{plan.spec.name[:38]}.alone-{number}",
                exchange=msgspec.structs.replace(plan.spec.exchange, rule="none"),
            )
            alone_file = plan.folder / f"alone-{number}.toml"
            alone_file.write_text(spec_as_toml(spec))
            self._alone.append(
                NodeProcess(
                    plan.folder,
                    f"alone-{number}",
                    port=next(ports),
                    part=f"{number}/{plan.nodes}",
                    spec_file=alone_file,
                    alone=True,
                )
            )

    async def _start_all(self) -> None:
        """Start everyone at once; all of the swarm know node 1, and find each other through it."""
        for node in self._nodes:
            others = [] if node.alone or node is self._swarm[0] else [self._swarm[0].address]
            node.start(others)
        await self._wait_for_answers(self._nodes)

    def _start_again(self, node: NodeProcess) -> None:
        """Start ``node`` with the addresses of all others that are up: node 1 may be gone."""
        node.start([other.address for other in self._swarm if other is not node and other.up])

    async def _wait_for_answers(self, nodes: Sequence[NodeProcess]) -> None:
        deadline_s = trio.current_time() + STARTUP_S_MAX
        while any(node.state == "starting" for node in nodes):
            await self._look_and_draw()
            for node in nodes:
                if not node.up:
                    raise TestnetError(
                        f"{node.name} ended while starting ({node.state})",
                        why=node.last_words(),
                        fix=f"its whole log: {node.log_file}",
                    )
            if trio.current_time() > deadline_s:
                raise TestnetError(
                    f"not all nodes were up within {STARTUP_S_MAX:.0f} s",
                    why="this machine may be too small or too busy for so many",
                    fix="start fewer: gossamer testnet up -n 2",
                )
            await trio.sleep(WATCH_EVERY_S)

    # --- watching ---------------------------------------------------------------------------------------------

    async def _watch_to_the_end(self) -> None:
        """Return when every node that is up has finished, and all of the swarm report one merge."""
        changed_s, progress, finished_s = trio.current_time(), None, None
        demo = self._kill_demo() if self._plan.kill_demo else None
        while True:
            await self._look_and_draw()
            if demo is not None:
                next(demo, None)
            now_s = trio.current_time()
            if (seen := [(node.state, node.status and node.status.step) for node in self._nodes]) != progress:
                progress, changed_s = seen, now_s
            swarm = [node for node in self._swarm if node.up]
            if not swarm:
                raise TestnetError(
                    "no node is left", why=self._swarm[0].last_words(), fix="gossamer testnet logs"
                )
            if all(node.finished for node in self._nodes if node.up):
                finished_s = finished_s or now_s
                if _agree(swarm) or now_s - finished_s > AGREE_S_MAX:
                    return
            elif now_s - changed_s > STALL_S_MAX:
                raise TestnetError(
                    f"nothing has moved for {STALL_S_MAX:.0f} s",
                    why="; ".join(f"{node.name}: {node.status.problem}" for node in swarm if node.status),
                    fix="gossamer testnet logs",
                )
            await trio.sleep(WATCH_EVERY_S)

    def _kill_demo(self) -> Generator[None]:
        """Kill the last node at 40 % of its steps and start it again ten seconds later; one step per ``next``."""
        victim = self._swarm[-1]
        while victim.status is None or victim.status.step < KILL_AT * victim.status.steps_total:
            yield
        victim.kill()
        self._view.say(f"killed {victim.name} (SIGKILL) at step {victim.status.step}; the others go on")
        restart_s = trio.current_time() + RESTART_AFTER_S
        while trio.current_time() < restart_s:
            yield
        self._start_again(victim)
        self._view.say(f"started {victim.name} again; it resumes from its checkpoint")

    async def _look_and_draw(self) -> None:
        await self._look()
        self._view.show([node.row() for node in self._nodes], trio.current_time() - self._began_s)

    async def _look(self) -> None:
        async with trio.open_nursery() as nursery:
            for node in self._nodes:
                nursery.start_soon(node.look)

    # --- ending -----------------------------------------------------------------------------------------------

    async def _collect(self) -> Report:
        """The report, with what one node of the swarm says about the merged model."""
        plan = self._plan
        report = build_report(
            [node.row() for node in self._nodes],
            run_id=run_id(plan.spec).hex(),
            seconds=trio.current_time() - self._began_s,
        )
        teller = next((node for node in self._swarm if node.finished), None)
        if report.weights_hash is None or teller is None:
            return report
        out = plan.folder / "merged.safetensors"
        exported = await teller.ask("export", Export(path=str(out)))
        judged = await teller.ask("evaluate", Evaluate(which="anchor"))
        sampled = await teller.ask("sample", Sample(prompt=SAMPLE_PROMPT, count=SAMPLE_BYTES, which="anchor"))
        return msgspec.structs.replace(
            report,
            held_out_bytes=judged["held_out_bytes"],
            held_out_digest=judged["held_out_digest"],
            sample=SAMPLE_PROMPT + sampled["text"],
            exported=exported["path"],
            exported_bytes=exported["bytes"],
        )

    async def _stop_all(self) -> None:
        for node in self._nodes:
            node.terminate()
        with trio.move_on_after(STOP_S_MAX):
            while any(node.up for node in self._nodes):  # noqa: ASYNC110 - processes are no events
                await trio.sleep(0.05)
        for node in self._nodes:
            node.kill()

    async def _obey_signals(self) -> None:
        """First Ctrl-C or SIGTERM: stop the nodes in order. Second: kill them."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for _ in signals:
                if self._down.is_set():
                    for node in self._nodes:
                        node.kill()
                else:
                    self._view.say("stopping the nodes: checkpoint, goodbye; once more to kill them")
                self._down.set()

    async def _cancel_when_down(self, scope: trio.CancelScope) -> None:
        await self._down.wait()
        scope.cancel()

    # --- the control socket -----------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, Any]:
        async def status(_: GetRows) -> list[NodeRow]:
            await self._look()
            return [node.row() for node in self._nodes]

        async def kill(request: PickNode) -> NodeRow:
            node = self._pick(request.node)
            node.kill()
            self._view.say(f"killed {node.name} (SIGKILL)")
            return node.row()

        async def start(request: PickNode) -> NodeRow:
            node = self._pick(request.node)
            if node.up:
                raise TestnetError(f"{node.name} is running", fix=f"gossamer testnet kill {request.node}")
            self._start_again(node)
            self._view.say(f"started {node.name} again")
            return node.row()

        async def down(_: Down) -> dict[str, Any]:
            self._down.set()
            return {}

        return {"status": status, "kill": kill, "start": start, "down": down}

    def _pick(self, number: int) -> NodeProcess:
        if not 1 <= number <= len(self._swarm):
            raise TestnetError(f"there is no node {number}", fix=f"name one from 1 to {len(self._swarm)}")
        return self._swarm[number - 1]


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


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now; held until all are chosen, so they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _agree(swarm: Sequence[NodeProcess]) -> bool:
    """Whether all these nodes report one and the same last merge, measured by those who took part in it."""
    merges = [node.status.last_merge if node.status else None for node in swarm]
    records = {merge.record if merge else None for merge in merges}
    return (
        None not in records
        and len(records) == 1
        and any(merge is not None and merge.loss_merged is not None for merge in merges)
    )


def _node_environment(name: str) -> dict[str, str]:
    """The environment of a node process: ours, without our own settings, one thread, no cap on a loopback."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("GOSSAMER_")}
    return own | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "GOSSAMER_NAME": name,
        "GOSSAMER_LOG_FORMAT": "console",
        "GOSSAMER_UPLOAD_BYTES_PER_S_MAX": "0",
        "GOSSAMER_DOWNLOAD_BYTES_PER_S_MAX": "0",
    }
