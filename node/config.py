"""Node configuration: what is mine (ports, disk, device, bandwidth), never part of a run and never shared.

Owns the settings, their defaults, and where each value came from: flag over ``GOSSAMER_*`` environment over
``config.toml`` over default. What a swarm must agree on is in the run spec (``training.run_spec``) instead.
"""

from __future__ import annotations

import difflib
import ipaddress
import platform
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from p2p.errors import GossamerError

ENVIRONMENT_PREFIX = "GOSSAMER_"
_NOT_SETTINGS = frozenset({"GOSSAMER_HOME"})


class ConfigError(GossamerError):
    """A setting is unknown, misspelt or out of range; says where it was written."""


def _about(text: str, example: str = "", **bounds: Any) -> Meta:
    """Bounds of a setting, and what the default file says about it; ``example`` stands in for no default."""
    return Meta(description=text, examples=[example] if example else None, **bounds)


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of one node. Byte counts are also accepted as text with a unit: ``20 GiB``.

    Settings with a common first word may be gathered in a table of the file: ``[metrics]`` with ``listen``.
    """

    name: Annotated[str, _about("What people see next to the peer id.", max_length=32)] = msgspec.field(
        default_factory=lambda: platform.node()[:32]
    )
    listen: Annotated[
        tuple[str, ...],
        _about("Addresses to listen on. Port 0 takes any free port.", min_length=1, max_length=8),
    ] = ("/ip4/0.0.0.0/tcp/4100",)
    announce: Annotated[
        tuple[str, ...],
        _about("Addresses to tell others instead of these, for a forwarded port.", max_length=8),
    ] = ()
    metrics_listen: Annotated[
        str | None,
        _about(
            "Serve metrics to Prometheus here, unencrypted, to whoever can reach it; off unless set.",
            "127.0.0.1:9464",
        ),
    ] = None
    lan: Annotated[
        bool,
        _about(
            "Find members on the local network, and tell it that this node is there and what it listens on."
        ),
    ] = False
    upnp: Annotated[
        bool, _about("Ask the router by UPnP to forward the port, so that others can dial this node.")
    ] = True
    allow: Annotated[
        tuple[str, ...],
        _about("Connect with these peer ids and nobody else; all, when none is named.", max_length=1024),
    ] = ()
    dht: Annotated[
        bool,
        _about(
            "Be found by who knows the run's id, and find others, through nodes of any run; needs one to begin with."
        ),
    ] = True
    swarms: Annotated[
        tuple[str, ...],
        _about(
            "Lists of swarms, files or URLs, and addresses of peers, where gossamer swarms and join look.",
            max_length=16,
        ),
    ] = ()
    advertise: Annotated[
        str,
        _about(
            "What the swarm is for, in a sentence: tells whoever looks for swarms of it; empty tells nobody.",
            max_length=200,
        ),
    ] = ""
    device: Annotated[str, _about("Where to train: auto, cpu, cuda, cuda:1 or mps.")] = "auto"
    threads: Annotated[
        int, _about("Processor threads for training; 0 leaves the choice to torch.", ge=0, le=1024)
    ] = 0
    disk_bytes_max: Annotated[int, _about("Disk space for shards and checkpoints.", ge=64 << 20)] = 20 << 30
    upload_bytes_per_s_max: Annotated[
        int, _about("Cap on sending, per second; 0 is none. Full speed on a LAN can halve training.", ge=0)
    ] = 12_500_000
    download_bytes_per_s_max: Annotated[int, _about("Cap on receiving, per second; 0 is none.", ge=0)] = (
        12_500_000
    )
    upload_bytes_per_day_max: Annotated[
        int, _about("Once so much was sent, keep away from the swarm until 00:00 UTC; 0 is no end.", ge=0)
    ] = 0
    download_bytes_per_day_max: Annotated[
        int, _about("The same for what is received; 0 is no end.", ge=0)
    ] = 0
    relay_bytes_per_s_max: Annotated[
        int,
        _about(
            "Carry connections for members that nobody can dial, at this rate at most; 0 carries none.", ge=0
        ),
    ] = 2_500_000
    data_path: Annotated[
        Path | None,
        _about(
            "Your own data: a file or folder of text, or an .npz file, as the run's data source says.",
            "~/texts",
        ),
    ] = None
    base_path: Annotated[
        Path | None,
        _about(
            "What a one-byte run starts from: a safetensors file, or the directory of a Hugging Face model.",
            "~/base.safetensors",
        ),
    ] = None
    part: Annotated[
        tuple[int, int] | None, _about("Train on the k-th of n equal parts of the data, written k/n.", "1/2")
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _about("The least serious events worth a line.")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "console", "json"], _about("auto is console on a terminal and json elsewhere.")
    ] = "auto"
    log_file: Annotated[
        Path | None, _about("Log to this file, opened anew on SIGHUP, not to standard error.", "~/node.log")
    ] = None

    def __post_init__(self) -> None:
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError("a part is written k/n with 1 <= k <= n")
        if self.metrics_listen is not None:
            parse_host_and_port(self.metrics_listen)
        if self.allow:
            _check_peer_ids(self.allow)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration and, for each of its keys, the place its value came from."""

    config: NodeConfig
    origins: Mapping[str, str]


