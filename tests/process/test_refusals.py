"""What a real daemon does with a home, key, port, spec or checkpoint that is not right: it says so and exits."""

import socket
import subprocess
from pathlib import Path

import pytest

from cli.exit_codes import ExitCode
from node.home import Home
from tests.process.swarm import SPEC, gossamer, small_swarm, until

pytestmark = pytest.mark.process


@pytest.fixture
def home(tmp_path: Path) -> Home:
    assert gossamer("init", "--home", tmp_path / "home").returncode == ExitCode.OK
    return Home.at(tmp_path / "home")


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(SPEC.format(steps=100, merges=1))
    return path


def refused(ran: subprocess.CompletedProcess[str], code: ExitCode, *words: str) -> None:
    """The command ended with ``code``, said ``words`` and what to do, and showed no traceback."""
    assert ran.returncode == code, ran.stderr
    for word in words:
        assert word in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_key_that_others_can_read(home: Home, spec_file: Path) -> None:
    home.identity_file.chmod(0o644)
    refused(gossamer("run", "--home", home.data_folder, "--run", spec_file), ExitCode.CONFIG, "chmod 600")


def test_a_port_that_is_taken(home: Home, spec_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        ran = gossamer("run", "--home", home.data_folder, "--run", spec_file, "--listen", address)
    refused(ran, ExitCode.TAKEN, address.rsplit("/", 1)[1])


def test_a_port_for_metrics_that_is_taken(home: Home, spec_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        plan = ["--run", spec_file, "--listen", "/ip4/127.0.0.1/tcp/0", "--metrics-listen", address]
        ran = gossamer("run", "--home", home.data_folder, *plan)
    refused(ran, ExitCode.TAKEN, address.rpartition(":")[2], "metrics")


def test_a_spec_with_a_misspelt_key(home: Home, spec_file: Path) -> None:
    spec_file.write_text(spec_file.read_text().replace("width", "widht"))
    refused(
        gossamer("run", "--home", home.data_folder, "--run", spec_file), ExitCode.CONFIG, "widht", "width"
    )


def test_a_data_folder_with_nothing_in_it(home: Home, spec_file: Path, tmp_path: Path) -> None:
    spec_file.write_text(spec_file.read_text().replace("[data]", '[data]\nsource = "text"'))
    (tmp_path / "empty").mkdir()
    ran = gossamer("run", "--home", home.data_folder, "--run", spec_file, "--data", tmp_path / "empty")
    refused(ran, ExitCode.CONFIG, "no text")


def test_no_run_at_all(home: Home) -> None:
    ran = gossamer("run", "--home", home.data_folder, "--listen", "/ip4/127.0.0.1/tcp/0")
    assert ran.returncode in (ExitCode.FAILED, ExitCode.USAGE)
    assert "gossamer join" in ran.stderr


@pytest.mark.timeout(180)
async def test_a_second_daemon_and_a_damaged_checkpoint(tmp_path: Path) -> None:
    # A merge leaves a checkpoint, even one with nobody else: here they come faster than by the clock.
    async with small_swarm(tmp_path, nodes=1, steps=19200, merges=192) as [node]:
        home = node.home
        first = (await until([node], lambda s: s[0].checkpoint_step > 0, seconds=60))[0]
        second = (await until([node], lambda s: s[0].checkpoint_step > first.checkpoint_step, seconds=60))[0]

        ran = gossamer("run", "--home", home.data_folder, "--run", tmp_path / "run.toml")
        refused(ran, ExitCode.TAKEN, "already running", "gossamer stop")

        node.kill()
        newest = max((home.run_folder(bytes.fromhex(second.run_id)) / "checkpoints").glob("*.safetensors"))
        newest.write_bytes(newest.read_bytes()[:-100])
        node.start([])
        back = (await until([node], lambda s: s[0].step > 0, seconds=60))[0]
        assert back.peer == first.peer
        # The damaged generation is passed over; the one before it is not the beginning.
        assert first.checkpoint_step <= back.step < second.checkpoint_step + 2000
        assert "damaged" in node.log_file.read_text()
