"""Links and listeners over loopback, with good, bad, silent and dying peers."""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

import raft_transport
from raft_frames import (
    FRAME_BYTES_MAX,
    FrameDecoder,
    Hello,
    Refused,
    decode_handshake,
    encode_handshake,
    encode_message,
)
from raft_transport import (
    LATER,
    QUEUE_MESSAGES_MAX,
    UNIDENTIFIED_MAX,
    PeerLink,
    PeerListener,
    PeerPortError,
    backoff_s,
)
from raft_types import (
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    HashReport,
    Identity,
    Member,
    Message,
    VoteReply,
    VoteRequest,
)

CLUSTER, A, B, C = "c1" * 8, "0a" * 8, "0b" * 8, "0c" * 8
NODE_A, NODE_B = Identity(CLUSTER, A, "node-a"), Identity(CLUSTER, B, "node-b")
DEADLINE_S = 5.0

MESSAGES: list[Message] = [
    AppendEntries(A, B, 3, 7, 2, (Entry(8, 3, EntryKind.COMMAND, b"x" * 9),), 6, 11),
    AppendReply(A, B, 3, False, 0, 11, 7, 5, 2),
    VoteRequest(A, B, 4, 8, 3, True),
    VoteReply(A, B, 4, True, False),
    HashReport(A, B, 4, 8, 2**64 - 1, True),
]


def vote(number: int) -> VoteReply:
    """A message that can be told from others."""
    return VoteReply(A, B, number, True, False)


# ---- Helpers for live connections --------------------------------------------------------------


class Recorder:
    """Hears everything, as RaftNode would, and lets a test wait for it."""

    def __init__(self, identity: Identity = NODE_B) -> None:
        self.identity = identity
        self.messages: list[Message] = []
        self.events: list[tuple[str, ...]] = []
        self.heard = threading.Condition()

    def note(self, *event: str) -> None:
        with self.heard:
            self.events.append(event)
            self.heard.notify_all()

    def on_connected(self, hello: Hello) -> None:
        self.note("connected", hello.sender, hello.boot_id)

    def on_disconnected(self, member_id: str) -> None:
        self.note("disconnected", member_id)

    def on_messages(self, messages: Sequence[Message]) -> None:
        with self.heard:
            self.messages += messages
            self.heard.notify_all()

    def on_up(self, member_id: str) -> None:
        self.note("up", member_id)

    def on_peer_dead(self, member_id: str) -> None:
        self.note("dead", member_id)

    def on_fatal(self, error: BaseException) -> None:
        self.note("fatal", repr(error))

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> bool:
        with self.heard:
            return self.heard.wait_for(condition, timeout_s)

    def wait_for_event(self, *event: str, times: int = 1) -> None:
        assert self.wait_for(lambda: self.events.count(event) >= times), (event, self.events)

    def wait_for_messages(self, *expected: Message) -> None:
        self.wait_for(lambda: len(self.messages) >= len(expected))
        assert self.messages == list(expected)


