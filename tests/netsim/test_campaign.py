"""Many seeds at once: one file in one order, failed workers as failed seeds, Ctrl-C that keeps what is there."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from netsim.campaign import Job, run_campaign
from netsim.registry import ScenarioError
from netsim.results import Event, Header, Sample, SeedResult, header_for, read_header, read_lines
from netsim.scenario import Scenario
from training.run_spec import RunSpec

FAKE = "tests.netsim.fake_runner"
HEADER = header_for("")


class Watching:
    """Remembers what a campaign tells."""

    def __init__(self) -> None:
        self.reached: dict[int, float] = {}
        self.ended: list[int] = []

    def progress(self, job: Job, virtual_s: float) -> None:
        self.reached[job.seed] = virtual_s

    def finished(self, result: SeedResult) -> None:
        self.ended.append(result.seed)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def scenario(orders: str = "") -> Scenario:
    return Scenario(
        name="fake", about=orders, duration_s=60, merge_every_s=20, nodes=3, run=RunSpec(name="fake")
    )


def campaign(
    out: Path, seeds: int = 5, *, orders: str = "", processes: int = 2, view: Watching | None = None
) -> list[SeedResult]:
    jobs = [Job(scenario=scenario(orders), seed=seed, variant="ab"[seed % 2]) for seed in range(seeds)]
    return run_campaign(
        jobs, processes=processes, header=HEADER, out=out, view=view or Watching(), runner=FAKE
    )


def lines(out: Path) -> list[Sample | Event | SeedResult]:
    return list(read_lines(out))


def test_the_file_is_the_same_whatever_runs_beside_what(tmp_path: Path) -> None:
    view = Watching()
    one, three = tmp_path / "one", tmp_path / "three"
    results = campaign(one, processes=1)
    assert campaign(three, processes=3, orders="", view=view) == results
    assert one.read_bytes() == three.read_bytes()
    assert read_header(one) == HEADER
    assert [result.seed for result in results] == [0, 1, 2, 3, 4]
    assert [line for line in lines(one) if isinstance(line, SeedResult)] == results
    assert [result.variant for result in results] == ["a", "b", "a", "b", "a"]
    by_seed = [line.seed for line in lines(one)]
    assert by_seed == sorted(by_seed)
    assert sorted(view.ended) == [0, 1, 2, 3, 4]
    assert view.reached == dict.fromkeys(range(5), 60.0)


def test_a_seed_that_raises_is_a_failed_seed(tmp_path: Path) -> None:
    results = campaign(tmp_path / "out", orders="raise:2")
    assert [result.verdict for result in results] == ["passed", "passed", "failed", "passed", "passed"]
    failure = results[2].failures[0]
    assert failure.checker == "simulator"
    assert failure.what.startswith("ZeroDivisionError: a bug (fake_runner.py:")
    assert failure.at_s == 30.0
    assert "churn per hour" in results[2].drawn
    kept = [line for line in lines(tmp_path / "out") if line.seed == 2]
    assert any(isinstance(line, Sample) and line.at_s == 30.0 for line in kept)
    assert kept[-1] == results[2]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_dies_costs_one_seed(tmp_path: Path, processes: int) -> None:
    results = campaign(tmp_path / "out", orders="die:1", processes=processes)
    assert [result.verdict for result in results] == ["passed", "failed", "passed", "passed", "passed"]
    failure = results[1].failures[0]
    assert (failure.checker, failure.what) == ("process", "the process was ended by SIGSEGV")
    assert failure.at_s == 30.0
    assert "churn per hour" in results[1].drawn


def test_a_runner_that_cannot_be_loaded_fails_every_seed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = [Job(scenario=scenario(), seed=seed) for seed in range(2)]
    results = run_campaign(
        jobs,
        processes=1,
        header=HEADER,
        out=tmp_path / "out",
        view=Watching(),
        runner="tests.netsim.no_such_runner",
    )
    assert [result.failures[0].what for result in results] == [
        "the process ended by itself, with exit code 1"
    ] * 2
    assert "no_such_runner" in capfd.readouterr().err


def test_a_scenario_that_the_runner_refuses(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="the scenario is impossible"):
        campaign(tmp_path / "out", orders="refuse")
    assert lines(tmp_path / "out") == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, which a shell prevents in what it starts in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_in_seconds_and_keeps_what_was_finished(tmp_path: Path) -> None:
    """Seed 0 never ends; those after it have ended and wait for their turn."""

    class Interrupting(Watching):
        def finished(self, result: SeedResult) -> None:
            super().finished(result)
            if len(self.ended) == 3:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    began_s = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        campaign(tmp_path / "out", 4, orders="hang:0", view=Interrupting())
    assert time.perf_counter() - began_s < 20
    assert [line.seed for line in lines(tmp_path / "out") if isinstance(line, SeedResult)] == [1, 2, 3]


def test_the_trace_of_a_seed_goes_to_its_file(tmp_path: Path) -> None:
    job = Job(scenario=scenario(), seed=7, trace=str(tmp_path / "trace"))
    run_campaign([job], processes=4, header=HEADER, out=tmp_path / "out", view=Watching(), runner=FAKE)
    assert (tmp_path / "trace").read_text() == "trace of seed 7\n"


def test_nothing_to_run(tmp_path: Path) -> None:
    assert (
        run_campaign([], processes=2, header=HEADER, out=tmp_path / "out", view=Watching(), runner=FAKE) == []
    )
    assert isinstance(read_header(tmp_path / "out"), Header)


def test_jobs_survive_the_way_to_a_worker() -> None:
    job = Job(scenario=scenario("x"), seed=3, variant="v")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(job), type=Job) == job