def load_config(
    file: Path, environ: Mapping[str, str], flags: Mapping[str, object | None] | None = None
) -> LoadedConfig:
    """The settings in force: ``flags`` that are not None, over the environment, over ``file`` if it exists.

    Raises ConfigError for a file that is not TOML, an unknown key, or a value outside its range.
    """
    values: dict[str, object] = {}
    origins = dict.fromkeys(NodeConfig.__struct_fields__, "default")
    for key, origin, value in [
        *_from_file(file),
        *_from_environment(environ),
        *((key, f"--{key.replace('_', '-')}", value) for key, value in (flags or {}).items()),
    ]:
        if value is None:
            continue
        if key not in origins:
            raise _unknown_key(key, origin)
        values[key] = _convert(key, value, origin)
        origins[key] = origin
    return LoadedConfig(NodeConfig(**values), origins)  # type: ignore[arg-type]


def default_config_text() -> str:
    """A config.toml that sets nothing and shows everything: each setting commented out, with its default."""
    lines = ["# What is this node's own: never shared, never part of a run.", ""]
    for key, (about, default) in describe_settings().items():
        lines += [f"# {about}", f"# {key} = {default}", ""]
    return "\n".join(lines)


def describe_settings() -> dict[str, tuple[str, str]]:
    """For each setting what it is and its default as TOML; for one without a default, an example."""
    defaults = NodeConfig()
    described = {}
    for key, hint in _HINTS.items():
        meta: Meta = hint.__metadata__[0]
        value = getattr(defaults, key)
        shown = meta.examples[0] if value is None and meta.examples else value
        described[key] = (meta.description or "", setting_as_toml(key, shown))
    return described


def setting_as_toml(key: str, value: Any) -> str:
    """``value`` of setting ``key`` the way config.toml would say it."""
    match value:
        case tuple((int(), int())):
            return f'"{value[0]}/{value[1]}"'
        case tuple():
            return "[" + ", ".join(f'"{item}"' for item in value) + "]"
        case bool():
            return str(value).lower()
        case int() if "bytes" in key and value % (1 << 20) == 0 and value:
            return f'"{format_bytes(value)}"'.replace(".0 ", " ")
        case int():
            return str(value)
        case None:
            return '""'
        case _:
            return f'"{value}"'


def parse_bytes(text: str) -> int:
    """``20 GiB``, ``1.5GB``, ``500kB`` or plain bytes to a number of bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example 20 GiB or 500 MB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def format_bytes(count: float) -> str:
    """``count`` bytes for people, in binary units: 1536 becomes ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_part(text: str) -> tuple[int, int]:
    """``2/4`` to (2, 4). Raises ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a part; write for example 2/4")
    return int(match[1]), int(match[2])


def parse_host_and_port(text: str) -> tuple[str, int]:
    """``127.0.0.1:9464`` or ``[::1]:9464`` to a host and a port. Raises ValueError."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    try:
        version = ipaddress.ip_address(bare).version
    except ValueError:
        version = None
    if version is None or (host != bare) is not (version == 6) or not re.fullmatch(r"\d{1,5}", port):
        raise ValueError(f"{text!r} is not an IP address and a port; write for example 127.0.0.1:9464")
    if int(port) > 65535:
        raise ValueError(f"{port} is not a port; there are 65535")
    return bare, int(port)


def _from_file(file: Path) -> list[tuple[str, str, object]]:
    try:
        text = file.read_text()
        table = tomllib.loads(text)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"cannot read {file}: {error}",
            why="a node does not guess its settings",
            fix="correct the line, or move the file away and run: gossamer init",
        ) from error
    found: list[tuple[str, str, object]] = []
    for name, value in table.items():
        origin = f"{file}:{_line_of(name, text)}"
        if isinstance(value, dict):
            found += [(f"{name}_{key}", origin, inner) for key, inner in value.items()]
        else:
            found.append((name, origin, value))
    return found


def _from_environment(environ: Mapping[str, str]) -> list[tuple[str, str, object]]:
    names = (name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and name not in _NOT_SETTINGS)
    return [(name.removeprefix(ENVIRONMENT_PREFIX).lower(), name, environ[name]) for name in sorted(names)]


def _convert(key: str, written: object, origin: str) -> object:
    value = written
    try:
        if isinstance(value, str):
            if "bytes" in key:
                value = parse_bytes(value)
            elif key == "part":
                value = parse_part(value)
            elif key in ("listen", "announce", "allow"):
                value = [item.strip() for item in value.split(",") if item.strip()]
        converted = msgspec.convert(
            value, _HINTS[key], strict=False, dec_hook=lambda kind, plain: kind(plain)
        )
        NodeConfig(**{key: converted})  # runs the checks that no type expresses
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(
            f"{origin}: {key} = {written!r}: {error}",
            why=describe_settings()[key][0],
            fix="see every setting with its value: gossamer config show",
        ) from error
    return converted.expanduser() if isinstance(converted, Path) else converted


def _check_peer_ids(peers: Iterable[str]) -> None:
    """Raises ValueError."""
    # Imported here, because whoever asks for help needs no cryptography.
    from p2p.identity import public_key_of
    from p2p.transport import PeerId

    for peer in peers:
        try:
            public_key_of(PeerId(peer))
        except ValueError as error:
            raise ValueError(f"{peer!r} is not a peer id; a node says its own: gossamer keys show") from error


def _unknown_key(key: str, origin: str) -> ConfigError:
    near = difflib.get_close_matches(key, NodeConfig.__struct_fields__, n=1)
    return ConfigError(
        f"{origin}: unknown setting {key!r}",
        why="a misspelt setting that is ignored would be found out too late",
        fix=f"did you mean {near[0]}?" if near else "see the settings that exist: gossamer config show",
    )


def _line_of(key: str, text: str) -> int:
    """The line of a top-level ``key``, or of the table that has its name."""
    pattern = re.compile(rf"\s*(\[+\s*)?[\"']?{re.escape(key)}\b")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)


_HINTS = get_type_hints(NodeConfig, include_extras=True)
