"""Peer links: how Raft's messages get from one server to another.

Rule 1: a link carries messages one way, over the connection that the sender dialled; what the peer
says comes over the one that it dialled. So no server writes where it might also have to read.
Rule 2: a link may lose, delay or reorder messages, never change one (``raft_frames.py``); bytes
that are not a whole, valid frame close the connection, and nothing else (T13, T68).
Rule 3: silence is no evidence. A peer is called dead only when its port refuses connections, or
another process answers at it, after a link to it broke. Time-outs are Raft's business.

Threads: ``raft-peer-<node>`` runs a PeerLink (dial, hand-shake, send), ``accept-peers`` and a
``raft-recv-<node>`` for each connection run a PeerListener. Callbacks come from these threads,
``source`` also from whoever calls ``post`` or ``push``: with the link's sending lock held, so those
two must not be called with a lock held that ``source`` takes (order: sending lock > caller's lock).

Read on in ``raft_node.py``, which owns the links and the listener.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import random
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, cast

from raft_frames import (
    PREFIX_BYTES,
    FrameDecoder,
    FrameError,
    Hello,
    Refused,
    decode_handshake,
    encode_handshake,
    encode_message,
    handshake_bytes_after,
)
from raft_types import Identity, Member, MemberId, Membership, Message

log = logging.getLogger(__name__)

RECEIVE_BYTES: Final = 256 << 10
QUEUE_MESSAGES_MAX: Final = 256
UNIDENTIFIED_MAX: Final = 64  # connections that have not said their name yet
SENDERS_MAX: Final = 64  # connections that have: more than any sensible cluster has members
CONNECT_TIMEOUT_S: Final = 1.0
KEEPALIVE_IDLE_S: Final = 2
LATER: Final = b""  # instead of a frame: there is one, but to get it takes waiting
NUMBER: Final = re.compile(r"\b[0-9a-f]*[0-9][0-9a-f]*\b")  # or an id
BACKOFF_S_MIN: Final = 0.05
BACKOFF_S_MAX: Final = 1.0


class PeerPortError(Exception):
    """The address that is meant for this server's peers can't be listened on."""


# ---- Sockets -----------------------------------------------------------------------------------


def send_without_waiting(sock: socket.socket, data: bytes) -> int:
    """Send what the kernel takes at once; returns how many bytes. Raises OSError.

    The interpreter's lock is kept, unlike in ``socket.send``: the call can't wait, and letting go
    of the lock would cost a queue of other threads for each of many short sends (docs/adr/0005).
    """
    if _libc_send is None:
        return sock.send(data, socket.MSG_DONTWAIT)
    sent: int = _libc_send(sock.fileno(), data, len(data), _DONT_WAIT)
    if sent < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))  # of the subclass that belongs to the code
    return sent


class Receiver:
    """Receives for one thread what has arrived on any socket, keeping the interpreter's lock."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        space = bytearray(bytes_max)
        self._view = memoryview(space)
        self._space = (ctypes.c_char * bytes_max).from_buffer(space)

    def receive(self, sock: socket.socket) -> bytes:
        """What is there; b"" at the end. Raises OSError, BlockingIOError if there is nothing."""
        if _libc_recv is None:
            return sock.recv(self._bytes_max, _DONT_WAIT)
        count = _libc_recv(sock.fileno(), self._space, self._bytes_max, _DONT_WAIT)
        if count < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return self._view[:count].tobytes()


