"""A site in a process of its own, served by gunicorn or uvicorn, and clients for it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent

WSGI = "django.core.wsgi:get_wsgi_application()"
ASGI = "django.core.asgi:get_asgi_application"

# Each without its log of requests; {fd} is a socket that listens already.
GUNICORN = ["-m", "gunicorn", WSGI, "--bind=fd://{fd}", "--log-level=warning"]
SERVERS = {
    "gunicorn sync": [*GUNICORN, "--workers=4"],
    "gunicorn gthread": [*GUNICORN, "--worker-class=gthread", "--threads=50"],
    "uvicorn": ["-m", "uvicorn", "--factory", ASGI, "--fd={fd}", "--log-level=warning"],
}


class Site:
    """A site that is being served."""

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def client(self) -> Iterator[http.client.HTTPConnection]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(client):
            yield client

    def get(self, path: str) -> http.client.HTTPResponse:
        """Return the response, whose body was read already."""
        with self.client() as client:
            client.request("GET", path)
            response = client.getresponse()
            response.read()
            return response

    def raw(self, path: str, method: str = "GET") -> bytes:
        """Return all bytes of the answer, its headers among them; in one piece, as of old."""
        request = f"{method} {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
            client.sendall(request.encode())
            return b"".join(iter(lambda: client.recv(65536), b""))


@contextmanager
def served(
    by: str,
    databases: Mapping[str, Mapping[str, Any]],
    *options: str,
    settings: str = "tests.site_settings",
    **dbhealth: Any,
) -> Iterator[Site]:
    """Serve tests/site.py with these databases and these keys of DBHEALTH."""
    environment = {
        "DJANGO_SETTINGS_MODULE": settings,
        "DATABASES": json.dumps(databases),
        "DBHEALTH": json.dumps(dbhealth),
    }
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        command = [each.format(fd=listener.fileno()) for each in (*SERVERS[by], *options)]
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Site(listener.getsockname()[1])
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