class Peers:
    """Makes links and listeners, and closes them all."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def listener(
        self,
        handler: Recorder,
        *,
        port: int = 0,
        boot_id: str = B,
        handshake_timeout_s: float = DEADLINE_S,
    ) -> PeerListener:
        listener = PeerListener(
            "127.0.0.1",
            port,
            boot_id=boot_id,
            lease_reads=False,
            on_fatal=handler.on_fatal,
            handshake_timeout_s=handshake_timeout_s,
        )
        self._stack.callback(listener.close)
        listener.start(handler)
        return listener

    def link(
        self,
        port: int,
        heard: Recorder,
        *,
        me: Identity = NODE_A,
        to: Identity = NODE_B,
        boot_id: str = A,
        start: bool = True,
        **settings: object,
    ) -> PeerLink:
        defaults: dict[str, object] = {
            "address": ("127.0.0.1", 1),
            "lease_reads": False,
            "source": lambda member_id, may_wait: None,
            "on_up": heard.on_up,
            "on_peer_dead": heard.on_peer_dead,
            "on_fatal": heard.on_fatal,
        }
        member = Member(to.member_id, to.node_id, "127.0.0.1", 1, port, True)
        link = PeerLink(me, member, boot_id=boot_id, **(defaults | settings))  # type: ignore[arg-type]
        self._stack.callback(link.close)
        if start:
            link.start()
        return link

    def fake(self, port: int = 0) -> FakePeer:
        return self._stack.enter_context(FakePeer(port))


class FakePeer:
    """A listening socket whose every answer the test chooses."""

    def __init__(self, port: int = 0) -> None:
        self.listening = socket.create_server(("127.0.0.1", port))
        self.listening.settimeout(DEADLINE_S)
        self.port: int = self.listening.getsockname()[1]
        self._accepted: list[socket.socket] = []

    def __enter__(self) -> FakePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def accept(self) -> socket.socket:
        sock, _ = self.listening.accept()
        sock.settimeout(DEADLINE_S)
        self._accepted.append(sock)
        return sock

    def welcome(self, boot_id: str = B) -> socket.socket:
        """Accept a connection and answer its Hello as node B would."""
        sock = self.accept()
        hello = read_handshake(sock)
        sock.sendall(encode_handshake(Hello(CLUSTER, B, hello.sender, boot_id, False, "node-b")))
        return sock

    def die(self) -> None:
        self.listening.close()
        for sock in self._accepted:
            sock.close()


def read_handshake(sock: socket.socket) -> Hello | Refused:
    prefix = sock.recv(4, socket.MSG_WAITALL)
    return decode_handshake(prefix + sock.recv(int.from_bytes(prefix), socket.MSG_WAITALL))


def is_closed_by_peer(sock: socket.socket) -> bool:
    sock.settimeout(DEADLINE_S)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def dial(listener: PeerListener, hello: Hello | None = None) -> socket.socket:
    """A bare connection to the listener, welcomed if it said ``hello``."""
    sock = socket.create_connection(listener.address, DEADLINE_S)
    if hello is not None:
        sock.sendall(encode_handshake(hello))
        assert isinstance(read_handshake(sock), Hello)
    return sock


class HeldUp:
    """A source that has nothing, and holds up the link's thread until it is let go on."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()

    def __call__(self, member_id: str, may_wait: bool) -> None:
        self.asked.set()
        self.go_on.wait(DEADLINE_S)


def wait_until(condition: Callable[[], bool]) -> bool:
    """For what nobody calls back about."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.001)
    return True


def names_of_threads() -> list[str]:
    return [t.name for t in threading.enumerate()]


HELLO_A = Hello(CLUSTER, A, B, A, False, "node-a")


@pytest.fixture
def heard() -> Recorder:
    return Recorder()


@pytest.fixture
def peers() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack)


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure a link dials only when it is kicked."""
    monkeypatch.setattr(raft_transport, "BACKOFF_S_MIN", 60.0)
    monkeypatch.setattr(raft_transport, "BACKOFF_S_MAX", 60.0)


# ---- Links: sending ----------------------------------------------------------------------------


def test_two_links_exchange_messages_of_every_type_both_ways(peers: Peers) -> None:
    """What A posts arrives at B over A's connection, what B posts at A over B's."""
    at_a, at_b = Recorder(NODE_A), Recorder(NODE_B)
    port_a, port_b = peers.listener(at_a).address[1], peers.listener(at_b).address[1]
    to_b = peers.link(port_b, at_a)
    to_a = peers.link(port_a, at_b, me=NODE_B, to=NODE_A, boot_id=B)
    at_a.wait_for_event("up", B)
    at_b.wait_for_event("up", A)

    answer = VoteReply(B, A, 9, True, False)
    to_a.post(answer)
    for message in MESSAGES:
        to_b.post(message)

    at_b.wait_for_messages(*MESSAGES)
    at_a.wait_for_messages(answer)
    assert ("connected", A, A) in at_b.events
    assert to_a.is_up
    assert to_b.is_up
    assert to_b.last_error == ""


def test_push_sends_all_that_the_source_has_from_the_calling_thread(
    peers: Peers, heard: Recorder
) -> None:
    """What has accumulated is pulled until there is no more, without a change of threads."""
    waiting: list[bytes] = []
    askers: list[str] = []

    def source(member_id: str, may_wait: bool) -> bytes | None:
        assert member_id == B
        askers.append(threading.current_thread().name)
        return waiting.pop(0) if waiting else None

    link = peers.link(peers.listener(heard).address[1], heard, source=source)
    heard.wait_for_event("up", B)
    assert wait_until(lambda: len(askers) > 0)
    waiting += [encode_message(CLUSTER, vote(n)) for n in range(50)]
    link.push()

    heard.wait_for_messages(*(vote(n) for n in range(50)))
    assert threading.current_thread().name in askers


