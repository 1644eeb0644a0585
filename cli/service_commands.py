"""Commands that hand a node over to systemd: service install, status, uninstall.

Owns the unit's file and what is typed next. Starts nothing that was not asked for, and never touches a home. The text
of the unit is ``cli.systemd_unit``'s.
"""

from __future__ import annotations

import getpass
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cli.common import Common, command
from cli.exit_codes import ExitCode
from cli.systemd_unit import MARK, Unit
from p2p.errors import GossamerError

if TYPE_CHECKING:
    from node.home import Home

BOOTED = Path("/run/systemd/system")
"""There exactly when systemd runs the machine (sd_booted(3))."""
SYSTEM_UNITS = Path("/etc/systemd/system")
STATE_FOLDERS = Path("/var/lib")
HIDDEN_FROM_SERVICES = ("/home/", "/root/", "/run/user/")
"""A unit with a user of its own sees nothing below these."""
SYSTEMCTL_S_MAX = 120.0
SHOWN = ("ActiveState", "SubState", "UnitFileState", "NRestarts", "MainPID", "StatusText")

service_app = typer.Typer(help="Run this node under systemd, across reboots.", no_args_is_help=True)

System = Annotated[
    bool, typer.Option("--system", help="A unit of the machine instead of this user's; needs root.")
]
Name = Annotated[
    str | None, typer.Option("--name", metavar="N", help="One of several: the unit is gossamer-N.")
]


class ServiceError(GossamerError):
    """systemd is not there, or will not do what was asked."""


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.add_typer(service_app, name="service", rich_help_panel="This machine")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a unit lives, and how its manager is spoken to."""

    name: str
    system: bool

    @property
    def folder(self) -> Path:
        if self.system:
            return SYSTEM_UNITS
        base = os.environ.get("XDG_CONFIG_HOME")
        return (Path(base) if base else Path.home() / ".config") / "systemd" / "user"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.service"

    @property
    def manager(self) -> list[str]:
        return ["systemctl"] if self.system else ["systemctl", "--user"]

    def typed(self, *words: str) -> str:
        """A command for a person to type."""
        return shlex.join([*(["sudo"] if self.system and os.geteuid() else []), *self.manager, *words])

    def run(self, *words: str) -> str:
        """What systemctl says. Raises ServiceError."""
        done = subprocess.run(  # noqa: S603 - the machine's own systemctl, our own arguments
            [*self.manager, *words], capture_output=True, text=True, timeout=SYSTEMCTL_S_MAX, check=False
        )
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())
            raise ServiceError(
                f"{shlex.join([*self.manager, *words])} failed: {said or f'exit code {done.returncode}'}",
                why="the service is not in the state that was asked for",
                fix=self.typed("status", self.file.name),
            )
        return done.stdout


@command(service_app, "install")
def install(
    common: Common,
    system: System = False,
    name: Name = None,
    now: Annotated[bool, typer.Option("--now", help="Enable and start it at once as well.")] = False,
) -> None:
    """Write a unit that runs this home's node, and print what to type to start it."""
    place = _place(name, system)
    version = _systemd_version()
    unit = _system_unit(common, place, version) if system else _user_unit(common, place, version)
    home = _home_at(unit)
    _check_startable(home, system=system)
    running = _is_running(home)
    if running and now:
        raise ServiceError(
            f"a node runs in {home.data_folder} already",
            why="two on one home would speak with one key",
            fix=f"stop it first: {_with_home('gossamer stop', home)}",
        )
    _write(place, unit.text())
    start = [["daemon-reload"], ["enable", "--now", unit.file_name]]
    linger = None if system else f"loginctl enable-linger {shlex.quote(getpass.getuser())}"
    if now:
        for words in start:
            place.run(*words)
    next_commands = [] if now else [place.typed(*words) for words in start]
    if running:
        next_commands.insert(0, _with_home("gossamer stop", home))
    lines = [f"wrote     {place.file}", f"home      {home.data_folder}"]
    lines += [f"started   {unit.file_name}"] if now else []
    lines += [f"{'next' if number == 0 else '':<9} {text}" for number, text in enumerate(next_commands)]
    if linger:
        lines.append(f"also      {linger}    or it ends when you log out")
    journal = shlex.join(["journalctl", *([] if system else ["--user"]), "-fu", unit.name])
    lines.append(f"then      gossamer service status{_flags(system, name)}    {journal}")
    if ignored := sorted(key for key in os.environ if key.startswith("GOSSAMER_") and key != "GOSSAMER_HOME"):
        lines.append(f"note      not in the unit: {', '.join(ignored)}; write them to {home.config_file}")
    result = {
        "file": str(place.file),
        "unit": unit.file_name,
        "home": str(home.data_folder),
        "started": now,
        "next": [*next_commands, *([linger] if linger else [])],
    }
    common.print(result, escape("\n".join(lines)))


