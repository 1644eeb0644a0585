"""``gossamer service``: what the unit says, what systemd thinks of it, and that nothing happens unasked."""

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from cli import service_commands
from cli.exit_codes import ExitCode
from cli.systemd_unit import Unit
from node.home import Home
from node.node import STOP_TIMEOUT_S
from tests.cli.fake_node import FakeNode

Gossamer = Any

SYSTEMCTL = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
    --version) echo "systemd {version} (made up)" ;;
    *show*) cat {state}; printf '%s\\n' SubState=running UnitFileState=enabled NRestarts=3 MainPID=42 StatusText=a=b ;;
    *enable*) {enable} ;;
esac
"""


class Systemd:
    """A machine that systemd runs, or so it seems; remembers what was asked of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self.units = folder / "units"
        self.user_units = folder / "config" / "systemd" / "user"
        (folder / "bin").mkdir(parents=True)
        (folder / "log").touch()
        (folder / "state").write_text("ActiveState=active\n")
        self.install()
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        monkeypatch.setattr(service_commands, "BOOTED", folder)
        monkeypatch.setattr(service_commands, "SYSTEM_UNITS", self.units)
        monkeypatch.setattr(service_commands, "STATE_FOLDERS", folder / "lib")

    def install(self, *, version: int = 252, enable: str = "true") -> None:
        """A systemctl that answers like this."""
        program = self._folder / "bin" / "systemctl"
        program.write_text(
            SYSTEMCTL.format(
                log=self._folder / "log", state=self._folder / "state", version=version, enable=enable
            )
        )
        program.chmod(0o755)

    def asked(self) -> list[str]:
        """What it was told to do, in order; looking does not count."""
        lines = (self._folder / "log").read_text().splitlines()
        return [line for line in lines if "--version" not in line and "show" not in line]

    def fails(self) -> None:
        """From now on the unit is dead."""
        (self._folder / "state").write_text("ActiveState=failed\n")


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    return Systemd(tmp_path / "machine", monkeypatch)


@pytest.fixture
def ready(home: Home, gossamer: Gossamer) -> Home:
    """A home with a key, that takes part in a run."""
    assert gossamer("init").code == ExitCode.OK
    home.remember_run(bytes(32))
    return home


def directives(text: str) -> dict[str, list[str]]:
    """What a unit file says, by key; comments and sections left out."""
    found = defaultdict(list)
    for line in text.splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


def command_of(text: str) -> list[str]:
    """The words that systemd would start, as its own quoting has it."""
    (line,) = directives(text)["ExecStart"]
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(line)]


def test_a_unit_is_written_and_nothing_is_started(gossamer: Gossamer, systemd: Systemd, ready: Home) -> None:
    told = gossamer("service", "install")
    assert told.code == ExitCode.OK, told.err
    file = systemd.user_units / "gossamer.service"
    unit = directives(file.read_text())
    assert command_of(file.read_text()) == [
        *(sys.executable, "-P", "-m", "cli", "run", "--home"),
        str(ready.data_folder),
    ]
    assert (unit["Type"], unit["Restart"], unit["WantedBy"]) == (
        ["notify"],
        ["on-failure"],
        ["default.target"],
    )
    assert int(unit["TimeoutStopSec"][0]) >= 3 * STOP_TIMEOUT_S
    assert unit["RestartForceExitStatus"] == [str(int(ExitCode.HANDED_OVER))]
    for line in (
        "systemctl --user daemon-reload",
        "systemctl --user enable --now gossamer.service",
        "loginctl enable-linger",
        "journalctl --user -fu gossamer",
    ):
        assert line in told.out
    assert systemd.asked() == []


def test_now_starts_it_and_a_second_install_writes_it_anew(
    gossamer: Gossamer, systemd: Systemd, ready: Home
) -> None:
    for _ in range(2):
        told = json.loads(gossamer("service", "install", "--now", "--name", "two", "--json").out)
        assert (told["unit"], told["started"]) == ("gossamer-two.service", True)
    start = ["--user daemon-reload", "--user enable --now gossamer-two.service"]
    assert systemd.asked() == 2 * start


def test_what_systemd_refuses_is_told_in_its_words(gossamer: Gossamer, systemd: Systemd, ready: Home) -> None:
    systemd.install(enable="echo Failed to connect to bus >&2; exit 1")
    told = gossamer("service", "install", "--now")
    assert told.code == ExitCode.FAILED
    assert "Failed to connect to bus" in told.err


