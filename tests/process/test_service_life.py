"""What a node that runs for weeks lives through: its log is rotated, and a newer version takes its place."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from cli.exit_codes import ExitCode
from cli.node_process import free_ports
from node.control import ask
from node.home import Home
from node.status import NodeStatus
from p2p.errors import GossamerError
from tests.process.swarm import SPEC, gossamer, merged_alike, small_swarm, until

pytestmark = [pytest.mark.process, pytest.mark.slow]

WAIT_S_MAX = 90.0
README = Path(__file__).parents[2] / "README.md"


@contextlib.contextmanager
def running(home: Home, *arguments: str | Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """``gossamer run`` in ``home``, as a service manager starts it; it does not outlive the block."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GOSSAMER_")}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", "run", "--home", home.data_folder, *arguments],
        env=environment | {"OMP_NUM_THREADS": "1", "GOSSAMER_THREADS": "1"} | settings,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def status_when(home: Home, condition: Callable[[NodeStatus], object]) -> NodeStatus:
    """The status of the node in ``home`` as soon as it answers and ``condition`` holds for it."""
    with trio.fail_after(WAIT_S_MAX):
        while True:
            with contextlib.suppress(GossamerError):
                status = await ask(home.control_socket, "status", result_type=NodeStatus)
                if condition(status):
                    return status
            await trio.sleep(0.1)


async def handed_over(home: Home, collect: Callable[[], object]) -> dict[str, object]:
    """What ``gossamer stop --hand-over`` says; ``collect`` does the parent's part, as service managers do theirs."""

    async def keep_collecting() -> None:
        while True:
            collect()
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_collecting)
        said = await trio.to_thread.run_sync(
            lambda: gossamer("stop", "--hand-over", "--json", "--home", home.data_folder)
        )
        nursery.cancel_scope.cancel()
    assert said.returncode == ExitCode.OK, said.stderr
    return json.loads(said.stdout)


def home_with_key(folder: Path, key: Path | None = None) -> Home:
    """A new home, with a copy of ``key`` for its own."""
    assert gossamer("init", "--home", folder).returncode == ExitCode.OK
    home = Home.at(folder)
    if key is not None:
        shutil.copy(key, home.identity_file)
    return home


def events(*files: Path) -> list[str]:
    """What was logged, line by line; each is a whole one."""
    return [json.loads(line)["event"] for file in files for line in file.read_text().splitlines()]


def after_rotation(home: Home) -> None:
    """What logrotate does, as the README has it."""
    snippet = README.read_text().partition("postrotate\n")[2].partition("endscript")[0]
    script = snippet.replace("/home/ada/.local/state/gossamer", str(home.state_folder))
    assert str(home.lock_file) in script
    subprocess.run(["sh", "-ec", script], check=True, timeout=30)


@pytest.mark.timeout(180)
async def test_a_rotated_log_goes_on_in_a_new_file_and_no_line_is_lost(tmp_path: Path) -> None:
    home = home_with_key(tmp_path / "home")
    spec, logs = tmp_path / "run.toml", tmp_path / "logs"
    spec.write_text(SPEC.format(steps=100_000, merges=1))
    logs.mkdir()
    file, old = logs / "node.log", logs / "node.log.1"
    (port,) = free_ports(1)
    listen = f"/ip4/127.0.0.1/tcp/{port}"
    with running(home, "--run", spec, "--listen", listen, GOSSAMER_LOG_FILE=str(file)) as process:
        await status_when(home, lambda status: status.step > 0)
        file.rename(old)
        assert gossamer("merge", "now", "--home", home.data_folder).returncode == ExitCode.OK
        assert not file.exists()  # A file that was only moved is the same file.
        after_rotation(home)
        with trio.fail_after(WAIT_S_MAX):
            while not file.exists():
                await trio.sleep(0.05)
        assert gossamer("merge", "now", "--home", home.data_folder).returncode == ExitCode.OK
        logs.rename(tmp_path / "away")
        after_rotation(home)  # To no avail: the folder is gone.
        assert gossamer("merge", "now", "--home", home.data_folder).returncode == ExitCode.OK
        process.terminate()
        assert process.wait(WAIT_S_MAX) == ExitCode.OK
    after_rotation(home)  # Nobody holds the home: whoever has that process id now is left alone.
    before, after = events(tmp_path / "away" / "node.log.1"), events(tmp_path / "away" / "node.log")
    assert (before[0], before.count("merged")) == ("node up", 1)
    assert (after[-1], after.count("merged")) == ("node down", 2)


@pytest.mark.timeout(240)
async def test_a_hand_over_changes_no_bit_of_what_is_learned(tmp_path: Path) -> None:
    spec, steps = tmp_path / "run.toml", 400
    spec.write_text(SPEC.format(steps=steps, merges=1))
    weights = []
    whole = home_with_key(tmp_path / "whole")
    parted = home_with_key(tmp_path / "parted", whole.identity_file)
    (port,) = free_ports(1)
    listen = ("--listen", f"/ip4/127.0.0.1/tcp/{port}")

    with running(parted, "--run", spec, *listen) as process:
        await status_when(parted, lambda status: status.step > 30)
        assert await handed_over(parted, process.poll) == {"pid": process.pid, "settled": True}
        assert process.returncode == ExitCode.HANDED_OVER
    with running(parted, *listen):  # Told nothing: it goes on with what the home remembers.
        resumed = await status_when(parted, lambda status: status.phase != "starting")
        assert 30 < resumed.step < steps
        ended = await status_when(parted, lambda status: status.phase == "finished" and status.last_merge)
        weights.append(ended.last_merge.weights_hash)
    with running(whole, "--run", spec, *listen):
        ended = await status_when(whole, lambda status: status.phase == "finished" and status.last_merge)
        weights.append(ended.last_merge.weights_hash)
    assert weights[0] == weights[1]


@pytest.mark.timeout(240)
async def test_who_handed_over_is_the_same_member_to_the_others(tmp_path: Path) -> None:
    async with small_swarm(tmp_path, nodes=2, steps=16_000, merges=64) as (first, second):
        nodes = [first, second]
        before = (await until(nodes, lambda s: merged_alike(s, 1), seconds=60))[1]
        assert (await handed_over(second.home, lambda: second.up))["settled"]
        second.start([first.address])
        (back,) = await until([second], lambda s: s[0].phase == "training", seconds=60)
        assert (back.peer, back.step >= before.step) == (before.peer, True)
        height = (await until(nodes, lambda s: True, seconds=30))[0].last_merge.height
        both = await until(nodes, lambda s: merged_alike(s, height + 1), seconds=90)
        assert before.peer in both[0].last_merge.contributors
        assert all(not status.refusals for status in both)