@command(service_app, "status")
def status(common: Common, system: System = False, name: Name = None) -> None:
    """Whether the unit is installed and active, and what the node says; exit code 4 when it is not active."""
    place = _place(name, system)
    _systemd_version()
    shown = dict.fromkeys(SHOWN, "")
    if place.file.exists():
        said = place.run("show", place.file.name, f"--property={','.join(SHOWN)}")
        shown |= dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    active = shown["ActiveState"] == "active"
    result = {
        "unit": place.file.name,
        "file": str(place.file),
        "installed": place.file.exists(),
        "active": active,
        "state": shown["ActiveState"],
        "enabled": shown["UnitFileState"] == "enabled",
        "restarts": int(shown["NRestarts"] or 0),
        "pid": int(shown["MainPID"] or 0) or None,
        "says": shown["StatusText"] if active else "",
    }
    if not place.file.exists():
        lines = [
            f"service   {place.file.name} is not installed",
            f"next      gossamer service install{_flags(system, name)}",
        ]
    else:
        enabled = "starts with the machine" if result["enabled"] else "not enabled"
        lines = [
            f"service   {place.file.name}  {shown['ActiveState']} ({shown['SubState']})  {enabled}"
            f"  restarted {result['restarts']} times",
        ]
        if active:
            lines.append(f"says      {shown['StatusText'] or '-'}")
        else:
            lines.append(f"next      {place.typed('start', place.file.name)}")
    common.print(result, escape("\n".join(lines)))
    if not active:
        raise typer.Exit(ExitCode.NO_DAEMON)


@command(service_app, "uninstall")
def uninstall(common: Common, system: System = False, name: Name = None) -> None:
    """Stop the service, and remove its unit. The home, with key and checkpoints, stays."""
    place = _place(name, system)
    _systemd_version()
    if not place.file.exists():
        raise ServiceError(
            f"{place.file} is not there",
            why="there is nothing to remove",
            fix=f"name the one you mean: --name N, --system    see which there are: {place.typed('list-unit-files')}",
        )
    _check_ours(place)
    place.run("disable", "--now", place.file.name)
    place.file.unlink()
    place.run("daemon-reload")
    common.print({"removed": str(place.file)}, escape(f"stopped and removed  {place.file}"))


def _place(name: str | None, system: bool) -> _Place:
    if name is None:
        return _Place("gossamer", system)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
        raise typer.BadParameter(f"{name!r} is no name for a unit; write letters, digits and hyphens")
    return _Place(f"gossamer-{name}", system)


def _systemd_version() -> int:
    """Raises ServiceError where systemd does not run."""
    found = shutil.which("systemctl")
    if found is None or not BOOTED.is_dir():
        raise ServiceError(
            "systemd does not run this machine",
            why="a service is a unit of systemd; in containers and on macOS there is none",
            fix="have what does run it start: gossamer run    for containers there is a Dockerfile",
        )
    said = subprocess.run(  # noqa: S603 - the machine's own systemctl
        [found, "--version"], capture_output=True, text=True, timeout=SYSTEMCTL_S_MAX, check=False
    )
    version = re.match(r"systemd (\d+)", said.stdout)
    return int(version[1]) if version else 0


def _command(home: Path | None) -> list[str]:
    return [sys.executable, "-P", "-m", "cli", "run", *([] if home is None else ["--home", str(home)])]


