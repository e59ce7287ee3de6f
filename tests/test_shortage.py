"""What runs out around a node: threads for its peers, and readers of its log.

Rule: a test makes ``Thread.start`` fail as the system would, and only for threads of one name.
"""

from __future__ import annotations

import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

import raft_transport
from cluster_manager import SERVER_SCRIPT
from cluster_nodes import free_ports
from kv_store_server import LOG_FLUSH_S, LOG_RECORDS_MAX, LogQueue
from tests.cluster import SHORT_TIMERS, ask, eventually
from tests.test_raft_transport import (
    DEADLINE_S,
    HELLO_A,
    A,
    B,
    Peers,
    Recorder,
    dial,
    is_closed_by_peer,
    vote,
)


@pytest.fixture
def net() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack)


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The beginnings of the names of threads that can't be started."""
    names: list[str] = []
    start = threading.Thread.start

    def start_unless_named(thread: threading.Thread) -> None:
        if thread.name.startswith(tuple(names)):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_unless_named)
    return names


# ---- Threads -----------------------------------------------------------------------------------


def test_connection_when_no_thread_is_left_for_it_then_it_alone_is_closed(
    net: Peers, no_thread: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Anybody can dial this port: that must not end a node whose clients took all threads."""
    caplog.set_level(logging.WARNING)
    heard = Recorder()
    listener = net.listener(heard)
    no_thread.append("raft-recv")
    with dial(listener) as refused:
        assert is_closed_by_peer(refused)
    no_thread.clear()

    with dial(listener, HELLO_A):
        heard.wait_for_event("connected", A, A)

    assert heard.events[0] == ("connected", A, A)
    assert "cannot accept a peer: can't start new thread" in caplog.text


def test_listener_when_no_thread_is_left_then_it_rests_before_the_next_connection(
    net: Peers, no_thread: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who dials again and again would otherwise keep it, and the log, as busy as can be."""
    monkeypatch.setattr(raft_transport, "BACKOFF_S_MAX", 0.2)
    listener = net.listener(Recorder())
    no_thread.append("raft-recv")
    began_s = time.monotonic()

    for _ in range(3):
        with dial(listener) as refused:
            assert is_closed_by_peer(refused)

    assert time.monotonic() - began_s >= 2 * 0.2


@pytest.mark.parametrize("use", ["post", "kick"])
def test_link_when_there_was_no_thread_for_it_then_its_next_use_starts_it(
    net: Peers, no_thread: list[str], use: str
) -> None:
    """A heartbeat asks each follower something, so the next use is never far."""
    heard = Recorder()
    listener = net.listener(heard)
    no_thread.append("raft-peer")
    link = net.link(listener.address[1], heard)
    assert link.last_error == "can't start new thread"
    no_thread.clear()

    if use == "post":
        link.post(vote(1))
    else:
        link.kick()

    heard.wait_for_event("up", B)
    assert not [event for event in heard.events if event[0] == "fatal"]


def test_link_when_it_ends_without_having_had_a_thread_then_nothing_of_it_stays(
    net: Peers, no_thread: list[str]
) -> None:
    """A member that was removed meanwhile must not leave files open, nor be dialled."""
    heard = Recorder()
    port = net.listener(heard).address[1]
    descriptors = sorted(os.listdir("/dev/fd"))
    no_thread.append("raft-peer")
    link = net.link(port, heard)
    no_thread.clear()

    link.end()
    link.post(vote(1))
    link.start()

    assert sorted(os.listdir("/dev/fd")) == descriptors
    assert heard.events == []


# ---- The log -----------------------------------------------------------------------------------


def test_garbage_when_it_differs_in_numbers_alone_then_it_is_logged_once(
    net: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    """Else who sends a length a connection fills the disk that the log is on."""
    caplog.set_level(logging.WARNING)
    listener = net.listener(Recorder())

    for number in range(5):
        with dial(listener) as stranger:
            stranger.sendall(struct.pack(">I", 2000 + number))
            assert is_closed_by_peer(stranger)

    (said,) = [r.getMessage() for r in caplog.records if "no peer from" in r.getMessage()]
    assert "a frame claims 2000 bytes" in said


class Pipe:
    """A pipe that stands for stderr; it is read only when a test does so."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def fill(self) -> None:
        os.set_blocking(self.writer, False)
        with suppress(BlockingIOError):
            while os.write(self.writer, b"x" * 4096):
                pass
        os.set_blocking(self.writer, True)

    def read(self) -> str:
        """What is there now."""
        os.set_blocking(self.reader, False)
        text = b""
        with suppress(BlockingIOError):
            while piece := os.read(self.reader, 65536):
                text += piece
        return text.decode()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.read()  # whoever waits to write goes on
    os.close(pipe.reader)
    os.close(pipe.writer)


@pytest.fixture
def queue(pipe: Pipe) -> LogQueue:
    queue = LogQueue(pipe.writer)
    queue.setFormatter(logging.Formatter("%(levelname)s %(threadName)s %(message)s"))
    return queue


@pytest.fixture
def logger(queue: LogQueue) -> Iterator[logging.Logger]:
    """Logs to the pipe through the queue."""
    logger = logging.getLogger("a test of the queue")
    logger.addHandler(queue)
    yield logger
    logger.removeHandler(queue)


def test_line_when_logged_then_it_is_written_as_its_caller_logged_it(
    pipe: Pipe, queue: LogQueue, logger: logging.Logger
) -> None:
    """With the name of the caller's thread, its arguments as they were, and the traceback."""
    argument = ["as it was"]
    try:
        raise ValueError("a bug")
    except ValueError:
        logger.exception("failed %s", argument)
    argument[0] = "changed"
    queue.flush()

    text = pipe.read()
    assert text.startswith(f"ERROR {threading.current_thread().name} failed ['as it was']\n")
    assert text.endswith("ValueError: a bug\n")


def test_lines_when_nobody_reads_them_then_nobody_waits_and_their_loss_is_told(
    pipe: Pipe, queue: LogQueue, logger: logging.Logger
) -> None:
    """The timer of Raft logs too: it must never wait for a disk or a reader (T24)."""
    pipe.fill()
    began_s = time.monotonic()
    for number in range(5 * LOG_RECORDS_MAX):
        logger.warning("number %d", number)
    assert time.monotonic() - began_s < DEADLINE_S

    text = ""

    def all_told() -> bool:
        nonlocal text
        text += pipe.read()
        return "lost" in text

    eventually(all_told, "it says how many were lost")
    logger.warning("the next")
    queue.flush()
    lines = (text.lstrip("x") + pipe.read()).splitlines()

    *kept, told, last = [line.split(" ", 2)[2] for line in lines]
    assert kept == [f"number {number}" for number in range(len(kept))]
    assert f"{5 * LOG_RECORDS_MAX - len(kept)} lines" in told
    assert LOG_RECORDS_MAX <= len(kept) <= 2 * LOG_RECORDS_MAX
    assert last == "the next"


def test_flush_when_nobody_reads_then_it_gives_up(
    pipe: Pipe, queue: LogQueue, logger: logging.Logger
) -> None:
    """A process that is to end ends."""
    pipe.fill()
    logger.warning("the last words")
    began_s = time.monotonic()

    queue.flush()

    assert LOG_FLUSH_S <= time.monotonic() - began_s < LOG_FLUSH_S + DEADLINE_S


@pytest.fixture
def unread(pipe: Pipe, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts servers whose stderr is a pipe that nobody reads."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(port: int) -> subprocess.Popen[bytes]:
        flags = ("--primary", "--port", str(port), "--join", f"127.0.0.1:{port}", *SHORT_TIMERS)
        command = [sys.executable, str(SERVER_SCRIPT), *flags, "--data-dir", str(tmp_path / "data")]
        processes.append(subprocess.Popen(command, stderr=pipe.writer))
        return processes[-1]

    yield start

    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.cluster
@pytest.mark.slow
def test_server_when_nobody_reads_its_log_then_it_serves_and_ends_well(
    pipe: Pipe, unread: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """What starts a node may keep its stderr and never look at it."""
    pipe.fill()
    (port,) = free_ports(1)
    process = unread(port)
    eventually(lambda: _says_ok(port, "SET k v"), "it serves")

    process.send_signal(signal.SIGTERM)

    assert process.wait(20) == 0


@pytest.mark.cluster
@pytest.mark.slow
def test_server_when_it_can_not_start_then_nobody_needs_to_read_why(
    pipe: Pipe, unread: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Its exit status says that another start can't help, whether or not the log is read."""
    pipe.fill()
    (port,) = free_ports(1)
    first = unread(port)
    eventually(lambda: _says_ok(port, "SET k v"), "it serves")

    assert unread(port).wait(20) == 78
    assert first.poll() is None


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("is_full", [False, True])
def test_server_when_a_fault_ends_it_then_its_last_words_are_written_if_they_can_be(
    pipe: Pipe, unread: Callable[..., subprocess.Popen[bytes]], is_full: bool
) -> None:
    """They are the ones that say what to do."""
    (port,) = free_ports(1)
    process = unread(port)
    eventually(lambda: _says_ok(port, "SET k v"), "it serves")
    if is_full:
        pipe.fill()
    # No file may grow any more: a write fails with EFBIG.
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_FSIZE, (65536, 65536))

    with suppress(OSError, ValueError):
        ask(("127.0.0.1", port), f"SET big {'x' * 100_000}")

    assert process.wait(20) == 1
    assert is_full or "the process ends" in pipe.read()


def _says_ok(port: int, line: str) -> bool:
    try:
        return ask(("127.0.0.1", port), line).get("status") == "OK"
    except OSError:
        return False