@pytest.mark.parametrize(("version", "steps"), [(252, []), (254, ["6"])])
def test_it_backs_off_where_systemd_can(
    gossamer: Gossamer, systemd: Systemd, ready: Home, version: int, steps: list[str]
) -> None:
    systemd.install(version=version)
    gossamer("service", "install")
    unit = directives((systemd.user_units / "gossamer.service").read_text())
    assert (unit["RestartSec"], unit["RestartSteps"], unit["StartLimitIntervalSec"]) == (["5"], steps, ["0"])


def test_settings_of_this_shell_are_named_as_left_out(
    gossamer: Gossamer, systemd: Systemd, ready: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOSSAMER_DEVICE", "cpu")
    assert "GOSSAMER_DEVICE; write them to" in gossamer("service", "install").out
    assert "GOSSAMER_DEVICE" not in (systemd.user_units / "gossamer.service").read_text()


def test_a_home_in_the_platforms_folders_takes_them_along(
    gossamer: Gossamer, systemd: Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOSSAMER_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "my data"))
    gossamer("init")
    Home.locate(None, os.environ).remember_run(bytes(32))
    assert gossamer("service", "install").code == ExitCode.OK
    text = (systemd.user_units / "gossamer.service").read_text()
    assert "--home" not in text
    assert f'Environment="XDG_DATA_HOME={tmp_path}/my data"' in text


def test_a_home_that_could_not_start_is_refused_with_the_cure(
    gossamer: Gossamer, systemd: Systemd, home: Home
) -> None:
    told = gossamer("service", "install")
    assert (told.code, "gossamer init" in told.err) == (ExitCode.CONFIG, True)
    gossamer("init")
    told = gossamer("service", "install")
    assert (told.code, "gossamer join" in told.err) == (ExitCode.FAILED, True)
    assert not systemd.user_units.exists()


def test_a_node_that_runs_is_stopped_first(
    gossamer: Gossamer, systemd: Systemd, ready: Home, node: FakeNode
) -> None:
    assert "gossamer stop --home" in gossamer("service", "install").out
    told = gossamer("service", "install", "--now")
    assert (told.code, "gossamer stop" in told.err) == (ExitCode.FAILED, True)
    assert systemd.asked() == []


def test_no_systemd_no_service(gossamer: Gossamer, ready: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_commands, "BOOTED", Path("/nowhere"))
    for verb in ("install", "status", "uninstall"):
        told = gossamer("service", verb)
        assert (told.code, "systemd does not run this machine" in told.err) == (ExitCode.FAILED, True)
        assert "gossamer run" in told.err


def test_status_and_uninstall(gossamer: Gossamer, systemd: Systemd, ready: Home) -> None:
    absent = gossamer("service", "status")
    assert (absent.code, "gossamer service install" in absent.out) == (ExitCode.NO_DAEMON, True)
    gossamer("service", "install")
    shown = json.loads(gossamer("service", "status", "--json").out)
    assert (shown["active"], shown["restarts"], shown["pid"], shown["says"]) == (True, 3, 42, "a=b")
    systemd.fails()
    dead = gossamer("service", "status")
    assert (dead.code, "systemctl --user start gossamer.service" in dead.out) == (ExitCode.NO_DAEMON, True)
    assert gossamer("service", "uninstall").code == ExitCode.OK
    assert systemd.asked() == ["--user disable --now gossamer.service", "--user daemon-reload"]
    assert list(systemd.user_units.iterdir()) == []
    assert ready.identity_file.exists()
    assert gossamer("service", "uninstall").code == ExitCode.FAILED


def test_somebody_elses_unit_is_left_alone(gossamer: Gossamer, systemd: Systemd, ready: Home) -> None:
    systemd.user_units.mkdir(parents=True)
    file = systemd.user_units / "gossamer.service"
    file.write_text("[Service]\nExecStart=/bin/true\n")
    for verb in ("install", "uninstall"):
        assert "was not written by gossamer" in gossamer("service", verb).err
    assert "ExecStart=/bin/true" in file.read_text()
    assert systemd.asked() == []


def test_a_name_that_is_no_name(gossamer: Gossamer, systemd: Systemd, ready: Home) -> None:
    assert gossamer("service", "install", "--name", "../ssh").code == ExitCode.USAGE


