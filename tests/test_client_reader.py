"""The threads that serve clients, around a node that is none: what hangs, what runs out, what is left."""

from __future__ import annotations

import errno
import gc
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import pytest

import kv_session
from kv_commands import encode_payload
from kv_config import parse_settings
from kv_errors import OutcomeUnknownError
from kv_protocol import encode_request
from kv_session import REPLIES_BYTES_MAX, Service, Session
from kv_store import KeyValueStore
from kv_store_server import ACCEPT_PAUSE_S, TCPServer
from kv_types import Reply
from raft_node import RaftNode
from raft_status import Pending
from tests.cluster import eventually


class HangingNode:
    """Stands for a node: proposals hang as in a write to a disk, until it is told to go on."""

    def __init__(self) -> None:
        self.store_lock = threading.Lock()
        self.is_primary = True
        self.trouble = ""
        self.hangs = threading.Event()
        self.may_go_on = threading.Event()
        self.purges: KeyValueStore | None = None  # what proposals are applied to; None: they hang

    def propose_later(
        self, payloads: Sequence[bytes], on_done: Callable[[Pending], None], *, blind: bool = False
    ) -> None:
        pending = Pending(1, len(payloads), 1, 0.0, on_done)
        if self.purges is not None:
            pending.replies = self._apply(self.purges, payloads)
            pending.finish()
            return
        self.hangs.set()
        self.may_go_on.wait()
        pending.error = OutcomeUnknownError("the disk hung")
        pending.finish()

    def propose(self, payloads: Sequence[bytes], *, blind: bool = False) -> Pending:
        assert self.purges is not None
        pending = Pending(1, len(payloads), 1, 0.0, lambda _: None)
        pending.replies = self._apply(self.purges, payloads)
        return pending

    def _apply(self, store: KeyValueStore, payloads: Sequence[bytes]) -> list[Reply]:
        return [store.apply(store.applied_index + 1, payload) for payload in payloads]

    def read_later(self, on_done: Callable[[Pending], None]) -> None:
        Pending(0, 0, 1, 0.0, on_done).finish()

    def read_barrier(self) -> None:
        """The store may be read at once."""

    def room_trouble(self) -> str:
        return self.trouble


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


def ask(client: socket.socket, *requests: bytes) -> None:
    client.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(k), k) for k in requests))


def test_pipeline_of_reads_when_very_many_keys_are_due_then_each_is_purged_and_answered(
    server: TCPServer, node: HangingNode
) -> None:
    """One PURGE after the other, not one within the other: that ended the primary."""
    store, keys = server.service.store, [b"%04d" % number for number in range(900)]
    for index, key in enumerate(keys, 1):
        store.apply(index, encode_payload(1000, [b"SET", key, b"v", b"PX", b"1"]))
    node.purges = store

    with connect(server) as client:
        ask(client, *keys)
        with client.makefile("rb") as replies:
            assert [replies.readline() for _ in keys] == [b"$-1\r\n"] * len(keys)

    assert len(store) == 0


def test_large_json_for_a_line_then_no_thread_that_others_need_takes_it_apart(
    server: TCPServer, node: HangingNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a value of some MiB a peer was not heard for so long that the leadership ended."""
    threads: dict[int, str] = {}

    def noted(value: Reply) -> object:
        assert isinstance(value, bytes)
        threads[len(value)] = threading.current_thread().name
        return len(value)

    monkeypatch.setattr(kv_session, "line_value", noted)
    store = server.service.store
    store.apply(1, encode_payload(1, [b"SET", b"small", bytes(10)]))
    store.apply(2, encode_payload(1, [b"SET", b"large", bytes(1_000_000)]))
    with connect(server) as client, client.makefile("rb") as replies:
        for key in (b"small", b"large"):
            client.sendall(b"GET %b\n" % key)
            assert b'"status":"OK"' in replies.readline().replace(b" ", b"")

    assert threads == {10: "read-clients", 1_000_000: "client-slow"}


def test_short_pipeline_that_replaces_large_values_then_their_replies_are_made_in_pieces(
    server: TCPServer, node: HangingNode
) -> None:
    """A few KiB asked for gigabytes at once, which ended one primary after the other."""
    node.purges = store = server.service.store
    store.apply(1, encode_payload(1, [b"SET", b"k", bytes(REPLIES_BYTES_MAX)]))
    delivered: list[tuple[bytes, list[bytes]]] = []
    session = Session(
        server.service,
        "a test",
        deliver=lambda replies, more, _: delivered.append((replies, [*(more or ())])),
        stop_reading=lambda: None,
        is_gone=lambda: False,
    )
    request = b"SET k v NX GET".split()
    pipeline = encode_request(request) * 20

    session.receive(pipeline)
    by_its_thread = [len(piece) for piece in session.answer()]
    session.begin()
    pending = node.propose([encode_payload(1, request)] * 20)
    session.end_writes([request] * 20, pending, 0)
    ((at_once, pieces),) = delivered

    assert at_once == b""
    for sizes in (by_its_thread, [*map(len, pieces)]):
        assert sum(sizes) > 20 * REPLIES_BYTES_MAX
        assert max(sizes) < 3 * REPLIES_BYTES_MAX


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


def test_reader_when_stuck_and_no_thread_is_left_then_another_takes_over_once_there_is(
    server: TCPServer, node: HangingNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs and clients that took all threads must not end the node together."""
    start = threading.Thread.start
    refused = threading.Event()

    def start_the_second_time(thread: threading.Thread) -> None:
        if thread.name == "read-clients" and not refused.is_set():
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_the_second_time)
    with connect(server) as writer, connect(server) as reader:
        writer.sendall(b"SET a 1\n")
        assert node.hangs.wait(30)
        reader.sendall(b"GET a\n")

        assert b"NOT_FOUND" in reader.recv(1000)

        assert refused.is_set()
        node.may_go_on.set()
        assert b"UNKNOWN" in writer.recv(1000)


