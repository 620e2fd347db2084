"""Sockets between rank 0, which schedules, and every other rank.

Two connections each, so that no thread waits behind another:

    orders   rank 0 -> rank: frames (kind, size, bytes): plans of steps, and what to do at start and
             end. Back: the tokens that the last stage drew.
    life     rank -> rank 0: lines of JSON: that it is there, once a second; why it ends. When
             either side's end of it closes, the other knows within milliseconds.

Nothing is pickled: plans are int64 arrays (`engine/plan_wire.py`), everything else is JSON. A
caller must know the run's secret, which travels through the rendezvous store.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .._errors import first_line

_HEADER = struct.Struct("<qq")  # kind, bytes that follow
PLAN, BLOCKS, RESULT, SAY, REPORT, CLOSE = range(6)
HEARTBEAT_S = 1.0
START_S = 1800.0  # for everybody to have loaded the model; a rank that dies is noticed at once
_HELLO_S = 5.0  # for a caller to say who it is
_LONGEST_LINE = 1 << 16
_LATE = ("timed out waiting", "application timeout")  # says gloo of a collective
_ANY = ("0.0.0.0", "::")  # addresses that stand for all interfaces


class RankError(RuntimeError):
    """A process of the run has died, hangs or cannot go on. The engine is of no use any more."""


@dataclass(slots=True)
class _Peer:
    """What rank 0 knows of another rank."""

    rank: int
    orders: socket.socket
    life: socket.socket
    seen: float = 0.0  # when it last said anything
    said: list[dict[str, Any]] = field(default_factory=list)  # answers not yet taken


class Hub:
    """Rank 0's side.

    Args:
        size: Ranks, this one included.
        listener: Where the others connect; closed when all have.
        timeout: Seconds within which everybody has to answer, once all have started.
        ended: Exit code of a rank's process, if it has ended and this machine knows.
    """

    def __init__(
        self,
        size: int,
        *,
        listener: socket.socket,
        timeout: float,
        ended: Callable[[int], int | None] = lambda rank: None,
    ) -> None:
        self.size, self.timeout, self._ended = size, timeout, ended
        self._secret = secrets.token_hex(16)
        self._listener = listener
        self._peers: dict[int, _Peer] = {}
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._closing = False
        self._threads: list[threading.Thread] = []
        self.loaded = False  # until then collectives may take START_S
        self.on_failure: Callable[[], object] = lambda: None  # in another thread

    def address(self, host: str) -> str:
        """What `Spoke` needs; `host` is how others reach this machine, where the hub listens on
        every interface of it.
        """
        bound, port = self._listener.getsockname()[:2]
        return json.dumps([host if bound in _ANY else bound, port, self._secret])

    def accept(self) -> None:
        """Wait for every rank.

        Raises:
            RankError: One has ended, or did not come in time.
        """
        found: dict[int, dict[str, socket.socket]] = {}
        end = time.monotonic() + START_S
        self._listener.settimeout(0.2)
        while sum(len(pair) for pair in found.values()) < 2 * (self.size - 1):
            for rank in range(1, self.size):
                code = self._ended(rank)
                if code is not None:
                    raise RankError(f"LLM: rank {rank} ended while starting (exit code {code})")
            if time.monotonic() > end:
                late = [rank for rank in range(1, self.size) if len(found.get(rank, ())) < 2]
                raise RankError(
                    f"LLM: ranks {late} of {self.size} did not start within {START_S:g} s"
                )
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                hello = json.loads(_read_line(connection, _HELLO_S))
                if not secrets.compare_digest(str(hello["secret"]), self._secret):
                    raise ValueError("wrong secret")
                found.setdefault(int(hello["rank"]), {})[str(hello["kind"])] = connection
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()
        self._listener.close()
        for rank, pair in sorted(found.items()):
            for connection in pair.values():
                _tune(connection)
                connection.settimeout(None)
            pair["orders"].settimeout(self.timeout)  # a rank that reads nothing must not hold us
            peer = _Peer(rank, pair["orders"], pair["life"], time.monotonic())
            self._peers[rank] = peer
            thread = threading.Thread(target=self._watch, args=(peer,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _watch(self, peer: _Peer) -> None:
        reason = ""
        try:
            with peer.life.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    message = json.loads(line)
                    peer.seen = time.monotonic()
                    if "error" in message:
                        reason = message["error"]
                        break
                    if "alive" not in message:
                        with self._changed:
                            peer.said.append(message)
                            self._changed.notify_all()
        except (OSError, ValueError):
            pass
        if self._closing:
            return
        if _is_late(reason):
            self._late_collective()
            return
        if not reason:
            code = None
            for _ in range(20):  # the connection closes before the process has ended
                code = self._ended(peer.rank)
                if code is not None:
                    break
                time.sleep(0.05)
            reason = "ended unexpectedly" + ("" if code is None else f" (exit code {code})")
        self.fail(f"LLM: rank {peer.rank} of {self.size}: {reason}")

    def fail(self, why: str) -> None:
        """Note that the run is over; the first reason counts."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure = why
            self._changed.notify_all()
        self.on_failure()

    @property
    def failure(self) -> str | None:
        """Why the run is over; None while it is not."""
        return self._failure

    def check(self) -> None:
        """Raise RankError if the run is over."""
        if self._failure is not None:
            raise RankError(self._failure)

    def explain(self, error: BaseException, what: str = "") -> RankError:
        """What to tell instead of an error of this rank's: it often only follows from another's.

        Args:
            error: The error.
            what: Was done with a socket.
        """
        end = time.monotonic() + 3.0
        with self._changed:
            while self._failure is None and time.monotonic() < end:
                self._changed.wait(0.1)
        if self._failure is None and what and isinstance(error, TimeoutError):
            return self.late(what)
        if self._failure is None and _is_late(str(error)):
            return self._late_collective()
        if self._failure is None:
            self.fail(f"LLM: rank 0 of {self.size}: {first_line(error)}{self._silent()}")
        assert self._failure is not None
        return RankError(self._failure)

    def late(self, what: str, timeout: float | None = None) -> RankError:
        """What to tell when something took longer than `timeout`; None: `distributed_timeout`."""
        limit = f"{timeout:g} s" if timeout else f"distributed_timeout ({self.timeout:g} s)"
        self.fail(f"LLM: {what} took longer than {limit}{self._silent()}")
        assert self._failure is not None
        return RankError(self._failure)

    def _late_collective(self) -> RankError:
        return self.late(f"a collective of {self.size} ranks", None if self.loaded else START_S)

    def _silent(self) -> str:
        now = time.monotonic()
        ranks = [p.rank for p in self._peers.values() if now - p.seen > 3 * HEARTBEAT_S]
        return f"; nothing was heard from rank {', '.join(map(str, ranks))}" if ranks else ""

    def order(self, kind: int, payload: bytes = b"") -> None:
        """Send a frame to every rank."""
        frame = _HEADER.pack(kind, len(payload)) + payload
        for peer in self._peers.values():
            try:
                peer.orders.sendall(frame)
            except OSError as error:
                raise self.explain(error, f"an order to rank {peer.rank}") from error

    def gather(self, what: str, timeout: float | None = None) -> list[dict[str, Any]]:
        """One answer of every other rank, in their order.

        Raises:
            RankError: One failed, or was late.
        """
        end = time.monotonic() + (timeout or self.timeout)
        with self._changed:
            while not all(peer.said for peer in self._peers.values()):
                self.check()
                if time.monotonic() > end:
                    break
                self._changed.wait(0.2)
            else:
                return [self._peers[rank].said.pop(0) for rank in sorted(self._peers)]
        raise self.late(what, timeout)

    def result(self, rank: int) -> bytes:
        """The next RESULT frame of a rank.

        Raises:
            RankError: Somebody failed, or it was late.
        """
        orders = self._peers[rank].orders
        end = time.monotonic() + self.timeout
        try:
            while True:
                self.check()  # first: the socket may be closed
                if select.select([orders], [], [], 0.1)[0]:
                    break
                if time.monotonic() > end:
                    raise self.late("a step")
            kind, payload = read_frame(orders)
        except (OSError, ValueError) as error:
            raise self.explain(error, "a step") from error
        assert kind == RESULT
        return payload

    def close(self) -> None:
        """Tell every rank to end."""
        self._closing = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.orders.settimeout(1.0)
                peer.orders.sendall(_HEADER.pack(CLOSE, 0))

    def wait_closed(self, seconds: float) -> None:
        """Wait until every rank has hung up."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))

    def hang_up(self) -> None:
        """Close the connections; a rank that still runs ends itself."""
        self._closing = True
        self._listener.close()
        for peer in self._peers.values():
            for connection in (peer.orders, peer.life):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()


class Spoke:
    """The side of another rank.

    Args:
        address: Of the hub.
        rank: Of this process.
    """

    def __init__(self, address: str, rank: int) -> None:
        host, port, secret = json.loads(address)
        self.rank = rank
        self._orders, self._life = (
            self._connect(host, port, {"secret": secret, "rank": rank, "kind": kind})
            for kind in ("orders", "life")
        )
        self._lock = threading.Lock()
        self.done = False
        self.on_end: Callable[[], object] = lambda: None  # before this process ends with rank 0
        threading.Thread(target=self._live, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()

    @staticmethod
    def _connect(host: str, port: int, hello: dict[str, Any]) -> socket.socket:
        connection = socket.create_connection((host, port), timeout=30)
        connection.settimeout(None)
        _tune(connection)
        connection.sendall(json.dumps(hello).encode() + b"\n")
        return connection

    def _live(self) -> None:
        while not self.done:
            try:
                self.say({"alive": True})
            except OSError:
                return
            time.sleep(HEARTBEAT_S)

    def _listen(self) -> None:
        """Rank 0 says nothing here: when reading ends, it has. So must this process, which may be
        in the middle of a collective that nobody answers.
        """
        with contextlib.suppress(OSError):
            self._life.recv(1)
        if not self.done:
            with contextlib.suppress(Exception):
                self.on_end()
            os._exit(1)

    def close(self) -> None:
        """Leave in peace."""
        self.done = True
        for connection in (self._life, self._orders):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def say(self, message: dict[str, Any]) -> None:
        """Send a line to rank 0."""
        with self._lock:
            self._life.sendall(json.dumps(message).encode() + b"\n")

    def fail(self, error: BaseException) -> None:
        """Tell rank 0 why this process ends."""
        with contextlib.suppress(OSError):
            self.say({"error": first_line(error)})

    def receive(self) -> tuple[int, bytes]:
        """The next frame.

        Raises:
            SystemExit: Rank 0 has gone.
        """
        try:
            return read_frame(self._orders)
        except OSError:
            raise SystemExit(1) from None

    def expect(self) -> Any:
        """The next frame, which must be a SAY: its JSON."""
        kind, payload = self.receive()
        if kind != SAY:
            raise SystemExit(1)
        return json.loads(payload)

    def answer(self, payload: bytes) -> None:
        """Send a RESULT frame."""
        self._orders.sendall(_HEADER.pack(RESULT, len(payload)) + payload)


def read_frame(connection: socket.socket) -> tuple[int, bytes]:
    """(kind, payload). Raises OSError when the other side has gone."""
    kind, size = _HEADER.unpack(_read(connection, _HEADER.size))
    return kind, _read(connection, size)


def _is_late(text: str) -> bool:
    """Whether an error says that a collective took too long."""
    return any(words in text.lower() for words in _LATE)


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if not count:
            raise ConnectionError("the other side has hung up")
        got += count
    return bytes(data)


def _read_line(connection: socket.socket, seconds: float) -> str:
    line = bytearray()
    end = time.monotonic() + seconds
    while not line.endswith(b"\n"):
        connection.settimeout(max(end - time.monotonic(), 1e-3))
        piece = connection.recv(1)
        if not piece or len(line) > _LONGEST_LINE:
            raise ValueError("no line")
        line += piece
    return line.decode()


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
