"""What a node remembers of logs: its own to the last batch that anybody can have seen, others' as far as it goes."""

from __future__ import annotations

import random

import pytest

from gossip.record_archive import OWN, SEGMENTS_SMALL_MAX, RecordArchive
from gossip.record_author import RecordAuthor
from gossip.record_batches import LogRules, make
from gossip.record_logs import RecordLogs
from netsim.disk import SimDisk
from tests.gossip.merge_world import CheapSigner, peer_named

RUN = bytes(32)
RULES = LogRules(records_max=4, allowance=1000)
SIGNER = CheapSigner(peer_named(1))


async def loaded(disk: SimDisk, seed: int = 0) -> tuple[RecordArchive, RecordLogs, RecordAuthor]:
    """A life on ``disk``: what it kept, the table made of it, and who goes on with it."""
    archive = RecordArchive(disk)
    logs = RecordLogs(run=RUN, signer=SIGNER, rules=RULES)
    for packed in await archive.load():
        logs.offer(packed)
    author = RecordAuthor(
        run=RUN, signer=SIGNER, logs=logs, archive=archive, rules=RULES, rng=random.Random(seed)
    )
    return archive, logs, author


async def write(logs: RecordLogs, author: RecordAuthor, records: bytes = b"\1\2") -> None:
    author.add(records, author.clock)
    logs.offer(await author.seal())


def kept(logs: RecordLogs) -> list[bytes]:
    return [batch.packed for batch in logs.batches()]


async def test_an_author_goes_on_where_its_last_life_ended(autojump_clock: object) -> None:
    disk = SimDisk()
    _, logs, author = await loaded(disk)
    for _ in range(3):
        await write(logs, author)
    disk.power_cut()
    _, again, successor = await loaded(disk, seed=1)
    assert kept(again) == kept(logs)
    assert successor.log == author.log
    assert successor.next == 6
    await write(again, successor)
    assert again.head(author.log).number == 4


async def test_what_was_not_sealed_was_never_said(autojump_clock: object) -> None:
    disk = SimDisk()
    _, logs, author = await loaded(disk)
    await write(logs, author)
    author.add(b"\7", author.clock)
    disk.power_cut()
    _, again, _ = await loaded(disk)
    assert again.records == 2


async def test_archived_batches_are_kept_once(autojump_clock: object) -> None:
    disk = SimDisk()
    archive, logs, author = await loaded(disk)
    await write(logs, author)
    await archive.keep(kept(logs))
    await write(logs, author)
    own = len(await disk.read(OWN))
    disk.power_cut()
    archive, again, _ = await loaded(disk)
    assert kept(again) == kept(logs)
    await archive.keep(kept(again)[1:])
    assert len(await disk.read(OWN)) < own


