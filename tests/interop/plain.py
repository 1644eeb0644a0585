"""One-byte mode a second time, in plain Python, written from docs/PROTOCOL.md alone.

Works out of a run's spec, its base weights and batches in any order: which batches are valid, which of them count, the
version vector, and the state that the records come to, hash included. Nothing here is fast, and nothing is shared with
the nodes: that is its use. Each part names the section of the document that it follows.
"""

import json
import struct
from dataclasses import dataclass
from fnmatch import fnmatchcase

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MASK = 2**64 - 1


class Refused(ValueError):
    """This batch is valid nowhere."""


# Section Canonical CBOR. A batch is one flat map from text to natural numbers, bytes and text: no more is read here.


def encode_item(value):
    """Canonical bytes of anything that a run spec or a batch has in it."""
    if isinstance(value, bool):
        return b"\xf5" if value else b"\xf4"
    if isinstance(value, float):
        return next(data for data in map(float_bytes, "efd", [value] * 3) if data)
    if isinstance(value, list):
        major, number, content = 4, len(value), b"".join(map(encode_item, value))
    elif isinstance(value, dict):
        pairs = sorted(value.items(), key=lambda pair: (len(pair[0].encode()), pair[0].encode()))
        major, number, content = (
            5,
            len(pairs),
            b"".join(encode_item(key) + encode_item(item) for key, item in pairs),
        )
    elif isinstance(value, int):
        major, number, content = 0, value, b""
    else:
        major, content = (3, value.encode()) if isinstance(value, str) else (2, value)
        number = len(content)
    if number < 24:
        return bytes([major << 5 | number]) + content
    low = next(low for low in range(4) if number < 256 ** (1 << low))
    return bytes([major << 5 | 24 + low]) + number.to_bytes(1 << low, "big") + content


def float_bytes(width, value):
    """A float in 2, 4 or 8 bytes; nothing if it does not fit exactly."""
    try:
        data = struct.pack(">" + width, value)
    except OverflowError:
        return b""
    exact = struct.unpack(">" + width, data)[0] == value
    return bytes([{"e": 0xF9, "f": 0xFA, "d": 0xFB}[width]]) + data if exact else b""


def decode_item(data, at):
    """(natural number, bytes, text or how many pairs of a map follow; where the rest begins), canonical or not."""
    major, number, at = data[at] >> 5, data[at] & 31, at + 1
    if number > 27 or major not in (0, 2, 3, 5):
        raise ValueError("something that no batch has in it")
    if number > 23:
        end = at + (1 << number - 24)
        number, at = int.from_bytes(data[at:end], "big"), end
    if major in (0, 5):
        return number, at
    content = data[at : at + number]
    return content if major == 2 else content.decode(), at + number


def decode_map(data):
    """The fields of a message, if its bytes are those that an encoder would have produced."""
    try:
        count, at = decode_item(data, 0)
        fields = {}
        for _ in range(count):
            key, at = decode_item(data, at)
            fields[key], at = decode_item(data, at)
    except (ValueError, IndexError, TypeError) as error:
        raise Refused(f"not CBOR of a batch: {error}") from None
    if not all(isinstance(key, str) for key in fields) or encode_item(fields) != data:
        raise Refused("not canonical")
    return fields


# Section The run.


def run_id_of(spec):
    """The id of a run, given its spec with every key written out."""
    return blake3(encode_item({"format": 4, "spec": spec})).digest()


# Messages, and section Batches.

BOUNDS = {  # of natural numbers their values, of bytes and texts their lengths
    "clock": (int, 0, 2**53),
    "author": (str, 40, 64),
    "records": (bytes, 1, 4096),
    "previous": (bytes, 32, 32),
    "signature": (bytes, 64, 64),
    "incarnation": (int, 0, 2**63 - 1),
}
FIELDS = {
    "FirstBatch": {"t", "clock", "author", "records", "signature", "incarnation"},
    "NextBatch": {"t", "clock", "records", "previous", "signature"},
}


