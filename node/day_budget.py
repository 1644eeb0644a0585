"""A data budget for each day: how much was moved since 00:00 UTC, and when to keep away from the swarm until the next.

Owns that count, which goes on across restarts, and the decision to rest and to come back. Never touches a connection:
``node.contact`` leaves and returns when it is told to. Bytes are those that the transport counts, so what carries them
below (TCP and IP, name lookups, the local network's announcements) comes on top.

A clock may be wrong. One that goes back does not give back what was spent: until it says a later day than before, what
is moved belongs to the day before. Only a day that is further ahead than tomorrow is taken for a mistake; then today
begins with what was spent. A budget is exceeded by what passes within ``LOOK_S`` and a goodbye, and a process that is
killed forgets at most ``UNSAVED_BYTES_MAX`` and what passed since the last look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import msgspec
import structlog
import trio
from msgspec import Meta

from gossip.disk import Disk
from node.config import format_bytes
from node.contact import Contact

DAY_S = 86_400
LOOK_S = 2.0
"""Between two looks at what was moved."""
WARN_SHARE = 0.8
"""Of a budget; once so much is used, that is worth a line of the log."""
UNSAVED_BYTES_MAX = 16 << 20
"""What may be moved before the count is written again: an idle node writes rarely."""

log = structlog.get_logger()


class DayTraffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was moved on one day; the file is this as JSON."""

    day: Annotated[int, Meta(ge=0)] = 0
    """Days since 1970-01-01, UTC."""
    bytes_sent: Annotated[int, Meta(ge=0)] = 0
    bytes_received: Annotated[int, Meta(ge=0)] = 0


class DayBudget:
    """The count and its bounds, of which 0 is none. IO-free: totals and the time are passed in."""

    def __init__(self, *, upload_bytes_max: int, download_bytes_max: int) -> None:
        self.today = DayTraffic()
        """To begin with, what earlier processes have moved, on whichever day that was."""
        self._upload_bytes_max = upload_bytes_max
        self._download_bytes_max = download_bytes_max
        self._sent_total = 0
        self._received_total = 0

    def count(self, sent_total: int, received_total: int, now_unix_s: float) -> list[str]:
        """Add what this process has moved since the last call, given all that it has moved by now.

        Returns the settings of those budgets of which WARN_SHARE is used as of this call.
        """
        before = self._on(int(now_unix_s // DAY_S))
        self.today = DayTraffic(
            before.day,
            before.bytes_sent + sent_total - self._sent_total,
            before.bytes_received + received_total - self._received_total,
        )
        self._sent_total, self._received_total = sent_total, received_total
        used_before = [used for _, _, used, _ in self._uses(before)]
        return [
            setting
            for (setting, _, used, bytes_max), earlier in zip(
                self._uses(self.today), used_before, strict=True
            )
            if earlier < WARN_SHARE * bytes_max <= used
        ]

    @property
    def problem(self) -> str:
        """That a budget is spent, until when, and what to do about it; empty when none is."""
        spent = [
            (setting, f"{format_bytes(used)} {verb}")
            for setting, verb, used, bytes_max in self._uses(self.today)
            if used >= bytes_max
        ]
        if not spent:
            return ""
        return (
            f"today's data budget is spent: {', '.join(amount for _, amount in spent)}; "
            f"in touch again at 00:00 UTC; raise {' and '.join(setting for setting, _ in spent)}"
        )

    def _on(self, day: int) -> DayTraffic:
        """What was moved so far on the day that counts when the clock says ``day``."""
        if day > self.today.day:
            return DayTraffic(day)
        if day < self.today.day - 1:
            return msgspec.structs.replace(self.today, day=day)
        return self.today

    def _uses(self, traffic: DayTraffic) -> Iterator[tuple[str, str, int, int]]:
        """Of each budget there is: its setting, what it bounds, how much of that there was, and the bound."""
        if self._upload_bytes_max:
            yield "upload_bytes_per_day_max", "sent", traffic.bytes_sent, self._upload_bytes_max
        if self._download_bytes_max:
            yield "download_bytes_per_day_max", "received", traffic.bytes_received, self._download_bytes_max


class BudgetKeeper:
    """Keeps ``contact`` within a budget, and the count in the file ``path``, which is the machine's and not a run's."""

    def __init__(
        self,
        contact: Contact,
        *,
        upload_bytes_max: int,
        download_bytes_max: int,
        disk: Disk,
        path: str,
        wall_time_s: Callable[[], float],
    ) -> None:
        self.budget = DayBudget(upload_bytes_max=upload_bytes_max, download_bytes_max=download_bytes_max)
        self._contact = contact
        self._disk = disk
        self._path = path
        self._wall_time_s = wall_time_s
        self._unsaved_bytes = 0

    async def load(self) -> None:
        """Take up what earlier processes have counted. A damaged file is reported, and the count begins at zero."""
        try:
            self.budget.today = msgspec.json.decode(await self._disk.read(self._path), type=DayTraffic)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("today's traffic is not known, counting from zero", path=self._path, error=str(error))

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Look until cancelled. Started once it is known whether there is anything left of today's budget."""
        await self._look()
        task_status.started()
        while True:
            await trio.sleep(LOOK_S)
            await self._look()

    async def finish(self) -> None:
        """Write the final count, once ``run`` has ended."""
        self._count()
        await self._save()

    async def _look(self) -> None:
        self._count()
        resting, problem = bool(self._contact.ledger.resting), self.budget.problem
        if problem and not resting:
            log.warning("keeping away from the swarm", problem=problem)
            await self._contact.rest(problem)
        elif resting and not problem:
            log.info("a new day, with a new data budget")
            self._contact.resume()
        if self._unsaved_bytes >= UNSAVED_BYTES_MAX or bool(problem) is not resting:
            await self._save()

    def _count(self) -> None:
        traffic, before = self._contact.transport.traffic(), self.budget.today
        for setting in self.budget.count(traffic.bytes_sent, traffic.bytes_received, self._wall_time_s()):
            log.warning("most of today's data budget is used", setting=setting, share=WARN_SHARE)
        today = self.budget.today
        self._contact.bytes_sent_today = today.bytes_sent
        self._contact.bytes_received_today = today.bytes_received
        self._unsaved_bytes += max(0, today.bytes_sent - before.bytes_sent)
        self._unsaved_bytes += max(0, today.bytes_received - before.bytes_received)

    async def _save(self) -> None:
        self._unsaved_bytes = 0
        try:
            await self._disk.write_atomic(self._path, msgspec.json.encode(self.budget.today))
        except OSError as error:
            log.warning("today's traffic not saved", path=self._path, error=error.strerror)