def test_push_when_the_next_frame_takes_waiting_leaves_it_to_the_links_own_thread(
    peers: Peers, heard: Recorder
) -> None:
    """Who pushes may be raft-timer, which no disk must hold up (raft-traps T24)."""
    waiting: list[bytes] = []
    sent_by: list[str] = []

    def source(member_id: str, may_wait: bool) -> bytes | None:
        if waiting and not may_wait:
            return LATER
        if waiting:
            sent_by.append(threading.current_thread().name)
        return waiting.pop(0) if waiting else None

    link = peers.link(peers.listener(heard).address[1], heard, source=source)
    heard.wait_for_event("up", B)
    waiting += [encode_message(CLUSTER, vote(n)) for n in range(3)]
    link.push()

    heard.wait_for_messages(*(vote(n) for n in range(3)))
    assert set(sent_by) == {"raft-peer-node-b"}


def test_link_to_a_host_that_can_be_none_goes_on_trying(peers: Peers, heard: Recorder) -> None:
    """Such a name may have got into the log: it must not end all who read it."""
    tried: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout_s: float) -> socket.socket:
        tried.append(address)
        return socket.create_connection(("127.0.0..4", address[1]), timeout_s)

    link = peers.link(peers.listener(Recorder()).address[1], heard, connect=connect)

    assert wait_until(lambda: len(tried) > 1)
    assert link.last_error
    assert not any(event[0] == "fatal" for event in heard.events)


def test_push_while_another_thread_sends_is_not_overlooked(peers: Peers, heard: Recorder) -> None:
    """Whenever it comes: before, in or after the last look at the source."""
    waiting: list[bytes] = []
    count_each = 200

    def source(member_id: str, may_wait: bool) -> bytes | None:
        try:
            return waiting.pop()
        except IndexError:
            return None

    link = peers.link(peers.listener(heard).address[1], heard, source=source)
    heard.wait_for_event("up", B)

    def push_on() -> None:
        for n in range(count_each):
            waiting.append(encode_message(CLUSTER, vote(n)))
            link.push()

    pushers = [threading.Thread(target=push_on) for _ in range(3)]
    for pusher in pushers:
        pusher.start()
    for pusher in pushers:
        pusher.join(DEADLINE_S)

    assert heard.wait_for(lambda: len(heard.messages) == 3 * count_each), len(heard.messages)
    for n in range(100):
        waiting.append(encode_message(CLUSTER, vote(n)))
        link.push()
        assert heard.wait_for(lambda: len(heard.messages) > 3 * count_each + n)  # noqa: B023


def test_link_with_a_full_queue_drops_the_oldest(peers: Peers, heard: Recorder) -> None:
    """Raft bears loss, and the newest message is worth most; memory stays bounded."""
    held_up = HeldUp()
    link = peers.link(peers.listener(heard).address[1], heard, source=held_up)
    assert held_up.asked.wait(DEADLINE_S)
    for n in range(QUEUE_MESSAGES_MAX + 44):
        link.post(vote(n))
    held_up.go_on.set()

    heard.wait_for_messages(*(vote(n) for n in range(44, QUEUE_MESSAGES_MAX + 44)))


def test_link_that_is_down_drops_what_is_posted(peers: Peers, heard: Recorder) -> None:
    """A message that waited for a reconnection would be old news."""
    listener = peers.listener(heard)
    link = peers.link(listener.address[1], heard, start=False)

    link.post(vote(1))
    link.start()
    heard.wait_for_event("up", B)
    link.post(vote(2))

    heard.wait_for_messages(vote(2))


