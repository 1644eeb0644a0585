"""A local network of its own for a test: network namespaces on one switch.

Namespaces need root on Linux; where they are not to be had, tests are skipped and say so.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


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
