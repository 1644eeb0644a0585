"""Checks of one home: its key, its settings, and the disk it lies on."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cli.checks.finding import Finding, Subject, failure
from node.config import ConfigError, format_bytes, load_config
from p2p.errors import AddressError
from p2p.limits import DEFAULT_LIMITS

FREE_BYTES_MIN = 256 << 20
FREE_BYTES_WANTED = 2 << 30
PROBE_BYTES = 1 << 20
SYNCS = 5
SYNC_S_WANTED = 0.25
"""Every promise in a merge waits for one, and so does every batch of records."""


def check_key(subject: Subject) -> Sequence[Finding]:
    """The keys are there, whole, and nobody else's to read."""
    from p2p.identity import Identity
    from p2p.swarm_key import SwarmKey

    file = subject.home.identity_file
    peer = Identity.load(file).peer
    findings = [Finding(check="key", level="ok", found=f"{file} is peer {peer}; nobody else can read it")]
    run = subject.home.remembered_run()
    if run is not None and SwarmKey.load(swarm_file := subject.home.swarm_key_file(run)) is not None:
        findings.append(
            Finding(
                check="key",
                level="ok",
                found=f"{swarm_file} makes the swarm private; nobody else can read it",
            )
        )
    return findings


def check_settings(subject: Subject) -> Sequence[Finding]:
    """The settings can be read, and what they name is there."""
    from gossip.address_book import check_address

    file = subject.home.config_file
    try:
        config = load_config(file, subject.environ).config
        for address in config.announce:
            check_address(address, chars_max=DEFAULT_LIMITS.address_chars_max)
    except (ConfigError, AddressError) as error:
        return [failure("settings", error)]
    missing = [
        (key, path)
        for key, path in (
            ("data_path", config.data_path),
            ("base_path", config.base_path),
            ("the folder of log_file", config.log_file and config.log_file.parent),
        )
        if path is not None and not path.exists()
    ]
    if missing:
        return [
            Finding(
                check="settings",
                level="fail",
                found=", ".join(f"{key} is not there: {path}" for key, path in missing),
                why="a node with these settings does not start",
                fix=f"correct {file}",
            )
        ]
    where = str(file) if file.exists() else f"{file} (not there: defaults)"
    return [Finding(check="settings", level="ok", found=where)]


def check_disk(subject: Subject) -> Sequence[Finding]:
    """Each folder of the home takes a file and keeps it, in a time that merges can wait for."""
    home = subject.home
    return [_check_folder(folder) for folder in dict.fromkeys((home.data_folder, home.state_folder))]


def _check_folder(folder: Path) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
        sync_s = _sync_s(folder)
    except FileNotFoundError:
        return Finding(
            check="disk",
            level="fail",
            found=f"{folder} is not there",
            why="a node keeps its key, its shards and its checkpoints there",
            fix="make it: gossamer init    or name another: --home PATH",
        )
    except OSError as error:
        return _cannot_write(folder, error)
    found = f"{folder}: {format_bytes(free)} free, written and synced in {1000 * sync_s:.1f} ms"
    if free < FREE_BYTES_WANTED:
        return Finding(
            check="disk",
            level="fail" if free < FREE_BYTES_MIN else "warn",
            found=found,
            why="a full disk costs checkpoints, and with them the work since the last one",
            fix=f"free some: df -h {shlex.quote(str(folder))}    or lower disk_bytes_max in config.toml",
        )
    if sync_s > SYNC_S_WANTED:
        return Finding(
            check="disk",
            level="warn",
            found=found,
            why="a node syncs before it promises anything to others, so every merge waits for this disk",
            fix="put the home on a quicker disk: --home PATH",
        )
    return Finding(check="disk", level="ok", found=found)


def _cannot_write(folder: Path, error: OSError) -> Finding:
    quoted = shlex.quote(str(folder))
    cures = {
        errno.ENOSPC: f"free some space: df -h {quoted}    or name another folder: --home PATH",
        errno.EDQUOT: f"free some of your quota: quota    df -h {quoted}",
        errno.EROFS: f"mount it to be written to: findmnt -T {quoted}    or name another folder: --home PATH",
    }
    return Finding(
        check="disk",
        level="fail",
        found=f"cannot write to {folder}: {error.strerror}",
        why="a node that cannot write keeps no checkpoint and makes no promise",
        fix=cures.get(error.errno or 0, f"make it yours: sudo chown -R {os.getuid()} {quoted}"),
    )


def _sync_s(folder: Path) -> float:
    """How long the disk takes to make a small write durable. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(os.urandom(PROBE_BYTES))
        os.fsync(file.fileno())
        took = []
        for _ in range(SYNCS):
            began_s = time.perf_counter()
            file.write(os.urandom(4096))
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began_s)
    return statistics.median(took)
