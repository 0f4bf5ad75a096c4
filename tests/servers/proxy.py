"""A TCP proxy on which everything that goes wrong between client and server can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Coroutine

CHUNK = 65536
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 seconds


class Proxy:
    """Forward 127.0.0.1:`port` to a server, from a thread of its own."""

    host = "127.0.0.1"

    def __init__(self, target_host: str, target_port: int) -> None:
        self._target = (target_host, target_port)
        self.port = 0  # known once started; it stays
        self._delay = 0.0
        self._silent = False
        self._only_one_byte = False
        self.carried = 0  # bytes, both ways
        self._links: dict[asyncio.Task[None], list[socket.socket]] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def connections(self) -> int:
        """The clients that are connected now."""
        return len(self._links)

    def start(self) -> None:
        """Start to listen and to forward."""
        self._loop = asyncio.new_event_loop()
        self._acceptor: asyncio.Task[None] | None = None
        self._forwarding = asyncio.Event()
        self._forwarding.set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.listen()

    def stop(self) -> None:
        """Close everything."""
        self.refuse()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def refuse(self) -> None:
        """Refuse new connections; those there are go on."""
        self._call(self._refuse())

    def listen(self) -> None:
        """Accept new connections again, on the same port."""
        self._call(self._listen())

    def lead_to(self, target_host: str, target_port: int) -> None:
        """Forward new connections to another server; those there are go on."""
        self._target = (target_host, target_port)

    def cut(self) -> None:
        """Close all connections, on both sides."""
        self._call(self._close_links())

    def reset(self) -> None:
        """Close all connections with a RST, on both sides."""
        self._call(self._close_links(reset=True))

    def swallow(self) -> None:
        """Throw all bytes away, a close included, as a firewall does that has dropped the flow."""
        self._call(self._forward(False))

    def delay(self, seconds: float) -> None:
        """Hold every piece of data for a time, in both directions."""
        self._delay = seconds

    def trickle(self) -> None:
        """Pass on the first byte of the server's next answer, and throw away all that follows."""
        self._only_one_byte = True

    def accept_silently(self) -> None:
        """Accept new connections and never forward them."""
        self._silent = True

    def pass_through(self) -> None:
        """Forward again what comes from now on, and what was closed meanwhile."""
        self._silent = self._only_one_byte = False
        self._delay = 0.0
        self._call(self._forward(True))

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _forward(self, on: bool) -> None:
        # Waited for by the caller, so that what comes after the call finds the way as it was asked.
        if on:
            self._forwarding.set()
        else:
            self._forwarding.clear()

    async def _listen(self) -> None:
        if self._acceptor is not None:
            return
        listener = socket.create_server((self.host, self.port), backlog=128)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._acceptor = self._loop.create_task(self._accept(listener))

    async def _refuse(self) -> None:
        if self._acceptor is None:
            return
        self._acceptor.cancel()
        await asyncio.wait([self._acceptor])
        self._acceptor = None

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                sockets = [client]
                link = self._loop.create_task(self._link(sockets))
                self._links[link] = sockets
                link.add_done_callback(self._drop)

    def _drop(self, link: asyncio.Task[None]) -> None:
        # Here, not in the task: a task that is cancelled before its first step runs no code.
        for each in self._links.pop(link):
            each.close()

    async def _close_links(self, *, reset: bool = False) -> None:
        links = dict(self._links)
        for link, sockets in links.items():
            for each in sockets:
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            link.cancel()
        if links:
            await asyncio.wait(links)

    async def _link(self, sockets: list[socket.socket]) -> None:
        """Carry one client's bytes both ways until either side closes."""
        [client] = sockets
        if self._silent:
            await self._drain(client)
            return
        server = socket.socket()
        sockets.append(server)
        server.setblocking(False)
        for each in sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # the client then finds itself hung up on
            await self._loop.sock_connect(server, self._target)
            await self._either(self._pump(client, server), self._pump(server, client))

    async def _either(self, *pumps: Coroutine[Any, Any, None]) -> None:
        tasks = [self._loop.create_task(pump) for pump in pumps]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await self._loop.sock_recv(source, CHUNK):
                if not self._forwarding.is_set():
                    continue
                if self._delay:
                    await asyncio.sleep(self._delay)
                if self._only_one_byte and source.getpeername() == self._target:
                    data = data[:1]
                    self._forwarding.clear()
                await self._loop.sock_sendall(target, data)
                self.carried += len(data)
        await self._forwarding.wait()

    async def _drain(self, client: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while await self._loop.sock_recv(client, CHUNK):
                pass
