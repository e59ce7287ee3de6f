"""Clients that write while something else is measured, in a process of their own.

    python -m benchmarks.writers open-loop --port 6379 --keys 1000000
    python -m benchmarks.writers closed-loop --nodes 127.0.0.1:6379,127.0.0.1:6380 --keys 1000000

Two kinds. ``open-loop``: SETs fall due at a fixed rate, whether earlier ones are answered or not. A
pool of connections sends them, one request in flight on each; who finds none free waits, and its
latency counts from when it was due. So a pause of the server is seen by every request that fell due
in it, not by the one that happened to be under way (coordinated omission). ``closed-loop``: each
client of a few, all ``KVStoreClient``, writes again as soon as it is answered, whoever the primary is.

They write until their standard input ends, then tell on standard output what became of each write.
Times are those of the monotonic clock, which on Linux all processes share. That the generator is
itself kept from a core, by nodes on the same machine, counts as latency.
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

from benchmarks.systems import HOST, ROOT
from benchmarks.workload import KEY_DIGITS, LoadError
from kv_client import KVStoreClient
from kv_errors import KVError

KEY_PREFIX = "key:"  # with the digits: 16 bytes
VALUE_BYTES = 64
RATE = 2000  # a second, of the open loop
CONNECTIONS = 8
CLIENTS = 4  # of the closed loop
RECEIVE_BYTES = 64 * 1024
GOOD_REPLY = b"+OK\r\n"
# Longer than an election: whoever is not answered for so long is not slow but broken.
SILENCE_S_MAX = 30.0


def key(number: int) -> str:
    """The key of this number: 16 bytes."""
    return f"{KEY_PREFIX}{number:0{KEY_DIGITS}}"


def value(number: int) -> str:
    """A value of 64 bytes that tells which write it comes from."""
    return f"{number:0{VALUE_BYTES}}"


class Write(NamedTuple):
    """A write of the open loop that was answered with OK."""

    due_s: float
    latency_s: float  # since then


class Clients(NamedTuple):
    """What the clients of the closed loop saw."""

    answered_s: list[list[float]]  # by client: when each of its writes was answered with OK
    errors: list[str]


# ---- From outside --------------------------------------------------------------------------------


class _Background:
    """This module as a process: ends with the ``with`` block, or when ``_finish`` asks it to."""

    def __init__(self, *argv: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.writers", *argv],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for who measures, who then ends this one.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()  # if it has not ended yet
        self._process.communicate()

    def check(self) -> None:
        """Raise LoadError if it has given up; what it complained of stands on stderr."""
        if self._process.poll() is not None:
            raise LoadError("the clients that were to write meanwhile have ended")

    def _finish(self) -> bytes:
        self.check()
        told, _ = self._process.communicate()
        if self._process.returncode:
            raise LoadError("the clients that were to write meanwhile have failed")
        return told


class OpenLoop(_Background):
    """``with OpenLoop(port, keys) as load``: 2,000 SETs a second of any of the first ``keys`` keys."""

    def __init__(self, port: int, keys: int) -> None:
        super().__init__("open-loop", f"--port={port}", f"--keys={keys}")

    def finish(self) -> list[Write]:
        """Every write from the beginning to now. Raises LoadError if one failed."""
        return [Write(*pair) for pair in json.loads(self._finish())]


class ClosedLoop(_Background):
    """``with ClosedLoop(nodes, keys) as load``: clients that follow the primary."""

    def __init__(self, nodes: Sequence[str], keys: int) -> None:
        super().__init__("closed-loop", f"--nodes={','.join(nodes)}", f"--keys={keys}")

    def finish(self) -> Clients:
        """What they saw from the beginning to now."""
        return Clients(*json.loads(self._finish()))


# ---- The open loop -------------------------------------------------------------------------------


class _Connection:
    """One SET in flight at most."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection((HOST, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._due_s = 0.0
        self._received = b""

    def send(self, request: bytes, due_s: float) -> None:
        self._due_s = due_s
        self._received = b""
        self.socket.sendall(request)

    def receive(self) -> Write | None:
        """Take what has arrived: the write, once it is answered. Raises LoadError for an error."""
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise LoadError("the server closed the connection")
        self._received += data
        if not GOOD_REPLY.startswith(self._received):
            raise LoadError(f"not stored: {self._received[:200]!r}")
        if len(self._received) < len(GOOD_REPLY):
            return None
        return Write(self._due_s, time.monotonic() - self._due_s)