def test_disk_when_almost_full_then_deletions_alone_are_accepted(
    server: TCPServer, node: HangingNode
) -> None:
    """They are what makes room; and a definite refusal says that nothing was done."""
    node.trouble = "the disk is almost full"
    node.may_go_on.set()
    with connect(server) as client:
        lines = client.makefile("rb")
        client.sendall(b"SET a 1\nINCR n\n")
        assert b'"code": "NO_SPACE"' in lines.readline()
        assert b'"code": "NO_SPACE"' in lines.readline()
        assert not node.hangs.is_set()  # nothing has reached it

        client.sendall(b"DELETE a\n")
        lines.readline()
        assert node.hangs.is_set()


def test_connection_when_it_has_ended_then_its_memory_goes_with_it(
    server: TCPServer, node: HangingNode
) -> None:
    """Not when the collector of cycles comes by, which it does seldom once much is loaded."""
    node.may_go_on.set()
    gc.collect()
    gc.disable()
    try:
        with connect(server) as client:
            client.sendall(b"GET a\n")
            client.recv(1000)
            (session,) = map(weakref.ref, server.service.sessions.values())
        eventually(lambda: session() is None, "nothing holds the session")
    finally:
        gc.enable()


def test_reply_when_it_needs_a_thread_and_there_is_none_then_its_connection_alone_ends(
    server: TCPServer, node: HangingNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the node delivers it: what fails there would end the process."""
    node.may_go_on.set()
    start = threading.Thread.start

    def start_unless_slow(thread: threading.Thread) -> None:
        if thread.name == "client-slow":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_unless_slow)
    server.service.store.apply(1, encode_payload(1, [b"SET", b"large", b"x" * (32 << 20)]))
    with connect(server) as greedy, connect(server) as other:
        greedy.sendall(b"GET large\n")
        received = 0
        while data := greedy.recv(1 << 20):
            received += len(data)
        assert received < 32 << 20
        other.sendall(b"GET a\n")
        assert b"NOT_FOUND" in other.recv(1000)


def test_client_when_there_is_no_thread_for_it_then_it_is_told_so(
    server: TCPServer, node: HangingNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the server goes on accepting."""

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with connect(server) as refused:
            assert refused.recv(1000).startswith(b"-ERR the server has no thread left")

    with connect(server) as client:
        client.sendall(b"GET a\n")
        assert b"NOT_FOUND" in client.recv(1000)


def test_clients_when_the_files_run_out_then_they_wait_and_are_served_in_the_end(
    server: TCPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``accept`` fails at once then, again and again: it is left alone for a while."""
    attempts: list[float] = []
    accept = server.socket.accept

    def fail_thrice() -> object:
        attempts.append(time.monotonic())
        if len(attempts) <= 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept()

    monkeypatch.setattr(server, "socket", Accepting(server.socket, fail_thrice))
    with connect(server) as client:
        client.sendall(b"GET a\n")
        assert b"NOT_FOUND" in client.recv(1000)

    assert attempts[3] - attempts[0] >= 3 * ACCEPT_PAUSE_S


class Accepting:
    """A listening socket whose ``accept`` is another one."""

    def __init__(self, sock: socket.socket, accept: Callable[[], object]) -> None:
        self._sock = sock
        self.accept = accept

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)
