"""Many seeds of a scenario, and of its variants, in processes beside each other: one after the other into one file.

Owns the worker processes, what becomes of a seed whose worker fails, and the order of the lines: header first, then
seed for seed in the order of the jobs, however many run at once. What a seed does is ``netsim.runner``'s; the parent
process never imports it, nor torch.

A worker that raises or dies costs that seed, which counts as failed, and is replaced. Ctrl-C reaches the parent alone;
it ends the workers and keeps every seed that was finished.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

import msgspec

from netsim.registry import ScenarioError
from netsim.results import Event, Failure, Header, Sample, SeedResult, encode_line
from netsim.scenario import Scenario
from p2p.errors import GossamerError

RUNNER = "netsim.runner"
"""The module that simulates; see ``Runner``."""

AHEAD_MAX = 16
"""Finished seeds that may wait in memory for an earlier one, for each process."""
POLL_S = 0.5
"""How often Ctrl-C is looked for at the least; reports wake the parent at once."""
EXIT_S_MAX = 2.0
"""A worker that has been told to end is killed after this long."""


class Runner(Protocol):
    """What a module must have to simulate: ``netsim.runner``, or a test's."""

    def run_seed(
        self,
        scenario: Scenario,
        seed: int,
        *,
        variant: str = "",
        until_s: float | None = None,
        trace: Path | None = None,
        emit: Callable[[Sample | Event | SeedResult], None],
        progress: Callable[[float], None] | None = None,
    ) -> SeedResult:
        """Run one seed to its end, or to ``until_s``."""

    def plan(self, scenario: Scenario, seed: int) -> dict[str, Any]:
        """What ``seed`` decides about ``scenario``, without running it."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One seed of one variant; ``scenario`` is what is run, the variant's changes applied."""

    scenario: Scenario
    seed: int
    variant: str = ""
    trace: str | None = None
    """The file that the trace goes to, if any."""


class View(Protocol):
    """Is told how a campaign gets on."""

    def progress(self, job: Job, virtual_s: float) -> None:
        """``job`` has come so far."""

    def finished(self, result: SeedResult) -> None:
        """A seed has ended; called in the order in which seeds end."""


def run_campaign(
    jobs: Sequence[Job],
    *,
    processes: int,
    header: Header,
    out: Path,
    view: View,
    runner: str = RUNNER,
) -> list[SeedResult]:
    """Run ``jobs`` in so many ``processes``, writing all lines to ``out``; results are in the order of the jobs.

    Raises ScenarioError if the runner refuses a scenario, OSError if ``out`` cannot be written, KeyboardInterrupt on
    Ctrl-C; in each case what was finished is in ``out``.
    """
    processes = min(processes, len(jobs))
    waiting = deque(enumerate(jobs))
    workers: list[_Worker] = []
    with out.open("wb") as file:
        file.write(encode_line(header))
        ready = _InOrder(file)
        try:
            while ready.next < len(jobs):
                _hand_out(waiting, workers, processes, runner, before=ready.next + AHEAD_MAX * processes)
                for worker in _reporting(workers):
                    assert worker.job is not None
                    match worker.take():
                        case _Reached(virtual_s=virtual_s):
                            view.progress(worker.job, virtual_s)
                        case _Refused(what=what, why=why, fix=fix):
                            raise ScenarioError(what, why=why, fix=fix)
                        case _Done() as done:
                            ready.add(worker.number, done)
                            view.finished(done.result)
                            worker.job = None
                            if not worker.alive:
                                worker.end()
                                workers.remove(worker)
        finally:
            ready.flush()
            for worker in workers:
                worker.end()
    return ready.results


def _hand_out(
    waiting: deque[tuple[int, Job]], workers: list[_Worker], processes: int, runner: str, *, before: int
) -> None:
    """Give each idle worker a job, of those with a number below ``before``, and start workers that are missing."""
    while waiting and waiting[0][0] < before:
        idle = next((worker for worker in workers if worker.job is None), None)
        if idle is None:
            if len(workers) == processes:
                return
            idle = _Worker(runner)
            workers.append(idle)
        idle.give(*waiting.popleft())


def _reporting(workers: Sequence[_Worker]) -> list[_Worker]:
    readable = wait([worker.pipe for worker in workers if worker.job is not None], timeout=POLL_S)
    return [worker for worker in workers if worker.pipe in readable]


class _Began(msgspec.Struct, tag=True):
    """The worker has drawn what the seed decides."""

    drawn: dict[str, Any]


class _Reached(msgspec.Struct, tag=True):
    """The seed has come so far."""

    virtual_s: float


class _Refused(msgspec.Struct, tag=True):
    """The runner says that the scenario is impossible, before anything ran."""

    what: str
    why: str
    fix: str


class _Done(msgspec.Struct, tag=True):
    """The seed has ended; ``lines`` are all that it wrote, the result's line included."""

    lines: bytes
    result: SeedResult