def _load(name: str) -> Callable[[int, object, int, int], int] | None:
    try:
        call = getattr(ctypes.PyDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None  # no such library here: slower, not different
    call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call.restype = ctypes.c_ssize_t
    return cast(Callable[[int, object, int, int], int], call)


_DONT_WAIT = int(socket.MSG_DONTWAIT)  # made once: to look at an IntFlag is slow
_libc_send = _load("send")
_libc_recv = _load("recv")


def _receive_handshake(sock: socket.socket, timeout_s: float) -> Hello | Refused:
    """The first frame on a connection. Raises FrameError, or OSError (also when it is late)."""
    deadline_s = time.monotonic() + timeout_s
    prefix = _receive_exactly(sock, PREFIX_BYTES, deadline_s)
    rest_bytes = handshake_bytes_after(prefix)
    return decode_handshake(prefix + _receive_exactly(sock, rest_bytes, deadline_s))


def _receive_exactly(sock: socket.socket, count: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < count:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no whole handshake in time")
        sock.settimeout(left_s)
        if not (piece := sock.recv(count - len(data))):
            raise ConnectionResetError("the connection was closed in the handshake")
        data += piece
    return data


def _configure(sock: socket.socket, silence_s: float) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A packet that goes lost in a partition is sent again ever more seldom, in the end once in two
    # minutes; the link would stay mute long after the network has healed. Better to dial anew.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
    # A machine that loses its power says nothing. Where nothing is sent either, as by who only
    # listens, its connection would count for that of a living process for ever.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


class _Wakeup:
    """Lets one thread, the owner, wait for a socket and for a call of ``set`` at once.

    A pipe, not a Condition: only ``poll`` can watch the socket too, and waking through it took as
    long in a measurement. ``set`` makes a system call only if the owner sleeps.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        # ``set`` writes the first and reads the second, ``wait`` the other way round: so at least
        # one of them sees the other, without a lock.
        self._pending = False
        self._asleep = False
        # Guards the pipe against being closed, and its numbers used anew, while it is written to.
        self._lock = threading.Lock()
        self._closed = False

    def set(self) -> None:
        """Make the present or the next ``wait`` return. From any thread; cheap."""
        self._pending = True
        if self._asleep:
            self._asleep = False
            with self._lock:
                if not self._closed:
                    # A full pipe wakes as well as one byte more would.
                    with contextlib.suppress(BlockingIOError):
                        os.write(self._writer, b"\0")

    def clear(self) -> None:
        """Forget calls of ``set``: the owner is about to look for what they announced."""
        self._pending = False

    def wait(self, sock: socket.socket | None, timeout_s: float | None = None) -> bool:
        """Sleep until ``set``, the time-out, or an event on ``sock``; True for the latter."""
        self._asleep = True
        if self._pending:
            self._asleep = False
            return False
        if sock is not None:
            self._poll.register(sock, select.POLLIN)
        try:
            events = self._poll.poll(None if timeout_s is None else timeout_s * 1000)
        finally:
            self._asleep = False
            if sock is not None:
                self._poll.unregister(sock)
        if any(fd == self._reader for fd, _ in events):
            os.read(self._reader, 4096)
        return any(fd != self._reader for fd, _ in events)

    def close(self) -> None:
        """Free the pipe; ``set`` does nothing from now on. Only after the owner has ended."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._reader)
                os.close(self._writer)


class _LinkBrokenError(Exception):
    """The connection of a link is of no more use; the text says why."""


class _Channel:
    """The sending side of a connection: whole frames, from the link's thread and any other."""

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._stall_s = stall_s
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)
        # Held by who writes to the socket; the link's thread may wait for the peer meanwhile.
        self._lock = threading.Lock()
        self._rest = memoryview(b"")  # of a frame that went out in part: nothing may pass it

    def send(self, frame: bytes) -> None:
        """Send all of it. Raises _LinkBrokenError, also if the peer reads nothing for stall_s."""
        with self._lock:
            try:
                self._flush_locked()
                self._rest = memoryview(frame)
                self._flush_locked()
            except OSError as error:
                raise _LinkBrokenError(_reason(error)) from error

    def try_send(self, frame: bytes) -> bool:
        """Send it if that takes no waiting; False: some of it is left, to go first in ``send``."""
        with self._lock:
            assert not self._rest
            try:
                sent = send_without_waiting(self.sock, frame)
            except OSError:  # no room; or broken, which ``send`` will find too
                sent = 0
            self._rest = memoryview(frame)[sent:]
            return not self._rest

    def has_rest(self) -> bool:
        """Whether part of a frame still waits."""
        return bool(self._rest)

    def _flush_locked(self) -> None:
        while self._rest:
            try:
                sent = self.sock.send(self._rest)
            except BlockingIOError:
                if not self._writable.poll(self._stall_s * 1000):
                    text = f"the peer has read nothing for {self._stall_s:g} s"
                    raise TimeoutError(text) from None
            else:
                self._rest = self._rest[sent:]

    def close(self) -> None:
        """Close the socket as soon as nobody writes to it."""
        with self._lock:
            self.sock.close()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


# ---- The outgoing side -------------------------------------------------------------------------


class PeerLink:
    """Dials one peer, for ever, and sends it what is posted and what ``source`` has to give."""

    def __init__(
        self,
        me: Identity,
        peer: Member,
        *,
        address: tuple[str, int],
        boot_id: str,
        lease_reads: bool,
        source: Callable[[MemberId, bool], bytes | None],
        on_up: Callable[[MemberId], None],
        on_peer_dead: Callable[[MemberId], None],
        on_fatal: Callable[[BaseException], None],
        connect: Callable[[tuple[str, int], float], socket.socket] = socket.create_connection,
        handshake_timeout_s: float = 5.0,
        send_timeout_s: float = 5.0,
    ) -> None:
        """``source(member_id, may_wait)`` is asked for frames until it returns None.

        Where it must not wait, for a disk say, it may return LATER: the link's thread asks again.

        ``address`` is where the peer can dial this server, for its answers.
        ``on_fatal`` gets what a callback raised, just before the thread dies of it.
        """
        self.peer = peer
        self._hello = Hello(
            me.cluster_id, me.member_id, peer.member_id, boot_id, lease_reads, me.node_id, *address
        )
        self._source = source
        self._on_up = on_up
        self._on_peer_dead = on_peer_dead
        self._on_fatal = on_fatal
        self._connect = connect
        self._handshake_timeout_s = handshake_timeout_s
        self._send_timeout_s = send_timeout_s

        self._wakeup = _Wakeup()
        # Control messages. When it is full the oldest falls out: Raft bears loss.
        self._queue: deque[Message] = deque(maxlen=QUEUE_MESSAGES_MAX)
        self._channel: _Channel | None = None  # while the link is up
        # Held by the one thread that takes frames and sends them, so that they leave in order.
        # Outside of whatever ``source`` takes.
        self._sending = threading.Lock()
        self._due = False  # set before trying _sending, cleared by who has it
        self._last_error = ""
        self._kicked = False
        # Guards _closing and _sock, so that ``close`` cuts off the socket that is in use.
        self._lock = threading.Lock()
        self._closing = False
        self._sock: socket.socket | None = None

        # Owner of the rest: the thread.
        self._failures = 0  # attempts in a row, for the back-off
        self._peer_boot_id = ""  # who answered last
        self._fate_unknown = False  # its link broke, and nothing has shown yet whether it died
        self._redialled_s = -BACKOFF_S_MAX  # when a broken link was last dialled without a pause
        self._thread = threading.Thread(
            target=self._run, name=f"raft-peer-{peer.node_id}", daemon=True
        )

    # ---- Any thread ----

    def start(self) -> None:
        """Begin to dial. If there is no thread left for that, ``post`` and ``kick`` try again."""
        try:
            with self._lock:
                if self._thread.ident is None and not self._closing:
                    self._thread.start()
        except RuntimeError as error:
            self._note_failure(logging.WARNING, _reason(error))

    @property
    def is_up(self) -> bool:
        """Whether the peer has accepted the connection and it has not been seen to break."""
        return self._channel is not None

    @property
    def last_error(self) -> str:
        """Why the link is not up; empty while it is, and before the first attempt."""
        return self._last_error

    def post(self, message: Message) -> None:
        """Send this now or soon; dropped if the link is down."""
        if self._channel is not None:
            self._queue.append(message)
            self.push()
        elif self._thread.ident is None:
            self.start()

    def push(self) -> None:
        """Send what is posted and what ``source`` has, if the link is up; never waits.

        Done by the calling thread, which spares a change of threads; what does not go at once is
        left to the link's own.
        """
        self._due = True
        while self._due and (channel := self._channel) is not None:
            # Who holds it looks at _due once more after letting it go.
            if not self._sending.acquire(blocking=False):
                return
            try:
                self._due = False
                if not self._try_send_all(channel):
                    self._wakeup.set()
                    return
            finally:
                self._sending.release()

    def _try_send_all(self, channel: _Channel) -> bool:
        if channel.has_rest():
            return False
        while (frame := self._next(may_wait=False)) is not None:
            if frame is LATER or not channel.try_send(frame):
                return False
        return True

    def kick(self) -> None:
        """Dial now, whatever the back-off: the peer was heard of."""
        if self._channel is None:
            self._kicked = True
            self._wakeup.set()
            self.start()

    def redirect(self, peer: Member) -> None:
        """The peer is to be dialled at this address from now on."""
        with self._lock:
            self.peer = peer
            if self._sock is not None:
                _cut(self._sock)
        self.kick()

    def end(self) -> None:
        """Break the link and let the thread end; does not wait for that."""
        with self._lock:
            self._closing = True
            if self._sock is not None:
                _cut(self._sock)
            if self._thread.ident is None:
                self._wakeup.close()  # as the thread would do in the end
        self._wakeup.set()

    def close(self, timeout_s: float = 2.0) -> None:
        """``end``, and wait. Not from a callback nor with a lock it may take."""
        self.end()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("peer link does not end node=%s", self.peer.node_id)

    # ---- Thread raft-peer-<node> ----

    def _run(self) -> None:
        try:
            while not self._closing:
                if (channel := self._dial()) is not None:
                    self._use(channel)
                else:
                    self._pause()
        except BaseException as error:
            self._on_fatal(error)
            raise
        finally:
            self._wakeup.close()

    def _dial(self) -> _Channel | None:
        """A connection that the peer has accepted; None if that failed."""
        self._kicked = False
        try:
            sock = self._connect((self.peer.host, self.peer.peer_port), CONNECT_TIMEOUT_S)
            answer = self._shake_hands(sock)
        except ConnectionRefusedError as error:
            self._note_failure(logging.WARNING, _reason(error))
            self._judge("")
            return None
        except (OSError, FrameError, ValueError) as error:  # the last: a host that can't be one
            self._note_failure(logging.WARNING, _reason(error))
            return None
        if isinstance(answer, Refused):
            self._release(sock)
            self._note_failure(logging.ERROR, f"refused by the peer: {answer.reason}")
            self._judge(answer.boot_id)
            return None
        self._judge(answer.boot_id)
        self._peer_boot_id = answer.boot_id
        return _Channel(sock, self._send_timeout_s)

    def _shake_hands(self, sock: socket.socket) -> Hello | Refused:
        with self._lock:
            self._sock = sock
            if self._closing:
                _cut(sock)
        try:
            # Where nobody listens, the kernel may pick the very port that is dialled for the near
            # end too; TCP then connects the socket to itself and the peer can't bind its port.
            if sock.getsockname() == sock.getpeername():
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            _configure(sock, self._send_timeout_s)
            sock.settimeout(self._handshake_timeout_s)
            sock.sendall(encode_handshake(self._hello))
            answer = _receive_handshake(sock, self._handshake_timeout_s)
            expected = (self._hello.cluster_id, self._hello.to, self._hello.sender)
            if isinstance(answer, Hello) and answer.ids != expected:
                raise FrameError("the answer is not from, or not to, the right member")
        except BaseException:
            self._release(sock)
            raise
        return answer

    def _release(self, sock: socket.socket) -> None:
        with self._lock:
            self._sock = None
            sock.close()

    def _judge(self, boot_id: str) -> None:
        """Draw the conclusion from who answers at the peer's address now ("" for nobody).

        A dying process may accept one more connection before its port closes; so the first answer
        that says anything counts, not only that of the first attempt after the link broke.
        """
        if self._fate_unknown and boot_id != self._peer_boot_id:
            log.info("peer process died node=%s boot=%s", self.peer.node_id, self._peer_boot_id)
            self._on_peer_dead(self.peer.member_id)
        self._fate_unknown = False

    def _note_failure(self, level: int, reason: str) -> None:
        self._failures += 1
        if reason != self._last_error and not self._closing:
            self._last_error = reason
            log.log(level, "no link to peer node=%s: %s", self.peer.node_id, reason)

    def _pause(self) -> None:
        until_s = time.monotonic() + backoff_s(self._failures)
        while (left_s := until_s - time.monotonic()) > 0:
            self._wakeup.clear()
            if self._kicked:
                self._failures = 0
            if self._kicked or self._closing:
                return
            self._wakeup.wait(None, left_s)

    def _use(self, channel: _Channel) -> None:
        """Send over the connection until it breaks or the link is closed."""
        self._queue.clear()
        self._last_error = ""
        self._channel = channel
        log.info("link to peer is up node=%s boot=%s", self.peer.node_id, self._peer_boot_id)
        self._on_up(self.peer.member_id)
        try:
            while not self._closing:
                self._send_all(channel)
                if self._wakeup.wait(channel.sock):
                    raise _LinkBrokenError(_why_readable(channel.sock))
        except _LinkBrokenError as error:
            self._note_failure(logging.WARNING, str(error))
        self._channel = None
        with self._lock:
            self._sock = None
        channel.close()
        self._fate_unknown = True
        # The first look at what became of the peer must not wait; but a peer that accepts and at
        # once breaks every connection gets the pauses all the same.
        now_s = time.monotonic()
        if now_s - self._redialled_s >= BACKOFF_S_MAX:
            self._redialled_s = now_s
            self._failures = 0
        else:
            self._pause()

    def _send_all(self, channel: _Channel) -> None:
        self._wakeup.clear()
        self._due = True
        while self._due and not self._closing:
            with self._sending:
                self._due = False
                if channel.has_rest():
                    channel.send(b"")
                while not self._closing and (frame := self._next(may_wait=True)) is not None:
                    channel.send(frame)

    def _next(self, *, may_wait: bool) -> bytes | None:
        # Votes and replies are small and urgent: they pass before the next batch of entries.
        if self._queue:
            return encode_message(self._hello.cluster_id, self._queue.popleft())
        return self._source(self.peer.member_id, may_wait)


class PeerLinks(dict[MemberId, PeerLink]):
    """The links by their peers' ids, and which peers' processes live.

    The caller guards it with a lock; what it returns is to be called without that lock.
    """

    def __init__(self, make: Callable[[Member], PeerLink]) -> None:
        super().__init__()
        self._make = make
        self.connected: dict[MemberId, str] = {}  # who has a connection to us: their boot ids
        self.dead: set[MemberId] = set()  # whose port refuses, or is another process's

    def is_alive(self, member_id: MemberId, *, but_for: str) -> bool:
        """Whether a connection says that this peer's process runs, one that did not boot as that.

        A connection whose other machine has lost its power may be there yet, when the port has
        shown already that the process is gone.
        """
        if member_id in self.dead:
            return False
        boot_id = self.connected.get(member_id)
        if boot_id is None:
            return member_id in self and self[member_id].is_up
        return boot_id != but_for

    def is_gone(self, member_id: MemberId) -> bool:
        """Whether it has died for certain: its connection to us is gone, and its port showed it."""
        return member_id in self.dead and member_id not in self.connected

    def to(self, peer: Member) -> Callable[[], None]:
        """This peer was heard of, at this address: what makes the link go there now."""
        link = self.get(peer.member_id)
        if link is None:
            link = self[peer.member_id] = self._make(peer)
            return link.start
        if (link.peer.host, link.peer.peer_port) == (peer.host, peer.peer_port):
            return link.kick
        return partial(link.redirect, peer)

    def end_others(
        self, membership: Membership, needed: Collection[MemberId | None]
    ) -> list[Callable[[], None]]:
        """Let go of the links to all but members and ``needed``: what makes them end."""
        if len(self) < len(membership.members):
            return []  # one to each other member: the usual case
        others = [i for i in self if i not in needed and membership.get(i) is None]
        return [self.pop(member_id).end for member_id in others]


def backoff_s(failures: int) -> float:
    """The pause after so many failures in a row: doubling, with jitter, to BACKOFF_S_MAX."""
    doubled_s = BACKOFF_S_MIN * 2.0 ** min(failures - 1, 10)
    return min(doubled_s, BACKOFF_S_MAX) * random.uniform(0.5, 1.0)


def _why_readable(sock: socket.socket) -> str:
    """What an event means on a connection over which the peer has nothing to say."""
    try:
        return "the peer sent what it must not" if sock.recv(1) else "the peer closed it"
    except OSError as error:
        return _reason(error)


# ---- The incoming side -------------------------------------------------------------------------


class PeerHandler(Protocol):
    """Who hears what peers say. Called on the threads ``raft-recv-<node>``."""

    @property
    def identity(self) -> Identity:
        """Who this server is."""

    def on_connected(self, hello: Hello) -> None:
        """A peer has dialled; again, without ``on_disconnected`` between, if it dials anew."""

    def on_disconnected(self, member_id: MemberId) -> None:
        """The last connection of a peer is gone."""

    def on_messages(self, messages: Sequence[Message]) -> None:
        """What a peer has said since the last time: all that one look at its socket brought."""


@dataclass(eq=False, slots=True)
class _Inbound:
    """A connection that a peer, or anybody, has dialled."""

    sock: socket.socket
    host: str
    boot_id: str = ""  # of the process, once it has said its name
    thread: threading.Thread | None = None


class PeerListener:
    """Accepts the peers' connections and hands on what they say."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        boot_id: str,
        lease_reads: bool,
        on_fatal: Callable[[BaseException], None],
        handshake_timeout_s: float = 5.0,
    ) -> None:
        """Binds the address, so that a port in use is known at once: raises PeerPortError.

        Peers that dial now wait for ``start``. ``on_fatal`` gets what the handler raised, just
        before the thread dies of it.
        """
        self._listening = _bind(host, port)
        self._boot_id = boot_id
        self._lease_reads = lease_reads
        self._on_fatal = on_fatal
        self._handshake_timeout_s = handshake_timeout_s
        self._wakeup = _Wakeup()
        self._acceptor: threading.Thread | None = None
        # Held while the handler is told of a connection that comes or goes, so that it hears it
        # in the order in which it happened. Outside of _lock and of whatever the handler takes.
        self._reporting = threading.Lock()
        # Guards the following, and sockets against being closed while ``_cut`` uses them.
        self._lock = threading.Lock()
        self._closing = False
        self._connections: set[_Inbound] = set()
        self._unidentified: dict[_Inbound, None] = {}  # the oldest first
        self._by_sender: dict[MemberId, _Inbound] = {}
        self._logged: dict[str, str] = {}  # what was said last about whom

    # ---- Thread main ----

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that it listens on."""
        host, port = self._listening.getsockname()[:2]
        return host, port

    def start(self, handler: PeerHandler) -> None:
        """Begin to accept; the handler's cluster is founded or joined by now."""
        assert handler.identity.cluster_id
        self._acceptor = threading.Thread(
            target=self._accept_all, args=(handler,), name="accept-peers", daemon=True
        )
        self._acceptor.start()

    def close(self, timeout_s: float = 2.0) -> None:
        """Close the port and all connections; the handler hears nothing of that."""
        with self._lock:
            self._closing = True
            for inbound in self._connections:
                _cut(inbound.sock)
            threads = [i.thread for i in self._connections if i.thread is not None]
        self._wakeup.set()
        if self._acceptor is not None:
            threads.append(self._acceptor)
        deadline_s = time.monotonic() + timeout_s
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._acceptor is None or not self._acceptor.is_alive():
            self._listening.close()
            self._wakeup.close()
        if left := [thread.name for thread in threads if thread.is_alive()]:
            log.warning("threads do not end names=%s", ",".join(left))

    # ---- Thread accept-peers ----

    def _accept_all(self, handler: PeerHandler) -> None:
        try:
            while not self._closing:
                if self._wakeup.wait(self._listening):
                    self._accept(handler)
        except BaseException as error:
            self._on_fatal(error)
            raise

    def _accept(self, handler: PeerHandler) -> None:
        try:
            sock, (host, *_) = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has gone again
        except OSError as error:  # no file descriptors left, most likely
            self._rest(error)
            return
        inbound = _Inbound(sock, host)
        inbound.thread = threading.Thread(
            target=self._receive, args=(inbound, handler), name="raft-recv-?", daemon=True
        )
        try:
            with self._lock:
                if self._closing:
                    sock.close()
                    return
                # A member says its name at once: it is not the newest who holds up the others.
                if len(self._unidentified) >= UNIDENTIFIED_MAX:
                    oldest = next(iter(self._unidentified))
                    del self._unidentified[oldest]
                    _cut(oldest.sock)
                inbound.thread.start()
                self._connections.add(inbound)
                self._unidentified[inbound] = None
        except RuntimeError as error:  # no threads left: the peer dials again
            sock.close()
            self._rest(error)

    def _rest(self, error: Exception) -> None:
        """Who accepts at once again would keep a system busy that has run out of something."""
        log.warning("cannot accept a peer: %s", error)
        self._wakeup.wait(None, BACKOFF_S_MAX)

    # ---- Threads raft-recv-<node> ----

    def _receive(self, inbound: _Inbound, handler: PeerHandler) -> None:
        try:
            hello = self._identify(inbound, handler.identity)
            if hello is not None:
                self._begin(inbound, hello, handler)
                self._read(inbound, hello, handler)
            self._end(inbound, hello, handler)
        except BaseException as error:
            self._on_fatal(error)
            raise

    def _identify(self, inbound: _Inbound, me: Identity) -> Hello | None:
        """The peer's Hello if it is accepted; otherwise it has been told why not."""
        sock = inbound.sock
        try:
            _configure(sock, self._handshake_timeout_s)
            hello = _receive_handshake(sock, self._handshake_timeout_s)
            if isinstance(hello, Refused):
                raise FrameError("a refusal instead of a Hello")
            ids = (me.cluster_id, me.member_id, hello.sender)
            objection = self._objection(hello, me)
            if objection is not None:
                self._log_change(hello.sender, f"refused a peer node={hello.node_id}: {objection}")
                sock.sendall(encode_handshake(Refused(*ids, self._boot_id, objection)))
                return None
            answer = Hello(*ids, self._boot_id, self._lease_reads, me.node_id)
            sock.sendall(encode_handshake(answer))
            sock.settimeout(None)
        except (OSError, FrameError) as error:
            self._log_change(inbound.host, f"no peer from={inbound.host}: {_reason(error)}")
            return None
        return hello

    def _objection(self, hello: Hello, me: Identity) -> str | None:
        """Why this peer is not let in, and what to do about it; None if it is."""
        mine = f"{me.node_id} is member {me.member_id} of cluster {me.cluster_id}"
        if hello.cluster_id != me.cluster_id:
            return f"{mine}, not of cluster {hello.cluster_id}; check --join and the peer ports"
        if hello.to != me.member_id:
            return (
                f"{mine}, not member {hello.to}: after the loss of its data directory a node "
                f"is a new member, and the old one is to be removed"
            )
        if hello.sender == me.member_id:
            return f"{mine}, so nobody else is: start a copied data directory on one node only"
        if hello.lease_reads != self._lease_reads:
            modes = {True: "lease", False: "quorum"}
            return (
                f"{me.node_id} runs with --read-mode {modes[self._lease_reads]}, {hello.node_id} "
                f"with {modes[hello.lease_reads]}; start all nodes with the same --read-mode"
            )
        with self._lock:
            older = self._by_sender.get(hello.sender)
            if older is None and len(self._by_sender) >= SENDERS_MAX:
                return f"{me.node_id} has connections from {SENDERS_MAX} members already"
            if older and older.boot_id != hello.boot_id and not _has_ended(older.sock):
                return (
                    f"another process is member {hello.sender}, at {older.host}: two can't be; "
                    f"never start a copied data directory"
                )
        return None

    def _begin(self, inbound: _Inbound, hello: Hello, handler: PeerHandler) -> None:
        threading.current_thread().name = f"raft-recv-{hello.node_id}"
        with self._reporting:
            with self._lock:
                self._unidentified.pop(inbound, None)
                older = self._by_sender.get(hello.sender)
                inbound.boot_id = hello.boot_id
                self._by_sender[hello.sender] = inbound
                self._logged.pop(hello.sender, None)
                if older is not None:
                    _cut(older.sock)
            handler.on_connected(hello)

    def _read(self, inbound: _Inbound, hello: Hello, handler: PeerHandler) -> None:
        decoder = FrameDecoder(hello.cluster_id, sender=hello.sender, to=hello.to)
        space = memoryview(bytearray(RECEIVE_BYTES))
        try:
            while count := _receive_some(inbound.sock, space):
                decoder.feed(space[:count])
                messages: list[Message] = []
                try:
                    messages.extend(decoder.take())
                finally:
                    if messages:
                        handler.on_messages(messages)
        except FrameError as error:
            log.warning("peer connection closed node=%s: %s", hello.node_id, error)

    def _end(self, inbound: _Inbound, hello: Hello | None, handler: PeerHandler) -> None:
        with self._reporting:
            with self._lock:
                self._connections.discard(inbound)
                self._unidentified.pop(inbound, None)
                inbound.sock.close()
                if hello is None or self._by_sender.get(hello.sender) is not inbound:
                    return  # never reported, or replaced by a newer one
                del self._by_sender[hello.sender]
                if self._closing:
                    return
            handler.on_disconnected(hello.sender)

    def _log_change(self, who: str, text: str) -> None:
        """Log what is wrong with a caller, but not again at each of its retries."""
        what = NUMBER.sub("", text)  # a stranger can send another length each time
        with self._lock:
            if self._closing or self._logged.get(who) == what:
                return
            if len(self._logged) >= SENDERS_MAX:
                self._logged.clear()
            self._logged[who] = what
        log.warning("%s", text)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        text = f"can't listen for peers on {host}:{port}: {error.strerror}"
        raise PeerPortError(
            f"{text}; stop what uses the port, or see --peer-port, --host"
        ) from error
    listening.setblocking(False)
    return listening


def _cut(sock: socket.socket) -> None:
    """End a connection that another thread reads; that thread closes it."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _has_ended(sock: socket.socket) -> bool:
    """Whether the other side has closed it, which its thread may not have seen yet."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _receive_some(sock: socket.socket, space: memoryview) -> int:
    """The number of bytes received; 0 when the connection has ended, however it did."""
    try:
        return sock.recv_into(space)
    except OSError:
        return 0
