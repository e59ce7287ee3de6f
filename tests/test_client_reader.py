"""The thread that reads for all clients: a node whose disk hangs must not take the clients along."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest

from kv_config import parse_settings
from kv_errors import OutcomeUnknownError
from kv_session import Service
from kv_store import KeyValueStore
from kv_store_server import TCPServer
from raft_node import RaftNode
from raft_status import Pending


class HangingNode:
    """Stands for a node: proposals hang as in a write to a disk, until it is told to go on."""

    def __init__(self) -> None:
        self.store_lock = threading.Lock()
        self.is_primary = True
        self.hangs = threading.Event()
        self.may_go_on = threading.Event()

    def propose_later(
        self, payloads: Sequence[bytes], on_done: Callable[[Pending], None], *, blind: bool = False
    ) -> None:
        self.hangs.set()
        self.may_go_on.wait()
        pending = Pending(1, len(payloads), 1, 0.0, on_done)
        pending.error = OutcomeUnknownError("the disk hung")
        pending.finish()

    def read_later(self, on_done: Callable[[Pending], None]) -> None:
        Pending(0, 0, 1, 0.0, on_done).finish()

    def read_barrier(self) -> None:
        """The store may be read at once."""


@pytest.fixture
def node() -> Iterator[HangingNode]:
    node = HangingNode()
    yield node
    node.may_go_on.set()


@pytest.fixture
def server(node: HangingNode) -> Iterator[TCPServer]:
    failures: list[BaseException] = []
    server = TCPServer("127.0.0.1", 0)
    settings = parse_settings(["--port", "1"], {})
    server.serve(Service(settings, cast(RaftNode, node), KeyValueStore()), failures.append)
    yield server
    server.shutdown()
    server.server_close()
    assert not failures


def connect(server: TCPServer) -> socket.socket:
    return socket.create_connection(server.socket.getsockname(), timeout=30)


def test_read_when_another_clients_write_hangs_in_the_disk_then_it_is_answered(
    server: TCPServer, node: HangingNode
) -> None:
    """And the write is answered when the disk goes on, its connection with it."""
    with connect(server) as writer, connect(server) as reader:
        writer.sendall(b"SET a 1\n")
        assert node.hangs.wait(30)
        reader.sendall(b"GET a\n")

        assert b"NOT_FOUND" in reader.recv(1000)

        node.may_go_on.set()
        assert b"UNKNOWN" in writer.recv(1000)
        writer.sendall(b"GET a\n")
        assert b"NOT_FOUND" in writer.recv(1000)


def test_pipeline_behind_a_write_that_hangs_then_the_replies_keep_their_order(
    server: TCPServer, node: HangingNode
) -> None:
    """What arrives while a write hangs is read by another thread, and still waits for its turn."""
    with connect(server) as client, connect(server) as other:
        client.sendall(b"SET a 1\n")
        assert node.hangs.wait(30)
        other.sendall(b"GET a\n")
        assert b"NOT_FOUND" in other.recv(1000)  # by now another thread reads
        client.sendall(b"GET b\n")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1000)
        client.settimeout(30)

        node.may_go_on.set()

        lines = client.makefile("rb")
        assert b"UNKNOWN" in lines.readline()
        assert b"NOT_FOUND" in lines.readline()