_Report: TypeAlias = _Began | _Reached | _Refused | _Done


class _InOrder:
    """Writes what seeds wrote in the order of the jobs."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._early: dict[int, _Done] = {}
        self.next = 0
        """The first job that has not been written."""
        self.results: list[SeedResult] = []

    def add(self, number: int, done: _Done) -> None:
        """The seed of job ``number`` has ended."""
        self._early[number] = done
        while self.next in self._early:
            self._put(self.next)
            self.next += 1

    def flush(self) -> None:
        """Write what still waits for seeds that will not end any more."""
        for number in sorted(self._early):
            self._put(number)

    def _put(self, number: int) -> None:
        done = self._early.pop(number)
        self._file.write(done.lines)
        self._file.flush()
        self.results.append(done.result)


class _Worker:
    """The parent's side of one process."""

    def __init__(self, runner: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, runner), daemon=True)
        with _interrupts_held_back():
            self._process.start()
        theirs.close()  # else the end of the process would not be the end of the pipe
        self.job: Job | None = None
        self.number = -1
        self._drawn: dict[str, Any] = {}
        self._reached_s = 0.0

    def give(self, number: int, job: Job) -> None:
        """Start on ``job``, the one with this number."""
        self.number, self.job = number, job
        self._drawn, self._reached_s = {}, 0.0
        with contextlib.suppress(OSError):  # dead: found, and told, where its report is awaited
            self.pipe.send_bytes(msgspec.msgpack.encode(job))

    def take(self) -> _Report:
        """The next report; if there will be none, that the seed failed with its process."""
        assert self.job is not None
        try:
            report: _Report = _REPORTS.decode(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.join(EXIT_S_MAX)
            what = _ended_by(self._process.exitcode)
            return _failed(self.job, "process", what, self._drawn, self._reached_s)
        if isinstance(report, _Began):
            self._drawn = report.drawn
        elif isinstance(report, _Reached):
            self._reached_s = report.virtual_s
        return report

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.is_alive()

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        self._process.join(EXIT_S_MAX)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


_REPORTS = msgspec.msgpack.Decoder(_Report)
_JOBS = msgspec.msgpack.Decoder(Job)


def _work(pipe: Connection, runner: str) -> None:
    """A worker process: one job after the other, until the parent is gone."""
    os.environ["OMP_NUM_THREADS"] = "1"  # processes are the parallelism; read when torch is imported
    module: Runner = importlib.import_module(runner)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            job = _JOBS.decode(pipe.recv_bytes())
            pipe.send_bytes(msgspec.msgpack.encode(_simulate(job, module, pipe)))


def _simulate(job: Job, runner: Runner, pipe: Connection) -> _Done | _Refused:
    lines = bytearray()
    began_s = time.perf_counter()
    drawn: dict[str, Any] = {}
    reached_s = 0.0

    def emit(line: Sample | Event | SeedResult) -> None:
        lines.extend(encode_line(line))

    def progress(virtual_s: float) -> None:
        nonlocal reached_s
        reached_s = virtual_s
        pipe.send_bytes(msgspec.msgpack.encode(_Reached(virtual_s)))

    try:
        drawn = runner.plan(job.scenario, job.seed)
        pipe.send_bytes(msgspec.msgpack.encode(_Began(drawn)))
        result = runner.run_seed(
            job.scenario,
            job.seed,
            variant=job.variant,
            trace=Path(job.trace) if job.trace is not None else None,
            emit=emit,
            progress=progress,
        )
    except BrokenPipeError:
        raise
    except Exception as error:
        if isinstance(error, GossamerError) and not lines and not reached_s:
            return _Refused(error.what, error.why, error.fix)
        failed = _failed(job, "simulator", _described(error), drawn, reached_s, time.perf_counter() - began_s)
        return _Done(bytes(lines) + failed.lines, failed.result)
    return _Done(bytes(lines), result)


def _failed(
    job: Job, checker: str, what: str, drawn: dict[str, Any], at_s: float, wall_s: float = 0.0
) -> _Done:
    result = SeedResult(
        seed=job.seed,
        variant=job.variant,
        verdict="failed",
        failures=[Failure(checker=checker, what=what, at_s=at_s, machine=None)],
        drawn=drawn,
        trace="",
        virtual_s=at_s,
        wall_s=wall_s,
        deliveries=0,
        summary={},
    )
    return _Done(encode_line(result), result)


def _described(error: BaseException) -> str:
    """An error in one line: what, and where it was raised."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


def _ended_by(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"the process was ended by {signal.Signals(-exit_code).name}"
    return f"the process ended by itself, with exit code {exit_code}"


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Children started within inherit that Ctrl-C does not reach them; here it arrives at the end of the block."""
    resource_tracker.ensure_running()  # which the first child would start first, letting interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
