"""Which checks there are, in the order in which they are told: what others stand on comes first."""

from __future__ import annotations

from collections.abc import Mapping

from cli.checks.accelerator import check_accelerator
from cli.checks.finding import Check, in_thread
from cli.checks.home import check_disk, check_key, check_settings
from cli.checks.network import check_addresses, check_peers, check_port
from cli.checks.running import check_node
from cli.checks.software import check_modules, check_packages, check_python

CHECKS: Mapping[str, Check] = {
    "python": in_thread(check_python),
    "packages": in_thread(check_packages),
    "modules": in_thread(check_modules),
    "key": in_thread(check_key),
    "settings": in_thread(check_settings),
    "disk": in_thread(check_disk),
    "port": check_port,
    "addresses": check_addresses,
    "peers": check_peers,
    "accelerator": check_accelerator,
    "node": check_node,
}
