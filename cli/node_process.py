"""NodeProcess: one ordinary ``gossamer run`` on this machine, as the parent process that started it sees it.

Owns the process from start to end, the home it lives in and the log it writes. What is known about the node comes from
its control socket alone. A node whose parent dies, however it dies, ends: ``--parent`` sees to it.

Relies on: the home and the port staying the same from life to life, so that others find a restarted node again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.live_view import NodeRow
from cli.node_commands import prepare_home
from node.control import Params, ask
from node.home import Home
from node.status import NodeStatus
from p2p.errors import GossamerError

STATUS_TIMEOUT_S = 10.0
WORK_S_MAX = 300.0
"""Evaluating, sampling or exporting, however busy the machine is."""
LOG_LINES_SHOWN = 3


class NodeProcess:
    """One ``gossamer run`` process and its home; can be killed and started again under the same identity."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        port: int,
        part: str,
        spec_file: Path,
        alone: bool,
        base: Path | None = None,
    ) -> None:
        """``base``: where what the run starts from lies."""
        self.name = name
        self.part = part
        self.alone = alone
        self.home = Home.at(folder / name)
        self.log_file = self.home.logs_folder / "node.log"
        self.starts = 0
        self.status: NodeStatus | None = None
        self._port = port
        self._spec_file = spec_file
        self._base = base
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._answered = False

    @property
    def up(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def finished(self) -> bool:
        """Whether it trained and merged to the end, and has measured the result."""
        return self.up and self._answered and self.status is not None and self.status.phase == "finished"

    @property
    def state(self) -> str:
        """Its phase, as it says itself, or how it ended."""
        if not self.up:
            if self._killed:
                return "killed"
            return "starting" if self._process is None else f"died ({self._process.returncode})"
        return self.status.phase if self.status is not None and self._answered else "starting"

    @property
    def address(self) -> str:
        """Where it listens, at every start the same; its peer id included."""
        return f"/ip4/127.0.0.1/tcp/{self._port}/p2p/{prepare_home(self.home)[0]}"

    def start(self, bootstrap: Sequence[str]) -> None:
        """Start the process. Its home and its port are those of its last life, so that others find it again."""
        prepare_home(self.home)
        command = [sys.executable, "-P", "-m", "cli", "run", "--home", str(self.home.data_folder)]
        command += ["--run", str(self._spec_file), "--part", self.part, "--threads", "1"]
        command += ["--listen", f"/ip4/127.0.0.1/tcp/{self._port}", "--parent", str(os.getpid())]
        if self._base is not None:
            command += ["--base", str(self._base)]
        for address in bootstrap:
            command += ["--bootstrap", address]
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches the supervisor, which stops nodes in order.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter, our own arguments
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_node_environment(self.name),
                start_new_session=True,
            )
        self.starts += 1
        self._killed = self._answered = False

    def kill(self) -> None:
        """SIGKILL: what a power cut looks like to the others."""
        if self._process is not None and self.up:
            self._killed = True
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM: checkpoint, goodbye, end."""
        if self._process is not None and self.up:
            self._process.terminate()

    async def look(self) -> None:
        """Ask the process for its status; one that does not answer yet, or any more, keeps its last one."""
        if not self.up:
            return
        try:
            self.status = await ask(
                self.home.control_socket, "status", result_type=NodeStatus, timeout_s=STATUS_TIMEOUT_S
            )
            self._answered = True
        except GossamerError:
            return

    async def ask(self, method: str, params: Params) -> dict[str, Any]:
        """Ask the process anything that may take a while."""
        return await ask(self.home.control_socket, method, params, timeout_s=WORK_S_MAX)

    def row(self) -> NodeRow:
        """How it is now."""
        return NodeRow(
            name=self.name,
            alone=self.alone,
            part=self.part,
            state=self.state,
            pid=self._process.pid if self._process is not None and self.up else None,
            home=str(self.home.data_folder),
            restarts=max(self.starts - 1, 0),
            status=self.status,
        )

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        lines = self.log_file.read_text(errors="replace").splitlines() if self.log_file.exists() else []
        return " / ".join(line.strip() for line in lines[-LOG_LINES_SHOWN:]) or "it said nothing"


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now; held until all are chosen, so they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _node_environment(name: str) -> dict[str, str]:
    """The environment of a node process: ours, without our own settings, one thread, no cap on a loopback."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("GOSSAMER_")}
    return own | {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "GOSSAMER_NAME": name,
        "GOSSAMER_LOG_FORMAT": "console",
        "GOSSAMER_UPLOAD_BYTES_PER_S_MAX": "0",
        "GOSSAMER_DOWNLOAD_BYTES_PER_S_MAX": "0",
    }
