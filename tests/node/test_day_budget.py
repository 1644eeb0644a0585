"""What counts as today's traffic, whatever the clock and the process do, and what is said and kept of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from node.contact import Contact
from node.day_budget import DAY_S, UNSAVED_BYTES_MAX, BudgetKeeper, DayBudget, DayTraffic
from tests.conftest import Entries
from tests.gossip.world import MemoryDisk

NOON = 20_000.5 * DAY_S
PATH = "day_traffic.json"


def budget_of(upload: int = 0, download: int = 0, today: DayTraffic | None = None) -> DayBudget:
    budget = DayBudget(upload_bytes_max=upload, download_bytes_max=download)
    budget.today = today or DayTraffic()
    return budget


def test_a_day_adds_up_and_ends_at_midnight() -> None:
    budget = budget_of(upload=1000)
    budget.count(400, 10, NOON)
    budget.count(999, 20, NOON + DAY_S / 2 - 1)
    assert (budget.today, budget.problem) == (DayTraffic(20_000, 999, 20), "")
    budget.count(1000, 20, NOON + DAY_S / 2 - 1)
    assert budget.problem == (
        "today's data budget is spent: 1000 B sent; in touch again at 00:00 UTC; raise upload_bytes_per_day_max"
    )
    budget.count(1007, 25, NOON + DAY_S / 2)
    assert (budget.today, budget.problem) == (DayTraffic(20_001, 7, 5), "")


def test_each_direction_has_its_own_end_and_none_means_none() -> None:
    budget = budget_of(upload=1000, download=2000)
    budget.count(1500, 2500, NOON)
    assert "1.5 KiB sent, 2.4 KiB received" in budget.problem
    assert budget.problem.endswith("raise upload_bytes_per_day_max and download_bytes_per_day_max")
    unbounded = budget_of()
    assert unbounded.count(1 << 50, 1 << 50, NOON) == []
    assert unbounded.problem == ""


def test_a_warning_comes_once_a_day_and_not_again_after_a_restart() -> None:
    budget = budget_of(upload=1000, download=1000)
    told = [budget.count(sent, sent // 2, NOON) for sent in (700, 799, 800, 900, 1600, 1700)]
    assert told == [[], [], ["upload_bytes_per_day_max"], [], ["download_bytes_per_day_max"], []]
    assert budget_of(upload=1000, today=budget.today).count(1, 1, NOON) == []
    assert budget.count(2500, 1000, NOON + DAY_S) == ["upload_bytes_per_day_max"]


def test_totals_of_a_new_process_begin_at_zero_and_add_to_the_day() -> None:
    first = budget_of()
    first.count(600, 60, NOON)
    second = budget_of(upload=1000, today=first.today)
    second.count(300, 30, NOON + 60)
    assert (second.today, second.problem) == (DayTraffic(20_000, 900, 90), "")
    # And who comes back tomorrow begins anew.
    third = budget_of(upload=1000, today=second.today)
    third.count(5, 5, NOON + DAY_S)
    assert third.today == DayTraffic(20_001, 5, 5)


@pytest.mark.parametrize("back_s", [3600, DAY_S, 400 * DAY_S])
def test_a_clock_that_goes_back_gives_nothing_back(back_s: float) -> None:
    budget = budget_of(upload=1000)
    just_after_midnight = NOON + DAY_S / 2 + 60
    budget.count(1200, 0, just_after_midnight)
    budget.count(1300, 0, just_after_midnight - back_s)
    assert budget.today.bytes_sent == 1300
    assert budget.problem
    # The next midnight comes all the same, soon: a day that was far off is no day to wait for.
    budget.count(1301, 0, just_after_midnight - back_s + 2 * DAY_S)
    assert budget.problem == ""


class Moving:
    """A contact as far as its keeper looks at it; what it has moved is the test's to say."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        self.bytes_sent_today = self.bytes_received_today = 0
        self.ledger = SimpleNamespace(resting="")
        self.transport = SimpleNamespace(
            traffic=lambda: SimpleNamespace(bytes_sent=self.sent, bytes_received=self.received)
        )

    async def rest(self, why: str) -> None:
        self.ledger.resting = why

    def resume(self) -> None:
        self.ledger.resting = ""


async def keeper_on(disk: MemoryDisk, contact: Moving, **changes: Any) -> BudgetKeeper:
    settings: dict[str, Any] = {"upload_bytes_max": 0, "download_bytes_max": 0, "wall_time_s": lambda: NOON}
    keeper = BudgetKeeper(cast(Contact, contact), disk=disk, path=PATH, **settings | changes)
    await keeper.load()
    return keeper


async def test_the_count_outlasts_the_process_and_is_written_when_it_has_grown() -> None:
    disk, contact = MemoryDisk(), Moving()
    keeper = await keeper_on(disk, contact)
    contact.sent = UNSAVED_BYTES_MAX - 1
    await keeper._look()
    assert disk.files == {}
    contact.received = 1
    await keeper._look()
    assert json.loads(disk.files[PATH])["bytes_sent"] == UNSAVED_BYTES_MAX - 1
    contact.sent += 5
    await keeper.finish()
    again, now = Moving(), NOON
    later = await keeper_on(disk, again, upload_bytes_max=UNSAVED_BYTES_MAX, wall_time_s=lambda: now)
    await later._look()
    assert (again.bytes_sent_today, again.bytes_received_today) == (UNSAVED_BYTES_MAX + 4, 1)
    # Spent before its first word, so that it says none.
    assert again.ledger.resting == later.budget.problem != ""
    now += DAY_S
    await later._look()
    assert again.ledger.resting == ""


@pytest.mark.parametrize("damaged", [b"", b"{}x", b'{"day":-1}', b'{"day":1,"else":2}', b"\xff\xfe"])
async def test_a_damaged_file_is_reported_and_begins_at_zero(damaged: bytes, told: Entries) -> None:
    disk, contact = MemoryDisk(), Moving()
    disk.files[PATH] = damaged
    keeper = await keeper_on(disk, contact)
    assert [entry["log_level"] for entry in told] == ["warning"]
    contact.sent = 7
    await keeper.finish()
    assert json.loads(disk.files[PATH]) == {"day": 20_000, "bytes_sent": 7, "bytes_received": 0}
