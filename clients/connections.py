"""Request heads and bodies have time limits, and connections can't use up the program's own file descriptors."""

import asyncio
import os
import resource
import socket
import ssl
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from durable.errors import UsageError

HEAD_S = 30.0  # to receive a request's head, from its first byte or from the connection's start
MAX_HEAD_BYTES = 1 << 18
RESERVE = 64  # descriptors kept for the rest of the program, half of them for bursts of connections

connections: set["Connection"] = set()  # all open ones
idle: dict[int, Any] = {}  # descriptor -> socket of a connection without a complete request, the longest idle first


class Connection(socket.socket):
    def close(self) -> None:
        connections.discard(self)
        super().close()


class Listener(socket.socket):
    """If descriptors run short, the longest idle connection is closed for a new one. Otherwise `accept` would fail, and
    asyncio would log thousands of tracebacks a second."""

    def listen(self, *backlog: int) -> None:
        """uvicorn calls this when the engine runs and the program has opened all other descriptors that it needs."""
        taken = len(os.listdir("/proc/self/fd"))
        self.most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - taken - RESERVE
        super().listen(2048)

    def accept(self) -> tuple[socket.socket, Any]:
        plain, address = super().accept()
        connection = Connection(fileno=plain.detach())
        if len(connections) >= self.most:
            close_longest_idle()
        if len(connections) >= self.most + RESERVE // 2:  # a descriptor is freed a moment after the shutdown
            connection.close()
            raise ConnectionAbortedError  # asyncio ignores it
        connections.add(connection)
        idle.pop(connection.fileno(), None)  # a closed connection's old entry; the new one must come last
        idle[connection.fileno()] = connection
        return connection, address


def listen(host: str, port: int) -> Listener:
    """UsageError if the address can't be used."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        plain = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
        return Listener(fileno=plain.detach())
    except OSError as e:
        raise UsageError(f"--host={host} --port={port}: {e.strerror}") from e


def close_longest_idle() -> None:
    while idle:
        with suppress(OSError):  # it is closed already, by us or by the client
            idle.pop(next(iter(idle))).shutdown(socket.SHUT_RDWR)  # asyncio reads end of file, and closes it
            return


class Protocol(AutoHTTPProtocol):
    """uvicorn's protocol (h11 or httptools) with a time limit for a request's head. (For its body: `Capture`.)

    Relied on in uvicorn 0.54.0: `cycle` is the newest request, or None until the first one's head is complete;
    `on_response_complete` is called when a response is complete."""

    head_timer: asyncio.TimerHandle | None = None
    head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.socket = transport.get_extra_info("socket")
        self.number = self.socket.fileno()
        self.await_head()

    def await_head(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
        self.head_timer, self.head_bytes = None, 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        idle.pop(self.number, None)
        if self.cycle is None or self.cycle.response_complete:
            # The rest of a body that was not needed for the response is not counted.
            self.head_bytes += 0 if self.cycle and self.cycle.more_body else len(data)
            self.await_head()
            if self.head_bytes > MAX_HEAD_BYTES:
                self.transport.close()
        else:
            self.stop_timer()
            if not self.cycle.more_body:
                return
        idle[self.number] = self.socket

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # otherwise a pipelined request is already running
            idle[self.number] = self.socket

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_timer()
        idle.pop(self.number, None)
        super().connection_lost(exc)


class WebServer(uvicorn.Server):
    """uvicorn without its signal handlers: run.py decides when and in which order things stop."""

    def capture_signals(self) -> AbstractContextManager:
        return nullcontext()


def web_server(app: ASGIApp, certificate: str = "", key: str = "") -> WebServer:
    """A server for `app`.

    When it stops, running streams get 3 s to end. Idle connections stay open longer than clients keep them: otherwise
    one could be closed while a request is on its way. Warnings are not logged: anybody could fill the log with "Invalid
    HTTP request received". The backlog is how many connections asyncio accepts at a time, and how many tracebacks it
    logs each second if there are no file descriptors. (`Listener` sets the socket's own backlog.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65535 if hard == resource.RLIM_INFINITY else min(65535, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    options = {"timeout_graceful_shutdown": 3, "timeout_keep_alive": 75, "lifespan": "off", "ws": "none", "backlog": 1}
    options |= {"ssl_certfile": certificate or None, "ssl_keyfile": key or None}
    return WebServer(uvicorn.Config(app, http=Protocol, log_level="error", **options))


# ---- TLS ----


def check_tls(certificate: str, key: str) -> None:
    """UsageError if uvicorn could not use these files. Call it before the engine starts, which takes a while."""
    if certificate:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
        except OSError as e:
            raise UsageError(f"--ssl_certfile={certificate} --ssl_keyfile={key}: {e}") from e


def trusting(certificate: str) -> ssl.SSLContext | bool:
    """How the program's own client verifies the server: its certificate must be this one, whatever its issuer and name.
    Without a certificate, as httpx does by default."""
    if not certificate:
        return True
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust it without its issuer
    return context
