"""Homes: where the files are, that they are private, and that one home runs one daemon."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from node.home import SOCKET_PATH_BYTES_MAX, AlreadyRunning, Home
from p2p.errors import GossamerError


def test_one_folder_holds_everything_when_named(tmp_path: Path) -> None:
    home = Home.locate(tmp_path / "flag", {"GOSSAMER_HOME": str(tmp_path / "environment")})
    assert home.identity_file == tmp_path / "flag" / "identity.key"
    assert home.config_file.parent == home.lock_file.parent == tmp_path / "flag"
    assert Home.locate(None, {"GOSSAMER_HOME": str(tmp_path)}).config_file == tmp_path / "config.toml"


def test_the_platform_decides_when_nothing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CONFIG", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    home = Home.locate(None, {"XDG_RUNTIME_DIR": str(tmp_path / "run")})
    assert home.config_file == tmp_path / "CONFIG" / "gossamer" / "config.toml"
    assert home.identity_file == tmp_path / "DATA" / "gossamer" / "identity.key"
    assert home.lock_file == tmp_path / "STATE" / "gossamer" / "node.lock"
    assert home.control_socket == tmp_path / "run" / "gossamer" / "control.sock"


def test_folders_are_private(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    home.create()
    for folder in (home.data_folder, home.runs_folder, home.logs_folder):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_long_path_gets_a_short_socket_of_its_own(tmp_path: Path) -> None:
    deep = Home.at(tmp_path / ("d" * 90)), Home.at(tmp_path / ("e" * 90))
    sockets = [home.control_socket for home in deep]
    assert all(len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX for path in sockets)
    assert sockets[0] != sockets[1]


def test_a_home_that_cannot_be_made_is_an_error_to_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GossamerError, match="cannot create") as caught:
        Home.at(tmp_path / "file" / "home").create()
    assert "--home" in caught.value.fix


def test_a_second_daemon_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    program = (
        "import sys; from pathlib import Path; from node.home import Home\n"
        f"with Home.at(Path({str(tmp_path)!r})).lock():\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AlreadyRunning, match=f"process {holder.pid}"), home.lock():
            pass
        holder.kill()
        holder.wait()
        with home.lock():
            assert home.lock_file.read_text() == f"{os.getpid()}\n"


def test_the_last_run_is_remembered(tmp_path: Path) -> None:
    home = Home.at(tmp_path)
    assert home.remembered_run() is None
    home.remember_run(bytes(range(32)))
    assert home.remembered_run() == bytes(range(32))
    (home.runs_folder / "current").write_text("torn")
    assert home.remembered_run() is None
