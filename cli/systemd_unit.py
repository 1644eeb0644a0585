"""The systemd unit of one node: its text, from what is decided about it. Pure; touches neither disk nor systemd.

Owns every directive and the reason for it. Two kinds: a unit of a user's own manager, which can only be hardened by
what needs no privilege, and a unit of the system, which can write to one home and to nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli.exit_codes import ExitCode
from p2p.errors import GossamerError

MARK = "# Written by gossamer service install"
BACK_OFF_SINCE = 254
"""The first version of systemd that can wait longer after each failure."""
STOP_S_MAX = 30
"""A node promises to be gone ten seconds after SIGTERM; a machine that swaps may take longer."""
START_S_MAX = 30 * 60
"""A one-byte run's base weights may have to be fetched before a node is up."""
WATCHDOG_S = 120

HARDENING = (
    "NoNewPrivileges=yes",
    "LockPersonality=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallErrorNumber=EPERM",
    "UMask=0077",
    "# A core dump would hold the key.",
    "LimitCORE=0",
)
SYSTEM_HARDENING = (
    "CapabilityBoundingSet=",
    "ProtectSystem=strict",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectProc=invisible",
    "PrivateTmp=yes",
    "PrivateMounts=yes",
    "RemoveIPC=yes",
    "KeyringMode=private",
    "# Left out on purpose: PrivateDevices= and ProtectClock= hide accelerators, and",
    "# MemoryDenyWriteExecute= keeps torch from compiling its kernels.",
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is decided about a unit. ``state_folder``: its home is the one that systemd makes and hands to a user that
    exists only while it runs; else ``user`` is whom a system unit runs as."""

    name: str
    command: Sequence[str]
    home: Path
    system: bool = False
    user: str | None = None
    state_folder: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    systemd_version: int

    @property
    def file_name(self) -> str:
        """What systemd calls it."""
        return f"{self.name}.service"

    def text(self) -> str:
        """The unit file. Raises GossamerError for a path that no unit can hold."""
        return "\n".join([*self._unit(), "", *self._service(), "", *self._install(), ""])

    def _unit(self) -> list[str]:
        manager = "systemctl" if self.system else "systemctl --user"
        network = ["Wants=network-online.target", "After=network-online.target"] if self.system else []
        return [
            f"{MARK}, which writes it anew; your own changes: {manager} edit {self.file_name}",
            "[Unit]",
            f"Description=Gossamer node in {_specifiers(str(self.home))}",
            *network,
            "# However often it fails, it is tried again.",
            "StartLimitIntervalSec=0",
        ]

    def _service(self) -> list[str]:
        handed_over = int(ExitCode.HANDED_OVER)
        return [
            "[Service]",
            "Type=notify",
            *(f"Environment={_quoted(f'{key}={value}')}" for key, value in sorted(self.environment.items())),
            f"ExecStart={' '.join(_quoted(word).replace('$', '$$') for word in self.command)}",
            "# The log file is opened anew.",
            "ExecReload=/bin/kill -HUP $MAINPID",
            f"TimeoutStartSec={START_S_MAX}",
            f"WatchdogSec={WATCHDOG_S}",
            "",
            "# Whatever ends it, it goes on from its last checkpoint; but for what only a person can mend.",
            "Restart=on-failure",
            "RestartSec=5",
            *(["RestartSteps=6", "RestartMaxDelaySec=300"] if self.systemd_version >= BACK_OFF_SINCE else []),
            f"RestartPreventExitStatus={int(ExitCode.USAGE)} {int(ExitCode.CONFIG)}",
            "# gossamer stop --hand-over: the version that is installed by then goes on.",
            f"SuccessExitStatus={handed_over}",
            f"RestartForceExitStatus={handed_over}",
            "",
            "# SIGTERM: checkpoint, goodbye, exit.",
            "KillMode=mixed",
            f"TimeoutStopSec={STOP_S_MAX}",
            "",
            *HARDENING,
            *(self._system_service() if self.system else []),
        ]

    def _system_service(self) -> list[str]:
        if self.state_folder:
            whose = [
                "DynamicUser=yes",
                f"StateDirectory={self.name}",
                "StateDirectoryMode=0700",
                "ProtectHome=yes",
            ]
        else:
            assert self.user is not None
            whose = [
                f"User={self.user}",
                f"ReadWritePaths={_quoted(str(self.home))}",
                "ProtectHome=read-only",
            ]
        return [*whose, *SYSTEM_HARDENING]

    def _install(self) -> list[str]:
        return ["[Install]", f"WantedBy={'multi-user.target' if self.system else 'default.target'}"]


def _quoted(word: str) -> str:
    """``word`` as one word of a unit file, specifiers included."""
    if _CONTROL.search(word):
        raise GossamerError(
            f"{word!r} cannot be written into a unit file",
            why="a unit file is made of lines, and this holds control characters",
            fix="name a folder without them: --home PATH",
        )
    escaped = _specifiers(word).replace("\\", "\\\\").replace('"', '\\"')
    return escaped if re.fullmatch(r"[\w@%+=:,./-]+", word) else f'"{escaped}"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")
