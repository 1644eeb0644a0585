"""The exit codes of ``gossamer``: one enum, printed by ``gossamer help exit-codes`` and used by service managers.

Owns the mapping from errors to codes. Errors are looked up by class name, so that printing an error never costs
the import of torch or libp2p, and an error that a daemon reports over its socket maps like one raised here.
"""

from __future__ import annotations

import enum

from p2p.errors import GossamerError


class ExitCode(enum.IntEnum):
    """What the shell is told."""

    meaning: str

    OK = 0, "all is well"
    FAILED = 1, "it could not be done; the message says why"
    USAGE = 2, "the command line, or the invite on it, is not right"
    CONFIG = 3, "a setting, run spec, scenario, key or data folder is not right; nothing was started"
    NO_DAEMON = 4, "no node is running in this home"
    TAKEN = 5, "a node already runs in this home, or another program holds its port"
    INCOMPATIBLE = 6, "the peers follow another run or protocol version"
    CHECK_FAILED = 7, "a check found something wrong, for example nodes whose merged weights differ"
    NO_PEERS = 8, "no peer could be reached in time"
    DISK = 9, "the disk is full, or what is on it is damaged beyond repair"
    HANDED_OVER = 10, "stopped for another version to go on in this home; service managers start it again"
    INTERRUPTED = 130, "stopped by Ctrl-C"

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


_BY_ERROR = {
    "InviteError": ExitCode.USAGE,
    "AdvertError": ExitCode.USAGE,
    "BadRequest": ExitCode.USAGE,
    "ConfigError": ExitCode.CONFIG,
    "SpecError": ExitCode.CONFIG,
    "ScenarioError": ExitCode.CONFIG,
    "ResultsError": ExitCode.CONFIG,
    "DataError": ExitCode.CONFIG,
    "BaseError": ExitCode.CONFIG,
    "PretrainedError": ExitCode.CONFIG,
    "AddressError": ExitCode.CONFIG,
    "DeviceError": ExitCode.CONFIG,
    "IdentityError": ExitCode.CONFIG,
    "SwarmKeyError": ExitCode.CONFIG,
    "NoDaemon": ExitCode.NO_DAEMON,
    "Gone": ExitCode.NO_DAEMON,
    "AlreadyRunning": ExitCode.TAKEN,
    "PortInUse": ExitCode.TAKEN,
    "ProtocolUnsupported": ExitCode.INCOMPATIBLE,
    "WeightsDiffer": ExitCode.CHECK_FAILED,
    "RecordsDiffer": ExitCode.CHECK_FAILED,
    "RecordsDamaged": ExitCode.CHECK_FAILED,
    "SimulationFailed": ExitCode.CHECK_FAILED,
    "PeerUnreachable": ExitCode.NO_PEERS,
    "CheckpointError": ExitCode.DISK,
    "StoreFull": ExitCode.DISK,
}


def exit_code_of(error: GossamerError) -> ExitCode:
    """The code for ``error``: its own, or that of the nearest class it derives from, or FAILED."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if code := getattr(error, "code", None):
        names.insert(0, code)
    return next((_BY_ERROR[name] for name in names if name in _BY_ERROR), ExitCode.FAILED)