def test_link_that_broke_forgets_what_it_had_not_sent(peers: Peers, heard: Recorder) -> None:
    """The same holds for what was posted to the connection before."""
    held_up, fake = HeldUp(), peers.fake()
    link = peers.link(fake.port, heard, source=held_up)
    sock = fake.welcome()
    assert held_up.asked.wait(DEADLINE_S)
    for n in range(5):
        link.post(vote(n))
    # Closed with a reset, so that the first thing sent fails.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    held_up.go_on.set()
    sock = fake.welcome()
    heard.wait_for_event("up", B, times=2)
    link.post(vote(9))

    expected = encode_message(CLUSTER, vote(9))
    assert sock.recv(len(expected), socket.MSG_WAITALL) == expected


def test_post_while_another_thread_sends_does_not_wait_and_keeps_the_order(
    peers: Peers, heard: Recorder
) -> None:
    """Who sends at the time takes it along."""
    held_up = HeldUp()
    link = peers.link(peers.listener(heard).address[1], heard, source=held_up)
    assert held_up.asked.wait(DEADLINE_S)

    link.post(vote(1))
    link.post(vote(2))
    link.push()
    assert heard.messages == []
    held_up.go_on.set()

    heard.wait_for_messages(vote(1), vote(2))


def test_post_while_a_push_takes_its_last_look_is_sent_by_it(peers: Peers, heard: Recorder) -> None:
    """The push has passed the queue already and found the source empty: it looks once more."""
    held_up = HeldUp()

    def source(member_id: str, may_wait: bool) -> None:
        if threading.current_thread() is pusher:
            held_up(member_id, may_wait)

    def push_until_asked() -> None:
        while not held_up.asked.is_set():
            link.push()

    pusher = threading.Thread(target=push_until_asked)

    link = peers.link(peers.listener(heard).address[1], heard, source=source)
    heard.wait_for_event("up", B)
    link.post(vote(1))
    heard.wait_for_messages(vote(1))

    pusher.start()
    assert held_up.asked.wait(DEADLINE_S)
    link.post(vote(2))
    held_up.go_on.set()
    pusher.join(DEADLINE_S)

    heard.wait_for_messages(vote(1), vote(2))


def test_post_into_a_full_socket_does_not_wait_and_leaves_every_frame_whole(
    peers: Peers, heard: Recorder
) -> None:
    """A frame that went out in part is finished, by the link's thread, before the next begins."""
    fake = peers.fake()
    link = peers.link(fake.port, heard)
    sock = fake.welcome()
    heard.wait_for_event("up", B)
    size = 24 << 20  # more than all buffers on the way hold
    big = AppendEntries(A, B, 1, 0, 0, (Entry(1, 1, EntryKind.COMMAND, bytes(size)),), 0, 0)
    frames = FrameDecoder(CLUSTER, sender=A, to=B)

    link.post(big)
    frames.feed(sock.recv(1 << 20, socket.MSG_WAITALL))  # there is room again
    link.post(vote(1))

    got: list[Message] = []
    while len(got) < 2:
        frames.feed(sock.recv(1 << 20))
        got += frames.take()
    assert got == [big, vote(1)]


def test_post_in_part_needs_no_further_call_to_finish(peers: Peers, heard: Recorder) -> None:
    """What the socket leaves over wakes the link's thread."""
    fake = peers.fake()
    link = peers.link(fake.port, heard)
    sock = fake.welcome()
    heard.wait_for_event("up", B)
    size = 24 << 20
    big = AppendEntries(A, B, 1, 0, 0, (Entry(1, 1, EntryKind.COMMAND, bytes(size)),), 0, 0)

    link.post(big)

    left = len(encode_message(CLUSTER, big))
    while left:
        left -= len(sock.recv(1 << 20))


@pytest.mark.slow
def test_peer_that_stops_reading_is_cut_and_holds_nobody_up(peers: Peers, heard: Recorder) -> None:
    """Its link waits no longer than the send time-out; other links and callers do not wait."""
    fake = peers.fake()
    frame = encode_message(CLUSTER, AppendEntries(A, B, 1, 0, 0, (), 0, 0)) * 10_000
    stuck = peers.link(
        fake.port, Recorder(), source=lambda member_id, may_wait: frame, send_timeout_s=0.4
    )
    fake.welcome()
    other = peers.link(peers.listener(heard).address[1], heard)
    heard.wait_for_event("up", B)

    before_s = time.monotonic()
    stuck.post(vote(1))
    stuck.push()
    other.post(vote(3))
    heard.wait_for_messages(vote(3))
    assert time.monotonic() - before_s < 0.3

    fake.accept()  # it dials anew
    assert "has read nothing for 0.4 s" in stuck.last_error
    assert not stuck.is_up