def _request(keys: int) -> bytes:
    number = random.randrange(keys)
    name, stored = key(number).encode(), value(number).encode()
    return b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name, len(stored), stored)


def open_loop(port: int, keys: int) -> list[Write]:
    """Write until standard input ends; what had fallen due by then is sent and waited for."""
    # Not epoll, which takes no timeout shorter than a millisecond: two requests are due in that.
    selector = selectors.SelectSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    idle = deque(_Connection(port) for _ in range(CONNECTIONS))
    for connection in idle:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    waiting: deque[float] = deque()  # when each was due
    writes: list[Write] = []
    begin_s = time.monotonic()
    count = 0
    stopping = False
    while not stopping or waiting or len(idle) < CONNECTIONS:
        now_s = time.monotonic()
        while not stopping and (due_s := begin_s + count / RATE) <= now_s:
            waiting.append(due_s)
            count += 1
        while waiting and idle:
            idle.popleft().send(_request(keys), waiting.popleft())
        timeout_s = SILENCE_S_MAX if stopping else max(0.0, begin_s + count / RATE - now_s)
        ready = selector.select(timeout_s)
        for found, _ in ready:
            if found.fileobj is sys.stdin:
                stopping = True
                selector.unregister(sys.stdin)
            elif write := found.data.receive():
                writes.append(write)
                idle.append(found.data)
        if waiting and now_s - waiting[0] > SILENCE_S_MAX:
            raise LoadError(f"no answer for {SILENCE_S_MAX:.0f} s")
        if stopping and not ready and not waiting and len(idle) < CONNECTIONS:
            raise LoadError("the last requests were not answered")
    return writes


# ---- The closed loop -----------------------------------------------------------------------------


class _Client(threading.Thread):
    """Writes again and again until ``stop``."""

    def __init__(self, nodes: str, keys: int, number: int, stop: threading.Event) -> None:
        super().__init__(name=f"writer-{number}", daemon=True)
        self._nodes = nodes
        self._keys = keys
        self._stop_asked = stop
        self.answered_s: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        with KVStoreClient(self._nodes) as client:
            while not self._stop_asked.is_set():
                number = random.randrange(self._keys)
                try:
                    client.set(key(number), value(number))
                    self.answered_s.append(time.monotonic())
                except KVError as error:
                    self.errors.append(f"{self.name}: {error!r}")


def closed_loop(nodes: str, keys: int) -> Clients:
    """Write until standard input ends."""
    stop = threading.Event()
    clients = [_Client(nodes, keys, number, stop) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    sys.stdin.read()
    stop.set()
    for client in clients:
        client.join()
    errors = [error for client in clients for error in client.errors]
    return Clients([client.answered_s for client in clients], errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    by_rate = kinds.add_parser("open-loop", help=f"{RATE} SETs a second to one node")
    by_rate.add_argument("--port", type=int, required=True)
    by_answer = kinds.add_parser("closed-loop", help="clients that follow the primary")
    by_answer.add_argument("--nodes", required=True, metavar="HOST:PORT,...")
    for kind in (by_rate, by_answer):
        kind.add_argument("--keys", type=int, required=True, help="how many keys are written to")
    args = parser.parse_args()
    try:
        if args.kind == "open-loop":
            json.dump(open_loop(args.port, args.keys), sys.stdout)
        else:
            json.dump(closed_loop(args.nodes, args.keys), sys.stdout)
    except (LoadError, OSError) as error:
        sys.exit(f"{args.kind}: {error}")


if __name__ == "__main__":
    main()
