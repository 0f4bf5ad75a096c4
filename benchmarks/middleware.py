"""Measure what DatabaseUnavailableMiddleware costs a healthy request, as a ratio within one run.

Run by hand; benchmarks/README.md says how. The request is to an empty view, through all of Django:
from the environ or scope to the response's last byte. Each comparison is made inside one process,
by turns, for the reasons that guard.py gives; the statistics are guard.py's too. What is taken is
the process's processor time: nothing waits here, and other programs' time is not the middleware's.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import django  # noqa: E402
from django.conf import settings  # noqa: E402
from django.core.handlers.asgi import ASGIHandler  # noqa: E402
from django.core.handlers.wsgi import WSGIHandler  # noqa: E402
from django.http import HttpResponse  # noqa: E402
from django.test import override_settings  # noqa: E402
from django.urls import path  # noqa: E402

from benchmarks.guard import (  # noqa: E402
    CONFIDENCE,
    interval_of,
    microseconds,
    rounds_of,
    write_between_markers,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from django.http import HttpRequest

    from benchmarks.guard import Block

OURS = "django_dbhealth.middleware.DatabaseUnavailableMiddleware"
TARGET = 1.02
MARKERS = "<!-- middleware -->", "<!-- /middleware -->"
BLOCK = 2  # requests
ROUNDS = 500  # of four blocks


def empty(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


async def empty_async(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


urlpatterns = [path("", empty), path("async/", empty_async)]


# One request


def start_response(status: str, headers: list[tuple[str, str]]) -> None:
    assert status == "200 OK"


def wsgi_block(handler: WSGIHandler) -> Block:
    def block(count: int) -> float:
        begun = time.process_time()
        for _ in range(count):
            environ = {
                "REQUEST_METHOD": "GET",
                "PATH_INFO": "/",
                "SERVER_NAME": "127.0.0.1",
                "SERVER_PORT": "80",
                "wsgi.input": BytesIO(),
            }
            response: Any = handler(environ, start_response)
            b"".join(response)
            response.close()
        return float(time.process_time() - begun)

    return block


def asgi_block(handler: ASGIHandler, runner: asyncio.Runner) -> Block:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/async/",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
    }

    async def request() -> None:
        messages = [{"type": "http.request"}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # no disconnect
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            assert message.get("status", 200) == 200

        await handler(scope, receive, send)

    async def requests(count: int) -> float:
        begun = time.process_time()
        for _ in range(count):
            await request()
        return float(time.process_time() - begun)

    return lambda count: runner.run(requests(count))


# One process


def blocks_of(case: str, runner: asyncio.Runner) -> tuple[Block, Block]:
    """Return the requests with the middleware, or for the control without, and without."""
    found = []
    for middleware in ([] if "control" in case else [OURS], []):
        with override_settings(MIDDLEWARE=middleware):
            if case.startswith("WSGI"):
                found.append(wsgi_block(WSGIHandler()))
            else:
                found.append(asgi_block(ASGIHandler(), runner))
    return found[0], found[1]


CASES = {
    "WSGI": "empty view under WSGI, with the middleware / without",
    "ASGI": "empty async view under ASGI, with the middleware / without",
    "WSGI control": "control: under WSGI, without / without",
    "ASGI control": "control: under ASGI, without / without",
}


def work() -> None:
    """Measure each case in this process and print the medians of its rounds, as JSON."""
    settings.configure(
        SECRET_KEY="only-for-benchmarks",
        ALLOWED_HOSTS=["127.0.0.1"],
        ROOT_URLCONF=__name__,
        INSTALLED_APPS=["django_dbhealth"],
    )
    django.setup()
    results = {}
    with asyncio.Runner() as runner:
        for case in CASES:
            first, second = blocks_of(case, runner)
            for block in (first, second):
                block(100)  # warm
            gc.collect()
            gc.disable()
            firsts, seconds = rounds_of(first, second, BLOCK, ROUNDS)
            gc.enable()
            ratio = median(a / b for a, b in zip(firsts, seconds, strict=True))
            results[case] = [median(firsts), median(seconds), ratio]
    print(json.dumps(results))


# All processes


def rows(processes: Sequence[dict[str, list[float]]]) -> list[tuple[str, float, str]]:
    """Return for each case: its ratio, and the line of the table."""
    found = []
    for case, title in CASES.items():
        firsts, seconds, ratios = zip(*(each[case] for each in processes), strict=True)
        low, high = interval_of(ratios)
        ratio = median(ratios)
        target = "-" if "control" in case else f"{TARGET:.2f}"
        times = f"{microseconds(median(firsts))} / {microseconds(median(seconds))}"
        line = f"| {title} | {target} | {times} | {ratio:.3f} ({low:.3f} to {high:.3f}) |"
        found.append((case, ratio, line))
    return found


def report(lines: Sequence[str], processes: int) -> str:
    requests = 2 * BLOCK * ROUNDS * processes
    return "\n".join(
        [
            "|  | at most | µs | ratio |",
            "|---|---|---|---|",
            *lines,
            "",
            f"Measured on {time.strftime('%Y-%m-%d')} with Django {django.get_version()}, Python",
            f"{sys.version.partition(' ')[0]}. Each number stands for {requests:,} requests a side",
            f"in {processes} processes; in parentheses the {CONFIDENCE:.0%} confidence interval.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the target is missed")
    parser.add_argument("--output", type=Path, help="a Markdown page to write the table into")
    parser.add_argument("--processes", type=int, default=20, help="how many, one after the other")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    command = [sys.executable, __file__, "--worker"]
    environment = {**os.environ, "PYTHONHASHSEED": "random"}
    processes = [
        json.loads(subprocess.run(command, check=True, env=environment, stdout=-1).stdout)
        for _ in range(options.processes)
    ]
    found = rows(processes)
    text = report([line for _, _, line in found], len(processes))
    print(text)
    if options.output:
        write_between_markers(options.output, text, MARKERS)
    missed = [
        case for case, ratio, _ in found if "control" not in case and round(ratio, 3) > TARGET
    ]
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