def _user_unit(common: Common, place: _Place, version: int) -> Unit:
    named = common.home_path is not None or bool(os.environ.get("GOSSAMER_HOME"))
    folders = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
    return Unit(
        name=place.name,
        command=_command(common.home.data_folder if named else None),
        home=common.home.data_folder,
        environment={} if named else {key: os.environ[key] for key in folders if os.environ.get(key)},
        systemd_version=version,
    )


def _system_unit(common: Common, place: _Place, version: int) -> Unit:
    if os.geteuid():
        raise ServiceError(
            "only root can install a unit of the system",
            why=f"it is a file in {SYSTEM_UNITS}",
            fix=f"sudo {shlex.join(sys.argv)}    or a unit of your own: gossamer service install",
        )
    if common.home_path is None and not os.environ.get("GOSSAMER_HOME"):
        _check_visible_to_services()
        home = STATE_FOLDERS / place.name
        return Unit(
            name=place.name,
            command=_command(home),
            home=home,
            system=True,
            state_folder=True,
            systemd_version=version,
        )
    home = common.home.data_folder
    try:
        owner = home.stat().st_uid
    except OSError as error:
        raise ServiceError(
            f"cannot look at {home}: {error.strerror}",
            why="a service runs as the owner of its home",
            fix=f"{_with_home('gossamer init', common.home)}    as the user that is to run it",
        ) from error
    if owner == 0:
        raise ServiceError(
            f"{home} belongs to root",
            why="a service runs as the owner of its home, and a node that talks to strangers must not be root",
            fix=f"chown -R SOMEBODY {shlex.quote(str(home))}    or leave --home out: systemd then makes a user for it",
        )
    return Unit(
        name=place.name,
        command=_command(home),
        home=home,
        system=True,
        user=pwd.getpwuid(owner).pw_name,
        systemd_version=version,
    )


def _check_visible_to_services() -> None:
    """A program in somebody's home cannot be run by a user that may not look into it."""
    import cli

    for path in (sys.executable, os.path.realpath(sys.executable), os.path.realpath(cli.__path__[0])):
        if path.startswith(HIDDEN_FROM_SERVICES):
            raise ServiceError(
                f"a system service cannot run {path}",
                why="it gets a user of its own, who sees no home folders",
                fix="install gossamer outside of them, for example: python3 -m venv /opt/gossamer"
                "    or name a home that one of your users owns: --home PATH",
            )


def _home_at(unit: Unit) -> Home:
    from node.home import Home

    if "--home" in unit.command:
        return Home.at(unit.home)
    return Home.locate(None, os.environ)


def _check_startable(home: Home, *, system: bool) -> None:
    """A unit that fails at every start is no use to anybody."""
    from p2p.identity import Identity

    Identity.load(home.identity_file)
    if home.remembered_run() is None:
        sudo = "sudo " if system and os.geteuid() else ""
        raise ServiceError(
            f"the home {home.data_folder} takes part in no run yet",
            why="a service goes on with the last run of its home, with the settings in config.toml",
            fix=f"{sudo}{_with_home('gossamer join', home)} 'INVITE'    then Ctrl-C once it trains, and install again",
        )


def _is_running(home: Home) -> bool:
    from node.control import NoDaemon, call

    try:
        call(home.control_socket, "status")
    except NoDaemon:
        return False
    return True


def _write(place: _Place, text: str) -> None:
    if place.file.exists():
        _check_ours(place)
    place.folder.mkdir(parents=True, exist_ok=True)
    partial = place.file.with_suffix(".partial")
    partial.write_text(text)
    partial.chmod(0o644)
    partial.replace(place.file)


def _check_ours(place: _Place) -> None:
    if not place.file.read_text(errors="replace").startswith(MARK):
        raise ServiceError(
            f"{place.file} was not written by gossamer",
            why="somebody's own unit is not overwritten or removed",
            fix="move it away, or choose another name: --name N",
        )


def _with_home(words: str, home: Home) -> str:
    from node.home import Home

    default = Home.locate(None, {}).data_folder
    return words if home.data_folder == default else f"{words} --home {shlex.quote(str(home.data_folder))}"


def _flags(system: bool, name: str | None) -> str:
    return (" --system" if system else "") + ("" if name is None else f" --name {name}")
