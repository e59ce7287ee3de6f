"""Nodes for the tests of clients: real sockets and the real state machine, but no Raft.

Rule: what goes wrong, and when, is the test's choice: ``FakeCluster.faults`` is used up request by
request, ``primary`` is set by hand. One daemon thread a node and one a connection.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum, auto
from types import TracebackType
from typing import Self

from kv_commands import acting, check, encode_payload
from kv_errors import KVError, NoPrimaryError, NotPrimaryError, OutcomeUnknownError
from kv_protocol import RequestParser, encode_line, encode_reply
from kv_store import ExpiredKeysError, KeyValueStore, purge_request
from kv_types import RepeatedReply, Reply, SimpleString


class Fault(Enum):
    """What becomes of a request instead of being done and answered."""

    DROPPED = auto()  # the connection is closed, nothing is done
    DONE_AND_DROPPED = auto()  # it is done, and the connection closed without an answer
    DONE_AND_SILENT = auto()  # it is done, and no answer ever comes


class FakeNode:
    """One node's listener and its connections."""

    def __init__(self, cluster: FakeCluster, node_id: str) -> None:
        self.node_id = node_id
        self._cluster = cluster
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self.accepted = 0
        threading.Thread(target=self._accept, name=f"fake-{node_id}", daemon=True).start()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def kill(self) -> None:
        """As the kernel does for a process that dies."""
        # A thread in accept() keeps the socket alive; shutdown wakes it.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close all connections, as a node that steps down."""
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with self._lock:
                    self._connections.append(connection)
                    self.accepted += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        parser = RequestParser(64 * 1024 * 1024)
        with connection, suppress(OSError):
            while data := connection.recv(65536):
                parser.feed(data)
                for argv in parser.take():
                    assert not isinstance(argv, KVError), argv
                    reply = self._cluster.answer(self, argv)
                    if reply is Fault.DONE_AND_SILENT:
                        connection.recv(1)
                        return
                    if isinstance(reply, Fault):
                        return
                    in_lines = parser.language == "lines"
                    connection.sendall(_line(reply) if in_lines else encode_reply(reply))


def _line(reply: Reply) -> bytes:
    if isinstance(reply, KVError):
        return encode_line({"status": "ERROR", "code": reply.code, "message": str(reply)})
    return encode_line({"status": "OK"})


class FakeCluster:
    """Nodes over one store, for which ``primary`` answers; None while nobody does."""

    def __init__(self, count: int = 3) -> None:
        # Guards what follows, and makes each request one step.
        self._lock = threading.Lock()
        self.store = KeyValueStore()
        self.faults: deque[Fault | KVError | None] = deque()  # by data request to the primary,
        # other than SESSION OPEN and CLOSE
        self.done: Counter[str] = Counter()  # the same by command, as executed, and so only once
        self.received: Counter[str] = Counter()  # data requests by node id
        self.forged_hash: dict[str, str] = {}  # by node id: what STATUS tells instead
        self.nodes = [FakeNode(self, f"node{number}") for number in range(1, count + 1)]
        self.primary: FakeNode | None = self.nodes[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for node in self.nodes:
            node.kill()

    @property
    def addresses(self) -> list[str]:
        return [node.address for node in self.nodes]

    def answer(self, node: FakeNode, argv: list[bytes]) -> Reply | Fault:
        """The reply of ``node``, or what to do instead."""
        match argv:
            case [b"CLUSTER"] | [b"STATUS"]:
                return json.dumps(self._status(node)).encode()
            case [b"PING"]:
                return SimpleString("PONG")
        with self._lock:
            self.received[node.node_id] += 1
            primary = self.primary
            if primary is None:
                return NoPrimaryError()
            if node is not primary:
                return NotPrimaryError(primary.node_id, primary.host, primary.port)
            is_write_or_read = acting(argv)[0] != b"SESSION"
            fault = self.faults.popleft() if self.faults and is_write_or_read else None
            if fault is Fault.DROPPED or isinstance(fault, KVError):
                return fault
            reply = self._execute(argv)
            return reply if fault is None else fault

    def _execute(self, argv: list[bytes]) -> Reply:
        try:
            flags = check(argv).flags
        except KVError as error:
            return error
        command = acting(argv)[0].decode().upper()
        if "write" in flags:
            reply = self._apply(argv)
            if command != "SESSION" and not isinstance(reply, RepeatedReply):
                self.done[command] += 1
            return reply
        self.done[command] += 1
        while True:
            try:
                return self.store.read(argv, _now_ms())
            except ExpiredKeysError as expired:
                self._apply(purge_request(expired.pairs))

    def _apply(self, argv: Sequence[bytes]) -> Reply:
        return self.store.apply(self.store.applied_index + 1, encode_payload(_now_ms(), argv))

    def _status(self, node: FakeNode) -> dict[str, object]:
        return {
            "status": "OK",
            "node_id": node.node_id,
            "cluster_id": "c" * 16,
            "role": "PRIMARY" if node is self.primary else "SECONDARY",
            "term": 1,
            "applied_index": self.store.applied_index,
            "state_hash": self.forged_hash.get(node.node_id, f"{self.store.state_hash:016x}"),
            "members": [{"host": member.host, "port": member.port} for member in self.nodes],
        }


def unknown() -> OutcomeUnknownError:
    return OutcomeUnknownError("leadership was lost")


def silent_listener() -> socket.socket:
    """A node that hangs: the kernel takes its connections, nobody answers. Close it."""
    return socket.create_server(("127.0.0.1", 0))


def free_address() -> str:
    """Where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
    return f"{host}:{port}"


def _now_ms() -> int:
    return int(time.time() * 1000)
