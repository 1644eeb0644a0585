"""Where one node keeps its things, and the lock that keeps a second daemon out of them.

Owns every path under a home and nothing inside the files. A home is one folder when the user names one
(``--home`` or ``GOSSAMER_HOME``: containers, testnets), and otherwise the folders that the platform sets
aside for configuration, data, state and sockets. Folders are private (0700).

Relies on: flock, which the kernel releases when a process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from p2p.errors import GossamerError

SOCKET_PATH_BYTES_MAX = 100
"""Unix socket paths end at 104 (macOS) or 108 bytes (Linux), the closing zero included."""


class AlreadyRunning(GossamerError):
    """Another daemon holds this home."""


@dataclass(frozen=True, slots=True)
class Home:
    """The folders of one node; every file in them has one property here."""

    config_folder: Path
    data_folder: Path
    state_folder: Path
    runtime_folder: Path

    @classmethod
    def at(cls, folder: Path) -> Home:
        """A home that keeps everything under ``folder``."""
        folder = folder.expanduser().resolve()
        return cls(folder, folder, folder, folder)

    @classmethod
    def locate(cls, folder: Path | None, environ: Mapping[str, str]) -> Home:
        """The home in ``folder``, or in ``GOSSAMER_HOME``, or in the platform's folders for this user."""
        if folder is not None:
            return cls.at(folder)
        if named := environ.get("GOSSAMER_HOME"):
            return cls.at(Path(named))
        paths = platformdirs.PlatformDirs("gossamer", appauthor=False)
        runtime = environ.get("XDG_RUNTIME_DIR")
        return cls(
            paths.user_config_path,
            paths.user_data_path,
            paths.user_state_path,
            Path(runtime, "gossamer") if runtime else paths.user_state_path,
        )

    @property
    def config_file(self) -> Path:
        """What is this node's own business: see node.config."""
        return self.config_folder / "config.toml"

    @property
    def identity_file(self) -> Path:
        """The private key, mode 0600."""
        return self.data_folder / "identity.key"

    @property
    def runs_folder(self) -> Path:
        """One folder per run this home has taken part in."""
        return self.data_folder / "runs"

    @property
    def logs_folder(self) -> Path:
        """Where log files go when the user asks for files."""
        return self.state_folder / "logs"

    @property
    def lock_file(self) -> Path:
        """Held by the running daemon, and holding its process id."""
        return self.state_folder / "node.lock"

    @property
    def day_traffic_file(self) -> Path:
        """What was moved today, whatever the run: see node.day_budget."""
        return self.state_folder / "day_traffic.json"

    @property
    def control_socket(self) -> Path:
        """The daemon's unix socket; in a short place of its own when the home's path is too long for one."""
        path = self.runtime_folder / "control.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        return Path(base, f"gossamer-{os.getuid()}-{digest}", "control.sock")

    def swarm_key_file(self, run: bytes) -> Path:
        """The key of a private swarm, mode 0600. Where there is none, the run's swarm is an open one."""
        return self.run_folder(run) / "swarm.key"

    def run_folder(self, run: bytes) -> Path:
        """The folder of one run: its spec, shards, promises and checkpoints."""
        return self.runs_folder / run.hex()[:16]

    def remember_run(self, run: bytes) -> None:
        """Make ``run`` the one that ``gossamer run`` goes on with when it is told nothing else."""
        self.create()
        partial = self.runs_folder / "current.partial"
        partial.write_text(run.hex() + "\n")
        partial.replace(self.runs_folder / "current")

    def remembered_run(self) -> bytes | None:
        """The run of the last ``remember_run``; None when there is none or the note is damaged."""
        try:
            run = bytes.fromhex((self.runs_folder / "current").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return run if len(run) == 32 else None

    def last_run(self) -> bytes:
        """The same for who needs one. Raises GossamerError."""
        run = self.remembered_run()
        if run is None:
            raise GossamerError(
                "no run to take part in",
                why="this home has not joined one yet",
                fix="join one: gossamer join 'INVITE'    or start one: gossamer run --run SPEC.toml",
            )
        return run

    def create(self) -> None:
        """Make the folders that are missing, for this user alone."""
        folders = (
            self.config_folder,
            self.data_folder,
            self.state_folder,
            self.runs_folder,
            self.logs_folder,
            self.control_socket.parent,
        )
        for folder in folders:
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise GossamerError(
                    f"cannot create {folder}: {error.strerror}",
                    why="a node keeps its key, its shards and its checkpoints there",
                    fix="name another folder: --home PATH, or GOSSAMER_HOME",
                ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this home for one daemon, from start to end. Raises AlreadyRunning."""
        self.create()
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                raise AlreadyRunning(
                    f"a node is already running in {self.data_folder} (process {holder})",
                    why="two daemons on one home would speak with one key and overwrite each other's weights",
                    fix="see it: gossamer status    stop it: gossamer stop    or give this one its own --home",
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)