async def test_a_rotten_bit_in_our_own_records_begins_another_log(autojump_clock: object) -> None:
    disk = SimDisk()
    _, logs, author = await loaded(disk)
    await write(logs, author)
    data = bytearray(await disk.read(OWN))
    data[len(data) // 2] ^= 1
    await disk.write_atomic(OWN, bytes(data))
    _, again, successor = await loaded(disk, seed=1)
    assert kept(again) == []
    assert successor.log != author.log


async def test_a_rotten_bit_in_a_segment_costs_that_segment(autojump_clock: object) -> None:
    disk = SimDisk()
    archive, logs, author = await loaded(disk)
    for _ in range(2):
        await write(logs, author)
        await archive.keep(kept(logs)[-1:])
    path = next(path for path, _ in await disk.list("records") if path != OWN)
    data = bytearray(await disk.read(path))
    data[-1] ^= 1
    await disk.write_atomic(path, bytes(data))
    assert len(await RecordArchive(disk).load()) == 1


@pytest.mark.parametrize("damaged", [0, 1, 2])
async def test_who_lost_a_part_of_its_own_log_begins_another(autojump_clock: object, damaged: int) -> None:
    """Going on from where the rest ends would be a fork, signed by an honest author."""
    disk = SimDisk()
    archive, logs, author = await loaded(disk)
    for _ in range(3):
        await write(logs, author)
        await archive.keep(kept(logs)[-1:])
    path = [path for path, _ in await disk.list("records") if path != OWN][damaged]
    data = bytearray(await disk.read(path))
    data[-1] ^= 1
    await disk.write_atomic(path, bytes(data))
    _, again, successor = await loaded(disk, seed=1)
    await write(again, successor, b"\7")
    for packed in kept(again):
        logs.offer(packed)
    assert not any(head.forked for head in logs.heads())
    assert successor.log != author.log


async def test_many_small_segments_become_one(autojump_clock: object) -> None:
    disk = SimDisk()
    archive, logs, author = await loaded(disk)
    for _ in range(3 * SEGMENTS_SMALL_MAX):
        await write(logs, author)
        await archive.keep(kept(logs)[-1:])
    assert len(await disk.list("records")) <= SEGMENTS_SMALL_MAX + 2
    _, again, _ = await loaded(disk)
    assert kept(again) == kept(logs)


async def test_a_full_disk_keeps_a_batch_from_being_said(autojump_clock: object) -> None:
    disk = SimDisk(capacity_bytes=600)
    _, logs, author = await loaded(disk)
    await write(logs, author)
    author.add(b"\1" * 4, author.clock)
    with pytest.raises(OSError, match="space"):
        await author.seal()
    assert author.open == 4
    disk.capacity_bytes = 1 << 20
    logs.offer(await author.seal())
    assert logs.records == 6


async def test_room_is_what_is_left_of_a_batch_or_of_our_share(autojump_clock: object) -> None:
    archive = RecordArchive(SimDisk())
    rules = LogRules(records_max=4, allowance=5, share_percent=0)
    logs = RecordLogs(run=RUN, signer=SIGNER, rules=rules)
    author = RecordAuthor(
        run=RUN, signer=SIGNER, logs=logs, archive=archive, rules=rules, rng=random.Random(0)
    )
    rooms = []
    for _ in range(2):
        rooms.append(author.room)
        author.add(b"\1" * min(3, author.room), author.clock)
        rooms.append(author.room)
        logs.offer(await author.seal())
    assert rooms == [4, 1, 2, 0]
    assert author.room == 0


async def test_a_batch_keeps_the_clock_at_which_it_was_begun(autojump_clock: object) -> None:
    """What others wrote while the first record was probed counts for the next batch; what a fork took away, too."""
    _, logs, author = await loaded(SimDisk())
    clock = author.clock
    other = CheapSigner(peer_named(2))
    for records in (b"\1\2\3", b"\3\2\1"):
        logs.offer(make(RUN, other, None, 1, 0, records))
        author.add(b"\7", clock)
    logs.offer(await author.seal())
    assert logs.last(author.log).clock == clock == 0


async def test_who_counted_what_a_fork_took_away_goes_on_in_another_log(autojump_clock: object) -> None:
    """Else one member could have everybody wait for ever: a flood in a moment, and then the proof of a fork."""
    archive = RecordArchive(SimDisk())
    rules = LogRules(records_max=4, allowance=1000, reach=10, opening_cost=5)
    logs = RecordLogs(run=RUN, signer=SIGNER, rules=rules)
    author = RecordAuthor(
        run=RUN, signer=SIGNER, logs=logs, archive=archive, rules=rules, rng=random.Random(0)
    )
    flooder = CheapSigner(peer_named(2))
    first = make(RUN, flooder, None, 1, 0, b"\1" * 4)
    logs.offer(first)
    before = next(batch for batch in logs.batches())
    for _ in range(30):
        packed = make(RUN, flooder, before, 1, 0, b"\1" * 4)
        logs.offer(packed)
        before = logs.last(before.log)
    await write(logs, author)
    assert logs.last(author.log).clock == 124
    assert not author.stranded
    logs.offer(make(RUN, flooder, None, 1, 0, b"\2"))
    assert logs.records == 0
    assert author.stranded
    assert not author.disowned
    author.begin_anew()
    assert not author.stranded
    await write(logs, author)
    assert logs.records == 2
