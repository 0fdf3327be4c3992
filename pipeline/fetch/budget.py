"""Resources that rows share and wait for: bytes in flight, requests to a host."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass


class Budget:
    """A counted resource that rows reserve and release, first come, first served."""

    def __init__(self, total: int):
        self.total = total
        self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def used(self) -> int:
        return self.total - self.free

    @property
    def wanted(self) -> int:
        """The total requested by all waiters."""
        return sum(size for size, turn in self._waiting if not turn.done())

    async def reserve(self, size: int) -> None:
        if self.free >= size and not self._waiting:
            self.free -= size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(size)
            raise

    def release(self, size: int) -> None:
        self.free += size
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self.free):
            needed, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= needed
                turn.set_result(None)

    def resize(self, total: int) -> None:
        """Changes the total. If more than `total` is in use, the excess is withdrawn as it is released."""
        more, self.total = total - self.total, total
        self.release(more)

    def fail(self, error: Exception) -> None:
        """Raises `error` in all current waiters."""
        while self._waiting:
            _, turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)


@dataclass
class Lease:
    """One row's reservation of a budget. Call `give_back` before the next `take`."""

    budget: Budget
    size: int = 0

    async def take(self, size: int) -> None:
        """Waits for `size`, or for the whole budget if that is less."""
        size = min(size, self.budget.total)
        await self.budget.reserve(size)
        self.size = size

    def keep(self, size: int) -> None:
        """Releases all but `size`."""
        if self.size > size:
            self.budget.release(self.size - size)
            self.size = size

    def give_back(self) -> None:
        self.keep(0)
