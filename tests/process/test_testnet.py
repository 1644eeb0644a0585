"""``gossamer testnet`` as people type it: one command to a merged model, and what can be done on the way."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file

from cli.exit_codes import ExitCode
from cli.live_view import NodeRow
from cli.testnet_folder import supervisor_home
from cli.testnet_report import Report
from node.home import AlreadyRunning, Home
from tests.process.swarm import SPEC, gossamer
from training.data import Corpus
from training.export import load_exported
from training.merge_math import weights_hash
from training.run_spec import load_run_spec, run_id
from training.trainer import Trainer

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

STEPS = 200
"""Long enough that all have met before the first of them is done."""
POLL_S = 0.2


class Status(msgspec.Struct):
    """What ``gossamer testnet status --json`` prints."""

    nodes: list[NodeRow]
    report: Report | None


def ask(*arguments: str | Path, prints: Any) -> Any:
    """What one ``gossamer testnet`` command prints as JSON, one line, when all goes well."""
    ran = gossamer("testnet", *arguments, "--json", "--quiet", seconds_max=150)
    assert (ran.returncode, ran.stderr) == (ExitCode.OK, "")
    (line,) = ran.stdout.splitlines()
    return msgspec.json.decode(line, type=prints)


def when(folder: Path, condition: Callable[[list[NodeRow]], bool], *, seconds: float) -> list[NodeRow]:
    """The nodes of a running testnet as soon as ``condition`` holds."""
    rows: list[NodeRow] = []
    for _ in range(round(seconds / POLL_S)):
        rows = ask("status", "--dir", folder, prints=Status).nodes
        if condition(rows):
            return rows
        time.sleep(POLL_S)
    raise AssertionError(f"not within {seconds} s: {rows}")


def is_up(home: Home) -> bool:
    """Whether a process holds this home; the kernel lets go of it however the process ends."""
    try:
        with home.lock():
            return False
    except AlreadyRunning:
        return True


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SPEC.format(steps=STEPS, merges=1))
    return path


def test_four_nodes_and_one_alone_end_with_one_model(tmp_path: Path, spec_file: Path) -> None:
    folder = tmp_path / "swarm"
    report = ask("up", "--run", spec_file, "--nodes", "4", "--alone", "1", "--dir", folder, prints=Report)

    spec = load_run_spec(spec_file)
    assert report.run_id == run_id(spec).hex()
    assert report.weights_agree
    assert {(node.weights_hash, node.record) for node in report.nodes} == {
        (report.weights_hash, report.record)
    }
    assert len({node.peer for node in report.nodes}) == 4
    for node in report.nodes:
        assert (node.state, node.steps, node.contributed, node.restarts) == ("finished", STEPS, True, 0)
        assert min(node.bytes_sent, node.bytes_received) > 0
        assert 0 < node.loss_merged < 5
        assert 0 < node.loss_before < 5
    (alone,) = report.alone
    assert (alone.part, alone.steps) == ("1/4", STEPS)
    assert alone.loss is not None
    assert len(report.sample) > 100

    # The exported model by itself, without anything of ours ...
    tensors = load_file(report.exported)
    assert sum(tensor.numel() for tensor in tensors.values()) == spec.model.parameters
    assert report.exported_bytes == os.path.getsize(report.exported)
    # ... and with ours: it is the model that was merged, as good on the same text as the report says.
    corpus = Corpus.load("stdlib", None)
    trainer = Trainer(spec, corpus, run=run_id(spec), peer="judge", part=None, device="cpu", threads=1)
    exported = load_exported(Path(report.exported).read_bytes(), trainer.layout)
    assert exported.spec == spec
    assert weights_hash(exported.values).hex() == report.weights_hash
    assert trainer.task.held_out_digest.hex() == report.held_out_digest
    assert trainer.evaluate(exported.values) == pytest.approx(report.merged_loss, abs=1e-6)

    # Nothing runs any more, and the outcome is still there to be asked for.
    after = ask("status", "--dir", folder, prints=Status)
    assert after == Status(nodes=[], report=report)


@contextlib.contextmanager
def background(folder: Path, spec_file: Path) -> Iterator[int]:
    """A testnet of two that trains longer than anybody waits, in the background; yields its supervisor's pid."""
    plan = ["--run", spec_file, "--nodes", "2", "--steps", "100000", "--dir", folder]
    pid = ask("up", "--detach", *plan, prints=dict)["pid"]
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def all_train(rows: list[NodeRow]) -> bool:
    """Whether every node trains, and has mixed with another."""
    return all(row.state == "training" and row.status.mixes > 0 for row in rows)


def homes(rows: list[NodeRow]) -> list[Home]:
    return [Home.at(Path(row.home)) for row in rows]


def test_a_testnet_in_the_background_obeys(tmp_path: Path, spec_file: Path) -> None:
    folder = tmp_path / "swarm"
    with background(folder, spec_file):
        before = when(folder, all_train, seconds=60)
        assert [row.name for row in before] == ["node-1", "node-2"]
        second = gossamer("testnet", "up", "--detach", "--run", spec_file, "--dir", folder)
        assert second.returncode == ExitCode.TAKEN

        killed = ask("kill", "1", "--dir", folder, prints=NodeRow)
        assert (killed.name, killed.state, killed.pid) == ("node-1", "killed", None)
        assert [is_up(home) for home in homes(before)] == [False, True]
        again = ask("start", "1", "--dir", folder, prints=NodeRow)
        assert again.pid != before[0].pid
        after = when(folder, all_train, seconds=60)
        assert [row.restarts for row in after] == [1, 0]
        assert [row.status.peer for row in after] == [row.status.peer for row in before]

        assert ask("down", "--dir", folder, prints=dict) == {"down": True, "purged": False}
        assert not any(is_up(home) for home in (supervisor_home(folder), *homes(before)))
    ran = gossamer("testnet", "status", "--dir", folder)
    assert ran.returncode == ExitCode.NO_DAEMON
    assert "no testnet is running" in ran.stderr


def test_nodes_end_with_their_supervisor_and_the_testnet_can_be_taken_up_again(
    tmp_path: Path, spec_file: Path
) -> None:
    folder = tmp_path / "swarm"
    with background(folder, spec_file):
        first = when(folder, all_train, seconds=60)
    # The supervisor was killed, and had no time to say anything.
    for _ in range(50):
        if not any(is_up(home) for home in homes(first)):
            break
        time.sleep(POLL_S)
    else:
        raise AssertionError("nodes without a supervisor")
    with background(folder, spec_file):
        again = when(folder, all_train, seconds=60)
        assert [row.status.peer for row in again] == [row.status.peer for row in first]
        assert ask("down", "--purge", "--dir", folder, prints=dict) == {"down": True, "purged": True}
    assert not list(folder.glob("node-*"))
