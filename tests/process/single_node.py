"""One real node with options of its own, and other programs beside it; in a network namespace where one is named."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cli.node_commands import prepare_home
from node.control import ask
from node.home import Home
from node.status import NodeStatus
from p2p.errors import GossamerError


@contextmanager
def running(
    command: Sequence[str], log_file: Path, *, namespace: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """``command`` of this Python for the length of the block; killed then."""
    within = [] if namespace is None else ["ip", "netns", "exec", namespace]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GOSSAMER_")}
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [*within, sys.executable, "-P", *command],
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


class SingleNode:
    """A home, and the ``gossamer run`` that lives in it; for ``until`` it is like a NodeProcess."""

    def __init__(self, folder: Path, name: str, *, namespace: str | None = None) -> None:
        self.name = name
        self.home = Home.at(folder / name)
        self.peer = prepare_home(self.home)[0]
        self.status: NodeStatus | None = None
        self._namespace = namespace
        self._log_file = self.home.logs_folder / "node.log"
        self.process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self, *options: str, verb: str = "run") -> Iterator[None]:
        """``gossamer run``, or join, with ``options`` for the length of the block."""
        command = ["-m", "cli", verb, "--home", str(self.home.data_folder), *options]
        with running(command, self._log_file, namespace=self._namespace) as self.process:
            yield

    @property
    def up(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def state(self) -> str:
        """Its phase; ``starting`` before it has answered."""
        return "starting" if self.status is None else self.status.phase

    async def look(self) -> None:
        """Ask it for its status; a unix socket knows no network namespaces."""
        with contextlib.suppress(GossamerError):
            self.status = await ask(self.home.control_socket, "status", result_type=NodeStatus, timeout_s=10)

    def last_words(self) -> str:
        """The end of its log."""
        return " / ".join(self._log_file.read_text(errors="replace").splitlines()[-5:])
