"""A long-running command with a scenario for each thing that can happen to one."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from typing import Any

from django.core.management import CommandError, call_command
from django.db import transaction

from django_dbhealth import LongRunningCommand, backoff
from tests.app.models import Row


def insert(name: str) -> None:
    Row.objects.create(name=name)


def be_stuck() -> None:
    """Sleep for a minute, in pieces: a signal just before a system call does not end that one."""
    for _ in range(600):
        time.sleep(0.1)


def sleep_in_a_child(begun: Any) -> None:
    begun.set()
    be_stuck()


class Command(LongRunningCommand):
    help = "Run a scenario."
    stop_grace = 2.0

    def add_arguments(self, parser: Any) -> None:  # without super(), as many commands do
        parser.add_argument("scenario")

    def handle(self, *args: Any, scenario: str, **options: Any) -> str | None:
        return getattr(self, scenario)()

    def tell(self, event: str) -> None:
        """Tell the test that something is reached; the terminal may be gone."""
        os.write(1, f"<{event}>\n".encode())

    def one_row(self) -> None:
        Row.objects.create(name="row")

    def one_row_late(self) -> None:
        backoff.FIRST_DELAY = 60.0
        self.one_row()

    def three_steps(self) -> None:
        for number in range(3):
            with self.step(f"Step {number}"):
                insert(f"{number} before")
                self.tell(f"pause {number}")
                self.sleep(4)
                insert(f"{number} after")
            self.tell(f"between {number}")
            sys.stdin.readline()

    def slow_step(self) -> None:
        insert("before")
        with self.step("Download"):
            self.tell("inside")
            sys.stdin.readline()

    def sleeping(self) -> None:
        with self.step("Write"):
            insert("finished")
        self.tell("ready")
        self.sleep(60)

    def sleeping_in_a_step(self) -> None:
        with self.step("Write and sleep"):
            insert("finished")
            self.tell("ready")
            self.sleep(60)

    def stuck_step(self) -> None:
        with self.step("Write"):
            insert("finished")
        with self.step("Stuck"), transaction.atomic():
            insert("rolled back")
            self.tell("ready")
            be_stuck()

    def stuck_step_with_time(self) -> None:
        self.stop_grace = 60.0
        self.stuck_step()

    def short_step(self) -> None:
        self.stop_grace = 60.0
        with self.step("Short"):
            self.tell("ready")
            sys.stdin.readline()
            insert("finished")
        with self.step("Next"):
            insert("never begun")

    def items(self) -> None:
        self.stop_grace = 60.0
        for number in self.track(range(100), "rows"):
            self.tell("ready")
            sys.stdin.readline()
            insert(f"item {number}")

    def without_steps(self) -> None:
        insert("finished")
        self.tell("ready")
        be_stuck()

    def deaf(self) -> None:
        """Catch what a careless loop catches."""
        while True:
            try:
                with self.step("Deaf"):
                    self.tell("ready")
                    be_stuck()
            except Exception:
                insert("never caught")

    def failing(self) -> None:
        with self.step("Save prices"):
            insert("kept")
            raise LookupError("no such price")

    def failing_politely(self) -> None:
        with self.step("Save prices"):
            raise CommandError("The supplier has no prices today.")

    def own_transaction(self) -> None:
        with transaction.atomic():
            insert("rolled back")
            with self.step("Download"):
                pass

    def talkative(self) -> None:
        self.tell("ready")
        sys.stdin.readline()
        for number in range(200):
            self.stdout.write(f"line {number} {'x' * 500}")
        self.stderr.write("and an error")
        for number in self.track(range(3), "rows"):
            with self.step(f"Step {number}"):
                insert(f"row {number}")

    def progress(self) -> None:
        with self.step("Save"):
            for number in self.track((n for n in range(3)), "things"):
                for _ in self.track(range(4), "parts"):
                    pass
                self.stdout.write(f"thing {number}")

    def many_loops(self) -> None:
        for _ in self.track(range(1000), "outer"):
            for _ in self.track(range(3), "inner"):
                pass
        for _ in self.track(range(1), "outer"):
            for _ in self.track(range(3), "slow"):
                time.sleep(0.11)

    def child(self) -> None:
        with self.step("Child"):
            context = multiprocessing.get_context("fork")
            begun = context.Event()
            process = context.Process(target=sleep_in_a_child, args=[begun])
            process.start()
            begun.wait(10)  # Python forgets a signal that comes before
            process.terminate()
            process.join(10)
            self.stdout.write(f"exit code {process.exitcode}")
            process.kill()

    def nested(self) -> None:
        self.stop_grace = 60.0
        call_command("job", "short_step")

    def returns_text(self) -> str:
        return "done"