@dataclass(frozen=True)
class Batch:
    """A well-formed batch; whether it is valid depends on what it follows."""

    follows: tuple | bytes  # (author, incarnation), or the name of the batch before
    clock: int
    records: bytes
    claim: bytes
    signature: bytes

    @property
    def name(self):
        return blake3(self.claim).digest()


def parse(data, run_id):
    """A batch from its bytes, or Refused."""
    if len(data) > 4608:
        raise Refused("too long")
    fields = decode_map(data)
    if fields.keys() != FIELDS.get(fields.get("t")):
        raise Refused("not the fields of a batch")
    for key, (kind, low, high) in BOUNDS.items():
        value = fields.get(key)
        if key in fields and not (
            type(value) is kind and low <= (value if kind is int else len(value)) <= high
        ):
            raise Refused(f"{key} is out of bounds")
    signature = fields.pop("signature")
    claim = encode_item({**fields, "t": fields["t"] + "Claim", "run": run_id})
    follows = fields.get("previous") or (fields["author"], fields["incarnation"])
    return Batch(follows, fields["clock"], fields["records"], claim, signature)


BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def public_key(peer):
    """The Ed25519 key that a peer id is: base58 of 00 24 08 01 12 20 and the key. The 00 is its one leading 1."""
    number = 0
    for letter in peer:
        number = number * 58 + BASE58.index(letter)
    if not peer.startswith("1") or peer.startswith("11") or number >> 256 != 0x2408011220:
        raise ValueError
    return Ed25519PublicKey.from_public_bytes((number % 2**256).to_bytes(32, "big"))


def check(batch, author, clock_before, records_before, rules):
    """Section Batches: refuse what is not valid after what it follows."""
    try:
        public_key(author).verify(batch.signature, b"gossamer/batch/1\0" + batch.claim)
    except (InvalidSignature, ValueError):
        raise Refused("signature, or no peer id of an Ed25519 key") from None
    if len(batch.records) > rules["batch_records"]:
        raise Refused("too many records in a batch")
    if batch.clock < clock_before:
        raise Refused("clock runs back")
    allowance = rules["log_allowance"] + rules["log_share_percent"] * batch.clock // 100
    if records_before + len(batch.records) > allowance:
        raise Refused("more records than the log is allowed at this clock")


# Section What counts.


@dataclass
class Log:
    """A log as far as it is held: up to its end, or up to the fork that ended it."""

    author: str
    incarnation: int
    name: bytes
    batches: list
    forked: bool
    counted: int = 0


def assemble(blobs, run_id, rules):
    """(logs by name, [(which, why it was refused)]) of batches in any order; those after nothing valid play no part."""
    following, refused = {}, []
    for index, blob in enumerate(blobs):
        try:
            batch = parse(blob, run_id)
        except Refused as error:
            refused.append((index, str(error)))
        else:
            following.setdefault(batch.follows, []).append((index, batch))

    logs = {}
    for place in [place for place in following if isinstance(place, tuple)]:
        author, incarnation = place
        chain, clock, records = [], 0, 0
        while True:
            valid = {}  # by name, so that a batch that is there twice follows once
            for index, batch in following.get(place, ()):
                try:
                    check(batch, author, clock, records, rules)
                    valid[batch.name] = batch
                except Refused as error:
                    refused.append((index, str(error)))
            if len(valid) != 1:
                break
            place, batch = valid.popitem()
            chain.append(batch)
            clock, records = batch.clock, records + len(batch.records)
        if chain or valid:
            material = run_id + incarnation.to_bytes(8, "little") + author.encode()
            name = blake3(material, derive_key_context="gossamer one-byte logs 1").digest(16)
            logs[name] = Log(author, incarnation, name, chain, len(valid) > 1)
    return logs, refused


