"""What a maintainer needs to see of a node that is unwell, in one zip file that its owner can read first.

Owns what goes in and what never does: no key, no secret, no data of the user's. Settings that cannot be read are left
out, since nobody could tell the secrets among them.
"""

from __future__ import annotations

import os
import platform
import re
import zipfile
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import msgspec

from cli.checks.finding import Finding, Subject
from node.config import ConfigError, load_config
from node.status import NodeStatus
from p2p.errors import GossamerError

LOG_BYTES_MAX = 256 << 10
"""The end of each log file."""
LOG_FILES_MAX = 4
REMOVED = "(removed)"
_SECRET_SETTING = re.compile(r"secret|token|password|passphrase|credential|(^|_)key($|_)", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"(?i)\b((?:secret|token|password|passphrase)[\"']?\s*[=:]\s*[\"']?)[^\s&\"',}]+")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)


def write_bundle(
    file: Path, subject: Subject, findings: Sequence[Finding], status: NodeStatus | None
) -> dict[str, str]:
    """Write ``file``, which must not be there yet, for its owner alone; returns what is in it, by name."""
    holds: dict[str, str] = {}
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise GossamerError(
            f"cannot write {file}: {error.strerror}",
            why="a report does not take the place of a file that is there",
            fix="name another file: --bundle FILE.zip",
        ) from error
    with os.fdopen(descriptor, "wb") as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, about: str, content: object) -> None:
            text = content if isinstance(content, str) else _pretty(content)
            archive.writestr(name, without_secrets(text))
            holds[name] = about

        add("findings.json", "what the checks found", findings)
        add("versions.json", "the system, Python and the installed packages", _versions())
        add(
            "settings.json",
            "the settings in force and where each comes from, secrets removed",
            _settings(subject),
        )
        if status is not None:
            add("status.json", "what the running node says of itself and its peers", status)
        for log in _log_files(subject):
            add(f"logs/{log.name}", f"the last lines of {log}, secrets removed", _tail(log))
    return holds


def without_secrets(text: str) -> str:
    """``text`` with whatever looks like a secret or a private key taken out."""
    return _SECRET_TEXT.sub(rf"\g<1>{REMOVED}", _PRIVATE_KEY.sub(REMOVED, text))


def _settings(subject: Subject) -> object:
    try:
        loaded = load_config(subject.home.config_file, subject.environ)
    except ConfigError as error:
        return {"left out": "they cannot be read, so secrets could not be told apart", "why": error.what}
    return {
        key: {
            "value": REMOVED if _SECRET_SETTING.search(key) else _plain(getattr(loaded.config, key)),
            "origin": origin,
        }
        for key, origin in loaded.origins.items()
    }


def _versions() -> object:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "packages": {
            dist.metadata["Name"]: dist.version
            for dist in sorted(distributions(), key=lambda dist: str(dist.metadata["Name"]).lower())
        },
    }


def _log_files(subject: Subject) -> list[Path]:
    """Where the node writes its log, if to a file, and what a testnet's supervisor keeps of it."""
    named = [subject.config.log_file] if subject.config.log_file is not None else []
    found = [*named, *sorted(subject.home.logs_folder.glob("*.log"))]
    return [file for file in dict.fromkeys(found) if file.is_file()][:LOG_FILES_MAX]


def _tail(file: Path) -> str:
    with file.open("rb") as log:
        skipped = max(0, file.stat().st_size - LOG_BYTES_MAX)
        log.seek(skipped)
        text = log.read(LOG_BYTES_MAX).decode(errors="replace")
    # What is left of a line that is cut may be a secret without the name that tells so.
    return text.partition("\n")[2] if skipped else text


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _pretty(content: object) -> str:
    return msgspec.json.format(msgspec.json.encode(content)).decode()
