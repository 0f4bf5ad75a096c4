"""A long-running command whose handle() is a coroutine function."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from django_dbhealth import LongRunningCommand
from tests.app.models import Row


class Command(LongRunningCommand):
    stop_grace = 2.0

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("scenario")

    async def handle(self, *args: Any, scenario: str, **options: Any) -> str:
        await getattr(self, scenario)()
        return f"{await Row.objects.acount()} rows"

    async def steps(self) -> None:
        async with self.step("First"):
            await Row.objects.acreate(name="first")
            await self.asleep(0.01)
            for number in self.track([1, 2], "numbers"):
                await Row.objects.acreate(name=f"number {number}")

    async def sleeping(self) -> None:
        await Row.objects.acreate(name="finished")
        os.write(1, b"<ready>\n")
        try:
            await self.asleep(60)
        finally:
            await Row.objects.acreate(name="cleaned up")

    async def stuck(self) -> None:
        async with self.step("Stuck"):
            await Row.objects.acreate(name="finished")
            os.write(1, b"<ready>\n")
            await asyncio.sleep(60)

    async def items(self) -> None:
        self.stop_grace = 60.0
        await Row.objects.abulk_create(Row(name=f"row {number}") for number in range(9))
        async for row in self.track(Row.objects.all(), "rows"):
            os.write(1, b"<ready>\n")
            await asyncio.to_thread(sys.stdin.readline)
            await Row.objects.filter(pk=row.pk).aupdate(number=1)

    async def blocking_sleep(self) -> None:
        self.sleep(1)

    async def group(self) -> None:
        self.stop_grace = 60.0

        async def step() -> None:
            async with self.step("Slow"):
                os.write(1, b"<ready>\n")
                await asyncio.to_thread(sys.stdin.readline)
                await Row.objects.acreate(name="step done")

        async def sleeper() -> None:
            await self.asleep(60)

        await asyncio.gather(step(), sleeper())