# ---- Links: coming and going -------------------------------------------------------------------


def test_idle_link_of_a_peer_that_dies_says_so_within_200_ms(peers: Peers, heard: Recorder) -> None:
    """Its connection breaks and its port refuses: evidence, with nothing to send needed."""
    fake = peers.fake()
    link = peers.link(fake.port, heard)
    fake.welcome()
    heard.wait_for_event("up", B)

    before_s = time.monotonic()
    fake.die()
    heard.wait_for_event("dead", B)

    assert time.monotonic() - before_s < 0.2
    assert not link.is_up
    assert heard.events.count(("dead", B)) == 1


def test_peer_whose_port_takes_one_more_connection_while_it_dies_is_called_dead(
    peers: Peers, heard: Recorder
) -> None:
    """The kernel may close a process's connections before its port."""
    fake = peers.fake()
    peers.link(fake.port, heard)
    fake.welcome().close()

    fake.accept()
    assert ("dead", B) not in heard.events
    fake.die()

    heard.wait_for_event("dead", B)


def test_peer_that_answers_as_another_process_was_dead(peers: Peers, heard: Recorder) -> None:
    """A restart may be quicker than the first look at the port."""
    fake = peers.fake()
    peers.link(fake.port, heard)

    fake.welcome(boot_id=B).close()
    fake.welcome(boot_id=C)
    heard.wait_for_event("up", B, times=2)

    assert heard.events == [("up", B), ("dead", B), ("up", B)]


def test_peer_that_answers_as_the_same_process_is_not_dead(peers: Peers, heard: Recorder) -> None:
    """A broken connection alone is no evidence."""
    fake = peers.fake()
    peers.link(fake.port, heard)

    fake.welcome().close()
    fake.welcome()
    heard.wait_for_event("up", B, times=2)

    assert heard.events == [("up", B), ("up", B)]


@pytest.mark.slow
def test_peer_that_is_silent_is_not_called_dead(peers: Peers, heard: Recorder) -> None:
    """A stopped process, or a network that drops everything, keeps the port open or mute."""
    fake = peers.fake()
    link = peers.link(fake.port, heard, handshake_timeout_s=0.05)
    fake.welcome().close()

    for _ in range(3):
        fake.accept()  # and say nothing

    assert heard.events == [("up", B)]
    assert "in time" in link.last_error or "timed out" in link.last_error


def test_peer_that_was_never_reached_is_not_called_dead(peers: Peers, heard: Recorder) -> None:
    """Evidence of a death needs a life before it."""
    tried = threading.Semaphore(0)

    def connect(address: tuple[str, int], timeout_s: float) -> socket.socket:
        tried.release()
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    link = peers.link(1, heard, connect=connect)

    for _ in range(3):
        assert tried.acquire(timeout=DEADLINE_S)
    assert heard.events == []
    assert "refused" in link.last_error


def test_node_that_lost_its_disk_refuses_and_shows_that_the_old_member_is_dead(
    peers: Peers, heard: Recorder
) -> None:
    """Under the old address there is another member now, hence another process (T12)."""
    fake = peers.fake()
    link = peers.link(fake.port, heard)
    fake.welcome()
    heard.wait_for_event("up", B)
    fake.die()
    heard.wait_for_event("dead", B)

    reborn = Recorder(Identity(CLUSTER, C, "node-b"))
    peers.listener(reborn, port=fake.port, boot_id=C)
    link.kick()

    expected = f"is member {C} of cluster {CLUSTER}, not member {B}"
    assert wait_until(lambda: expected in link.last_error), link.last_error
    assert not link.is_up
    assert reborn.events == []


@given(st.integers(1, 10_000))
def test_backoff_doubles_to_its_maximum_with_jitter(failures: int) -> None:
    """From 50 ms to 1 s, less up to a half, so that nodes do not dial in step."""
    doubled_s = min(0.05 * 2 ** min(failures - 1, 10), 1.0)

    assert doubled_s / 2 <= backoff_s(failures) <= doubled_s