def count(logs, rules):
    """Find what counts: sets `counted` (batches) of each log, returns the number of records."""
    floor = {}
    for log in logs.values():
        rank = sum(
            other.author == log.author and other.incarnation < log.incarnation for other in logs.values()
        )
        floor[log.name] = rank * rules["log_opening_cost"]
    records, moved = 0, True
    while moved:
        moved = False
        for log in logs.values():
            for batch in log.batches[log.counted :]:
                if max(batch.clock, floor[log.name]) - rules["log_reach"] > records:
                    break
                records += len(batch.records)
                log.counted += 1
                moved = True
    return records


def heads(logs):
    """The rows of Heads, by log: its name, batches held, name of the last one or zeros, 1 if it is forked."""
    ends = (
        (name, log, log.batches[-1].name if log.batches else bytes(32)) for name, log in sorted(logs.items())
    )
    return b"".join(
        name + len(log.batches).to_bytes(8, "big") + end + bytes([log.forked]) for name, log, end in ends
    )


# Section Directions.


def log_key(run_id, log_name):
    return blake3(run_id + log_name, derive_key_context="gossamer one-byte directions 1").digest()


def direction(key, number):
    """(start, step) of the words of a direction."""
    digest = blake3(number.to_bytes(8, "little"), key=key).digest(16)
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") | 1


def word(start, step, index):
    z = (start + (index + 1) * step) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def signs(a_word):
    """Its 64 signs, 1 for -1: sign 8 i + j is bit 8 j + i."""
    return [a_word >> 8 * j + i & 1 for i in range(8) for j in range(8)]


# Sections The byte and The state.


def size(q, table="log"):
    if q == 0:
        return 0
    return (
        2**30 if table == "sign" else round(2 ** (30 + (q - 127) / 16))
    )  # nowhere near a half, so doubles do


def step(byte, rate, exponent, table="log"):
    """c: how far a record moves a parameter whose sign is +1."""
    distance = size(byte & 127, table) * rate + (1 << 93 - exponent) >> 94 - exponent
    return distance if byte & 128 else -distance


def rate_at(clock, rules):
    return round(rules["step_size"] * rules["clip"] * 2**64) >> sum(at <= clock for at in rules["halvings"])


def read_safetensors(data):
    """{name: (shape, floats)} of a file of fp32 tensors."""
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:begin]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = struct.unpack(f"<{(last - first) // 4}f", data[begin + first : begin + last])
            tensors[name] = entry["shape"], values
    return dict(sorted(tensors.items()))


def trained_of(base, patterns):
    """Those of the tensors whose names match any of the patterns."""
    return {
        name: tensor for name, tensor in base.items() if any(fnmatchcase(name, each) for each in patterns)
    }


def exponent_of(values):
    largest = max(map(abs, values))
    return max(e for e in range(63) if largest < 2.0 ** (27 - e)) if largest else 27


def state_hash(base, logs, run_id, rules):
    """The hash of the state that the records that count come to. It is brought into 32 bits once, at the end."""
    exponent = {name: exponent_of(values) for name, (_, values) in base.items()}
    states = {name: [round(v * 2.0 ** exponent[name]) for v in values] for name, (_, values) in base.items()}
    for log in logs.values():
        key, number = log_key(run_id, log.name), 0
        for batch in log.batches[: log.counted]:
            rate = rate_at(batch.clock, rules)
            for byte in batch.records:
                start, stride = direction(key, number)
                if rules["pool"]:
                    start, stride = direction(log_key(run_id, b"pool"), start % rules["pool"])
                number, index = number + 1, 0
                for name, state in states.items():
                    c = step(byte, rate, exponent[name], rules["table"])
                    for k in range(len(state)):
                        if k % 64 == 0:
                            minus, index = signs(word(start, stride, index)), index + 1
                        state[k] += -c if minus[k % 64] else c
    lines = (f"{name} {'x'.join(map(str, shape))} {exponent[name]}\n" for name, (shape, _) in base.items())
    hasher = blake3(blake3("".join(lines).encode()).digest())
    for state in states.values():
        hasher.update(b"".join((value % 2**32).to_bytes(4, "little") for value in state))
    return hasher.hexdigest()
