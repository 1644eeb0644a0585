"""Supervisor: a testnet from its first process to its last. Starts nodes, watches them, never leaves one behind.

Owns the order of things, in ``run``, which opens the one nursery: start all, watch them to the end, report, stop all.
While a testnet runs, this process answers on a control socket too, so ``gossamer testnet kill`` in another terminal
ends a node that stays a child of this one. A single process is ``cli.node_process``'s, the folder
``cli.testnet_folder``'s; drawing and judging are left to ``cli.live_view`` and ``cli.testnet_report``.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import msgspec
import trio

from cli.live_view import NodeRow, View
from cli.node_process import NodeProcess
from cli.testnet_folder import Plan, TestnetError, lay_out, supervisor_home
from cli.testnet_report import Report, build_report
from node.control import Evaluate, Export, Params, Sample, serve_control
from training.run_spec import run_id
from training.spec_sections import GptSpec, HuggingFaceSpec

WATCH_EVERY_S = 0.5
STARTUP_S_MAX = 120.0
STOP_S_MAX = 12.0
"""Nodes promise to stop within ten seconds; two more and they are killed."""
STALL_S_MAX = 300.0
"""A testnet in which no node takes a step or changes phase for this long has failed."""
AGREE_S_MAX = 60.0
"""From the last node's finish until every node has measured and reported its merge."""
KILL_AT, RESTART_AFTER_S = 0.4, 10.0
SAMPLE_PROMPT, SAMPLE_BYTES = "def ", 300


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
            self._swarm, self._alone = lay_out(self._plan)
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
        if isinstance(plan.spec.model, HuggingFaceSpec):
            # With what is written beside it, a directory that transformers loads.
            out = plan.folder / "merged" / "model.safetensors"
            out.parent.mkdir(exist_ok=True)
        exported = await teller.ask("export", Export(path=str(out)))
        judged = await teller.ask("evaluate", Evaluate(which="anchor"))
        sample = None
        if isinstance(plan.spec.model, GptSpec | HuggingFaceSpec):
            asked = Sample(prompt=SAMPLE_PROMPT, count=SAMPLE_BYTES, which="anchor")
            sample = SAMPLE_PROMPT + (await teller.ask("sample", asked))["text"]
        return msgspec.structs.replace(
            report,
            merged_loss=judged["loss"],
            held_out_bytes=judged["held_out_bytes"],
            held_out_digest=judged["held_out_digest"],
            sample=sample,
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


def _agree(swarm: Sequence[NodeProcess]) -> bool:
    """Whether all these nodes report the same weights: of one merge, measured by who took part, or of all records."""
    held = [node.status.records if node.status else None for node in swarm]
    if any(held):
        states = {records.state if records else None for records in held}
        return None not in states and len(states) == 1
    merges = [node.status.last_merge if node.status else None for node in swarm]
    records = {merge.record if merge else None for merge in merges}
    return (
        None not in records
        and len(records) == 1
        and any(merge is not None and merge.loss_merged is not None for merge in merges)
    )