@pytest.mark.usefixtures("long_pauses")
def test_link_kicked_in_its_pause_dials_at_once(peers: Peers, heard: Recorder) -> None:
    """A peer that was heard of is there again: no reason to wait."""
    tried = threading.Semaphore(0)

    def connect(address: tuple[str, int], timeout_s: float) -> socket.socket:
        tried.release()
        raise TimeoutError("timed out")

    link = peers.link(1, heard, connect=connect)
    assert tried.acquire(timeout=DEADLINE_S)
    assert not tried.acquire(timeout=0.02)

    for _ in range(3):
        link.kick()
        assert tried.acquire(timeout=DEADLINE_S)
    link.close()
    assert "raft-peer-node-b" not in names_of_threads()


@pytest.mark.usefixtures("long_pauses")
def test_link_that_breaks_as_soon_as_it_is_up_redials_once_and_then_pauses(
    peers: Peers, heard: Recorder
) -> None:
    """The first look at a broken link's peer is immediate, but two nodes never chase in circles."""
    fake = peers.fake()
    link = peers.link(fake.port, heard)

    fake.welcome().close()
    sock = fake.welcome()
    heard.wait_for_event("up", B, times=2)
    link.kick()  # while it is up, which is no reason to dial later
    sock.close()
    fake.listening.settimeout(0.05)
    with pytest.raises(TimeoutError):
        fake.accept()

    fake.listening.settimeout(DEADLINE_S)
    assert wait_until(lambda: not link.is_up)
    link.kick()
    fake.welcome()
    heard.wait_for_event("up", B, times=3)


def test_link_that_was_connected_to_itself_takes_it_for_a_refusal(
    peers: Peers, heard: Recorder
) -> None:
    """TCP can do that where nobody listens; it would keep the peer from binding its own port."""
    made: list[socket.socket] = []

    def connect(address: tuple[str, int], timeout_s: float) -> socket.socket:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.connect(sock.getsockname())
        made.append(sock)
        return sock

    link = peers.link(1, heard, connect=connect)

    assert wait_until(lambda: "refused" in link.last_error)
    assert made[0].fileno() == -1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_error_in_the_source_of_a_link_is_fatal(peers: Peers, heard: Recorder) -> None:
    """A log that cannot be read is no broken connection: the thread must not go on (T24)."""

    def source(member_id: str, may_wait: bool) -> bytes | None:
        raise OSError("the log cannot be read")

    peers.link(peers.listener(Recorder()).address[1], heard, source=source)

    heard.wait_for_event("fatal", "OSError('the log cannot be read')")


# ---- The listener and its callers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("me", "lease_reads", "reason"),
    [
        (
            Identity("d1" * 8, A, "node-a"),
            False,
            f"of cluster {CLUSTER}, not of cluster {'d1' * 8}",
        ),
        (Identity(CLUSTER, B, "node-b"), False, "a copied data directory"),
        (NODE_A, True, "start all nodes with the same --read-mode"),
    ],
    ids=["cluster", "copy", "read-mode"],
)
def test_caller_that_does_not_belong_is_told_why_once(
    peers: Peers,
    heard: Recorder,
    caplog: pytest.LogCaptureFixture,
    me: Identity,
    lease_reads: bool,
    reason: str,
) -> None:
    """The one who can change it reads the reason in its log, not at every retry anew (T13)."""
    caplog.set_level(logging.WARNING)
    listener = peers.listener(heard)
    tried = threading.Semaphore(0)

    def connect(address: tuple[str, int], timeout_s: float) -> socket.socket:
        tried.release()
        return socket.create_connection(address, timeout_s)

    link = peers.link(listener.address[1], heard, me=me, connect=connect, lease_reads=lease_reads)
    for _ in range(4):
        assert tried.acquire(timeout=DEADLINE_S)
        link.kick()

    assert reason in link.last_error
    assert not link.is_up
    assert heard.events == []
    told = [r for r in caplog.records if reason in r.getMessage()]
    assert sorted(r.levelname for r in told) == ["ERROR", "WARNING"]  # the caller's, the other's


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        struct.pack(">I", 1 << 30),
        struct.pack(">I", FRAME_BYTES_MAX) + b"\x01\x01",
        struct.pack(">I", 40) + os.urandom(40),
        encode_message(CLUSTER, vote(1)),
        encode_handshake(Refused(CLUSTER, A, B, A, "no")),
    ],
    ids=["http", "1 GB", "80 MiB", "random", "no hello", "refused"],
)
def test_garbage_before_a_hello_closes_that_connection_only(
    peers: Peers, heard: Recorder, garbage: bytes
) -> None:
    """Whatever arrives, the next peer is served; a stranger gets 1 KiB of memory (G8, T68)."""
    listener = peers.listener(heard)

    with dial(listener) as stranger:
        stranger.sendall(garbage)
        assert is_closed_by_peer(stranger)

    assert heard.events == []
    peers.link(listener.address[1], heard)
    heard.wait_for_event("up", B)


