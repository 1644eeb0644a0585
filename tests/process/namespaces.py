"""A local network of its own for a test: network namespaces on one switch, and real nodes and programs inside.

Namespaces need root on Linux; where they are not to be had, tests are skipped and say so.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.node_commands import prepare_home
from node.control import ask
from node.home import Home
from node.status import NodeStatus
from p2p.errors import GossamerError


def ip(*arguments: str) -> None:
    """The command of that name."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)


@contextmanager
def local_network(count: int) -> Iterator[list[str]]:
    """The names of ``count`` namespaces on one network, the k-th at 10.77.0.k; they are gone after the block."""
    switch = f"gs{os.getpid()}"
    names = [f"{switch}-{number}" for number in range(1, count + 1)]
    with contextlib.ExitStack() as undo:
        try:
            ip("netns", "add", switch)
            undo.callback(ip, "netns", "del", switch)
            ip("-n", switch, "link", "add", "switch", "type", "bridge", "mcast_snooping", "0")
            ip("-n", switch, "link", "set", "switch", "up")
            for number, name in enumerate(names, start=1):
                ip("netns", "add", name)
                undo.callback(ip, "netns", "del", name)
                ip(
                    "-n",
                    switch,
                    "link",
                    "add",
                    f"port{number}",
                    "type",
                    "veth",
                    "peer",
                    "eth0",
                    "netns",
                    name,
                )
                ip("-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
                ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "eth0", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            pytest.skip(f"network namespaces are not to be had here: {reason}")
        yield names


@contextmanager
def inside(namespace: str, command: Sequence[str], log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``command`` of this Python in a namespace; killed after the block."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GOSSAMER_")}
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, "-P", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class NodeInside:
    """A home, and the ``gossamer run`` that lives in it, in a namespace; for ``until`` like a NodeProcess."""

    def __init__(self, folder: Path, name: str, namespace: str) -> None:
        self.name = name
        self.home = Home.at(folder / name)
        self.peer = prepare_home(self.home)[0]
        self.status: NodeStatus | None = None
        self._namespace = namespace
        self._log_file = self.home.logs_folder / "node.log"
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self, *options: str) -> Iterator[None]:
        """``gossamer run`` with ``options`` for the length of the block."""
        command = ["-m", "cli", "run", "--home", str(self.home.data_folder), "--threads", "1", *options]
        with inside(self._namespace, command, self._log_file) as self._process:
            yield

    @property
    def up(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def state(self) -> str:
        """Its phase; ``starting`` before it has answered."""
        return "starting" if self.status is None else self.status.phase

    async def look(self) -> None:
        """Ask it for its status: a unix socket knows no network namespaces."""
        with contextlib.suppress(GossamerError):
            self.status = await ask(self.home.control_socket, "status", result_type=NodeStatus, timeout_s=10)

    def last_words(self) -> str:
        """The end of its log."""
        return " / ".join(self._log_file.read_text(errors="replace").splitlines()[-5:])
