"""What a service manager is told of the daemon: that it is up, what it does, and that its event loop turns.

Owns the datagrams of systemd's notification protocol (sd_notify(3)) and their rhythm. Who was started by no manager
says nothing. Whether the daemon gets ahead is for ``gossamer status`` to tell: a watchdog that judged it would kill
nodes that wait for a merge.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping

import trio

TELL_EVERY_S = 5.0
STATUS_CHARS_MAX = 200


class ServiceManager:
    """The manager named in an environment, if there is one."""

    def __init__(self, environ: Mapping[str, str], *, pid: int) -> None:
        """Reads NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID; a watchdog of another process is none."""
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path if path.startswith("/") else ""
        watched = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
        interval = environ.get("WATCHDOG_USEC", "")
        self._watchdog_s = int(interval) / 1e6 if watched and interval.isdecimal() and int(interval) else None

    async def keep_told(self, status: Callable[[], str]) -> None:
        """Say that the daemon is up, and from then on what it does and that it lives, until cancelled."""
        if not self._address:
            return
        self._tell("READY=1")
        # Twice within the time that the manager allows, as it asks for.
        pause_s = min(TELL_EVERY_S, self._watchdog_s / 2 if self._watchdog_s else TELL_EVERY_S)
        while True:
            self._tell("WATCHDOG=1", f"STATUS={' '.join(status().split())[:STATUS_CHARS_MAX]}")
            await trio.sleep(pause_s)

    def _tell(self, *words: str) -> None:
        with (
            contextlib.suppress(OSError),  # A manager that is gone, or does not read, must not take us along.
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)
            sock.sendto("\n".join(words).encode(), self._address)