def test_connection_that_says_nothing_is_closed_at_the_deadline(
    peers: Peers, heard: Recorder
) -> None:
    """Nor does a byte now and then buy time: the deadline is for the whole Hello."""
    listener = peers.listener(heard, handshake_timeout_s=0.1)

    with dial(listener) as silent, dial(listener) as slow:
        slow.sendall(encode_handshake(HELLO_A)[:9])
        assert is_closed_by_peer(silent)
        assert is_closed_by_peer(slow)


def test_strangers_beyond_the_limit_push_out_the_oldest_and_not_a_peer(
    peers: Peers, heard: Recorder
) -> None:
    """Idle connections can neither pile up nor lock the members out (T67)."""
    listener = peers.listener(heard, handshake_timeout_s=60.0)
    early = peers.link(listener.address[1], heard)
    heard.wait_for_event("up", B)

    with ExitStack() as stack:
        strangers = [stack.enter_context(dial(listener)) for _ in range(UNIDENTIFIED_MAX + 1)]
        assert is_closed_by_peer(strangers[0])
        late = Identity(CLUSTER, C, "node-c")
        peers.link(listener.address[1], heard, me=late, boot_id=C)
        heard.wait_for_event("connected", C, C)

        early.post(vote(1))
        heard.wait_for_messages(vote(1))
        assert heard.events.count(("connected", A, A)) == 1


def test_peer_that_has_nothing_to_say_stays_connected(peers: Peers, heard: Recorder) -> None:
    """The handshake's deadline ends with the handshake: time-outs are Raft's business."""
    listener = peers.listener(heard, handshake_timeout_s=0.03)

    with dial(listener, HELLO_A) as sock:
        assert not heard.wait_for(lambda: ("disconnected", A) in heard.events, timeout_s=0.1)
        sock.sendall(encode_message(CLUSTER, vote(1)))
        heard.wait_for_messages(vote(1))


def test_bad_frame_from_a_peer_closes_its_connection(peers: Peers, heard: Recorder) -> None:
    """Also a frame in another member's name: one connection speaks for one sender."""
    with dial(peers.listener(heard), HELLO_A) as sock:
        foreign = VoteReply(C, B, 2, True, False)
        sock.sendall(encode_message(CLUSTER, vote(1)) + encode_message(CLUSTER, foreign))
        assert is_closed_by_peer(sock)

    heard.wait_for_event("disconnected", A)
    heard.wait_for_messages(vote(1))


def test_newer_connection_of_a_peer_replaces_the_older_and_is_the_one_that_counts(
    peers: Peers, heard: Recorder
) -> None:
    """The end of the older one says nothing about a peer that has dialled anew."""
    listener = peers.listener(heard)

    with dial(listener, HELLO_A) as older:
        heard.wait_for_event("connected", A, A)
        with dial(listener, HELLO_A) as newer:
            heard.wait_for_event("connected", A, A, times=2)
            assert is_closed_by_peer(older)
            assert wait_until(lambda: names_of_threads().count("raft-recv-node-a") == 1)
            assert ("disconnected", A) not in heard.events
            newer.sendall(encode_message(CLUSTER, vote(1)))
            heard.wait_for_messages(vote(1))
        heard.wait_for_event("disconnected", A)

    assert heard.events == [("connected", A, A), ("connected", A, A), ("disconnected", A)]