class TestSystemUnits:
    """Units of the machine, which only root may install."""

    @pytest.fixture(autouse=True)
    def root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def test_only_root(self, gossamer: Gossamer, systemd: Systemd, ready: Home, monkeypatch: Any) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert "sudo" in gossamer("service", "install", "--system").err

    def test_a_user_of_its_own_that_sees_one_home(
        self, gossamer: Gossamer, systemd: Systemd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("GOSSAMER_HOME", raising=False)
        monkeypatch.setattr(service_commands, "HIDDEN_FROM_SERVICES", ("/nowhere/",))
        state = tmp_path / "machine" / "lib" / "gossamer"
        assert "gossamer init" in gossamer("service", "install", "--system").err
        gossamer("init", "--home", str(state))
        Home.at(state).remember_run(bytes(32))
        told = gossamer("service", "install", "--system")
        assert told.code == ExitCode.OK, told.err
        assert "systemctl enable --now gossamer.service" in told.out
        assert "linger" not in told.out
        unit = directives((systemd.units / "gossamer.service").read_text())
        assert (unit["DynamicUser"], unit["StateDirectory"]) == (["yes"], ["gossamer"])
        assert (unit["ProtectSystem"], unit["ProtectHome"]) == (["strict"], ["yes"])
        assert unit["WantedBy"] == ["multi-user.target"]
        assert command_of((systemd.units / "gossamer.service").read_text())[-1] == str(state)

    def test_a_program_that_it_could_not_see(
        self, gossamer: Gossamer, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("GOSSAMER_HOME", raising=False)
        monkeypatch.setattr(
            service_commands, "HIDDEN_FROM_SERVICES", (os.path.dirname(sys.executable) + "/",)
        )
        told = gossamer("service", "install", "--system")
        assert (told.code, "/opt/gossamer" in told.err) == (ExitCode.FAILED, True)

    def test_a_named_home_is_run_by_its_owner_who_is_not_root(
        self, gossamer: Gossamer, systemd: Systemd, ready: Home, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nobody = pwd.getpwnam("nobody")
        monkeypatch.setattr(Path, "stat", owned_by(ready.data_folder, 0))
        assert "belongs to root" in gossamer("service", "install", "--system").err
        monkeypatch.setattr(Path, "stat", owned_by(ready.data_folder, nobody.pw_uid))
        assert gossamer("service", "install", "--system").code == ExitCode.OK
        unit = directives((systemd.units / "gossamer.service").read_text())
        assert (unit["User"], unit["DynamicUser"]) == (["nobody"], [])
        assert unit["ReadWritePaths"] == [str(ready.data_folder)]


def owned_by(folder: Path, owner: int) -> Any:
    """``Path.stat``, for which ``folder`` belongs to ``owner``."""
    real = Path.stat

    def stat(self: Path, **options: bool) -> os.stat_result:
        found = real(self, **options)
        return os.stat_result((*found[:4], owner, *found[5:10])) if self == folder else found

    return stat


needs_checker = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd's own checker is not here"
)
ODD = Path('/srv/a "quoted" 50% $HOME \\ home')


@pytest.mark.parametrize("system", [False, True])
def test_odd_paths_reach_the_program_as_they_are(system: bool) -> None:
    unit = Unit(
        name="gossamer",
        command=["/usr/bin/env", "--home", str(ODD)],
        home=ODD,
        system=system,
        user="nobody",
        systemd_version=252,
    )
    assert command_of(unit.text()) == ["/usr/bin/env", "--home", str(ODD)]


@needs_checker
@pytest.mark.parametrize("kind", ["user", "dynamic", "owner"])
def test_systemd_itself_finds_nothing_wrong(tmp_path: Path, kind: str) -> None:
    unit = Unit(
        name="gossamer",
        command=[sys.executable, "-P", "-m", "cli", "run", "--home", "/srv/a home"],
        home=Path("/srv/a home"),
        system=kind != "user",
        user="daemon" if kind == "owner" else None,
        state_folder=kind == "dynamic",
        environment={"XDG_DATA_HOME": "/srv/data"},
        systemd_version=252,
    )
    file = tmp_path / unit.file_name
    file.write_text(unit.text())
    checked = subprocess.run(
        ["systemd-analyze", *(["--user"] if kind == "user" else []), "verify", "--man=no", file],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        check=False,
    )
    about_ours = [line for line in checked.stderr.splitlines() if "gossamer" in line]
    assert about_ours == []


@needs_checker
def test_the_checker_that_is_trusted_above_does_see_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "gossamer.service"
    file.write_text("[Service]\nExecStart=/bin/true\nNoNewPrivilege=yes\n")
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True, check=False
    )
    assert re.search("gossamer.service:3: Unknown key.*'NoNewPrivilege'", checked.stderr)