def test_second_process_of_one_member_is_refused_as_long_as_the_first_lives(
    peers: Peers, heard: Recorder
) -> None:
    """A data directory that was copied: two processes with one vote (T12)."""
    listener = peers.listener(heard)
    hello = encode_handshake(Hello(CLUSTER, A, B, C, False, "node-a"))

    with dial(listener, HELLO_A):
        heard.wait_for_event("connected", A, A)
        with dial(listener) as second:
            second.sendall(hello)
            answer = read_handshake(second)
        assert isinstance(answer, Refused)
        assert "never start a copied data directory" in answer.reason
        assert ("disconnected", A) not in heard.events

    dial(listener, Hello(CLUSTER, A, B, C, False, "node-a")).close()


def test_connection_to_a_peer_notices_when_its_machine_is_gone(
    peers: Peers, heard: Recorder
) -> None:
    """Who only listens would wait for ever for one that lost its power; the kernel asks (T20)."""
    listener = peers.listener(heard)
    link = peers.link(listener.address[1], heard)
    heard.wait_for_event("up", B)
    (inbound,) = listener._connections

    for sock in (link._sock, inbound.sock):
        assert sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 2
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) <= 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_error_in_the_handler_of_a_message_is_fatal(peers: Peers, heard: Recorder) -> None:
    """Not even an OSError may pass for a broken connection: it can be the disk's (T24)."""

    class Broken(Recorder):
        def on_messages(self, messages: Sequence[Message]) -> None:
            raise OSError("no space")

    handler = Broken()
    link = peers.link(peers.listener(handler).address[1], heard)
    heard.wait_for_event("up", B)
    link.post(vote(1))

    handler.wait_for_event("fatal", "OSError('no space')")


def test_port_in_use_is_reported_with_the_address_and_what_to_do(
    peers: Peers, heard: Recorder
) -> None:
    """A start that cannot work ends at once with a sentence for a person (T70)."""
    port = peers.listener(heard).address[1]

    with pytest.raises(PeerPortError, match=f"127.0.0.1:{port}: Address already.*--peer-port"):
        peers.listener(heard, port=port)
    with pytest.raises(PeerPortError, match=r"192.0.2.1:0: .*--host"):
        PeerListener("192.0.2.1", 0, boot_id=B, lease_reads=False, on_fatal=heard.on_fatal)


# ---- Closing -----------------------------------------------------------------------------------


def test_close_leaves_no_thread_and_no_file_descriptor(heard: Recorder) -> None:
    """Up, dialling, pausing, shaking hands or never started: all of it goes."""
    threads, descriptors = set(threading.enumerate()), sorted(os.listdir("/dev/fd"))

    with ExitStack() as stack:
        peers = Peers(stack)
        listener, fake, mute = peers.listener(heard), peers.fake(), peers.fake()
        peers.link(listener.address[1], heard)
        peers.link(fake.port, heard)
        fake.welcome().close()
        fake.listening.close()
        peers.link(mute.port, heard)
        mute.accept()
        peers.link(1, heard, start=False)
        stack.enter_context(dial(listener))
        heard.wait_for_event("connected", A, A)
        unstarted = PeerListener("127.0.0.1", 0, boot_id=B, lease_reads=False, on_fatal=print)
        stack.callback(unstarted.close)
        names = set(names_of_threads())
        before_s = time.monotonic()

    assert {"raft-peer-node-b", "raft-recv-node-a", "accept-peers"} <= names
    assert time.monotonic() - before_s < 1.0
    assert set(threading.enumerate()) == threads
    assert sorted(os.listdir("/dev/fd")) == descriptors


def test_listener_that_is_closed_reports_no_disconnection(peers: Peers, heard: Recorder) -> None:
    """It would tell of our own end as if it were the peers'."""
    listener = peers.listener(heard)

    with dial(listener, HELLO_A) as sock:
        heard.wait_for_event("connected", A, A)
        listener.close()
        assert is_closed_by_peer(sock)

    assert heard.events == [("connected", A, A)]


def test_closed_link_called_again_does_nothing(peers: Peers, heard: Recorder) -> None:
    """Threads of the node may still hold a link that is gone; its descriptors may be others' now."""
    link = peers.link(peers.listener(heard).address[1], heard)
    heard.wait_for_event("up", B)
    link.close()

    link.push()
    link.kick()
    link.post(vote(1))
    link.close()

    assert not link.is_up
    assert heard.messages == []
