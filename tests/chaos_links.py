"""A network that misbehaves on request: every directed link between real processes in one thread.

Each node listens on ``INSIDE`` and tells everybody that it is on ``OUTSIDE``, at the same ports.
There stands a ``Network``, which carries bytes between the two. Nodes send to a peer over the
connection that they dial themselves, and name themselves in its first frame; so a connection to a
peer port is one *directed* link, and A to B may be dead while B to A is well.

Rule 1: TCP is kept: bytes are late, or never come, but are not changed. What is cut is held back,
as by a network that loses packets, and comes late when the link heals, if nobody gave up before.
Rule 2: ``lose`` and ``repeat`` take whole frames from links between nodes, which TCP would not do,
but a link may (``raft_transport.py``, rule 2).
Rule 3: a node whose port refuses connections refuses them here too, as soon as one has tried; that
is the evidence by which the others know that its process died.
"""

from __future__ import annotations

import contextlib
import logging
import random
import selectors
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from raft_frames import PREFIX_BYTES, Hello, decode_handshake, handshake_bytes_after

log = logging.getLogger(__name__)

INSIDE: Final = "127.0.0.1"
OUTSIDE: Final = "127.0.0.2"
CLIENT: Final = "client"  # the name of whoever calls a node's port for clients
RECEIVE_BYTES: Final = 64 * 1024
# Held back for one connection; then its sender has to wait, as with a full window of TCP.
HELD_BYTES_MAX: Final = 1024 * 1024
LOOK_S: Final = 0.025  # between two looks for nodes that listen again
DIAL_S: Final = 0.1
RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends an RST
_LENGTH: Final = struct.Struct(">I")

Link = tuple[str, str]  # who dials, and whom


@dataclass(slots=True)
class Weather:
    """What a directed link does to what is sent over it."""

    cut: bool = False
    delay_s: float = 0.0
    jitter_s: float = 0.0  # uniform, both ways
    lose: float = 0.0  # the share of frames that never arrive
    repeat: float = 0.0  # the share of frames that arrive twice
    bytes_per_s: float = 0.0  # 0: as fast as it goes


FAIR: Final = Weather()


class _End:
    """One end of a connection, with what is to be sent to it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.waiting: deque[tuple[float, bytes]] = deque()  # with the moment when it is due
        self.waiting_bytes = 0
        self.last_due = 0.0
        self.ended = False  # whoever sends to it has said that nothing follows
        self.events = 0

    def put(self, due: float, data: bytes) -> None:
        self.last_due = max(due, self.last_due)
        self.waiting.append((self.last_due, data))
        self.waiting_bytes += len(data)


@dataclass(eq=False)
class _Connection:
    """A caller and the node; ``link`` is unknown until the caller has said its name."""

    node_id: str
    port: int
    caller: _End
    callee: _End | None = None  # None: not dialled yet
    link: Link | None = None
    unnamed: bytearray = field(default_factory=bytearray)  # the beginning, up to the name
    frames: bytearray = field(default_factory=bytearray)  # the beginning of a frame
    half_open: bool = False  # the caller does not know that the callee has gone

    @property
    def ends(self) -> list[_End]:
        return [end for end in (self.caller, self.callee) if end is not None]


class Network:
    """All links of a cluster. Any thread may change the weather; one thread carries the bytes."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        # Guards what follows.
        self._lock = threading.Lock()
        self._weather: dict[Link, Weather] = {}
        self._orders: deque[Callable[[], None]] = deque()  # for the thread, in order
        self._stopping = False
        # Owner of the rest: the thread.
        self._ports: dict[int, tuple[str, str]] = {}  # whose they are; who calls them, if known
        self._listeners: dict[int, socket.socket] = {}  # of those that the node listens on
        self._connections: set[_Connection] = set()
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    # ---- Any thread ----

    def serve(self, node_id: str, port: int, peer_port: int) -> None:
        """Stand in front of these ports of the node, and of no others, whenever it listens there."""
        self._order(
            lambda: self._move(node_id, {port: (node_id, CLIENT), peer_port: (node_id, "")})
        )

    def change(self, links: Iterable[Link], weather: Weather) -> None:
        """Let these links behave so from now on."""
        with self._lock:
            self._weather.update(dict.fromkeys(links, weather))
        self._order(lambda: None)

    def heal(self) -> None:
        """Fair weather everywhere; what half-open connections there are get reset."""
        with self._lock:
            self._weather.clear()
        self._order(self._end_half_open)

    def reset(self, wanted: Callable[[Link], bool]) -> None:
        """Break the connections of the links with an RST to both ends."""
        self._order(lambda: self._drop_all(lambda c: c.link is not None and wanted(c.link)))

    def half_open(self, wanted: Callable[[Link], bool]) -> None:
        """The node sees these connections end; who dialled does not, and sends into the void."""
        self._order(lambda: self._forget_callees(wanted))

    def close(self) -> None:
        with self._lock:
            self._stopping = True
        self._order(lambda: None)
        self._thread.join()

    def _order(self, what: Callable[[], None]) -> None:
        """Have it done by the thread, and wait until it is."""
        done = threading.Event()

        def do() -> None:
            what()
            done.set()

        with self._lock:
            self._orders.append(do)
        with contextlib.suppress(OSError):
            self._wake_in.send(b"!")
        while not done.wait(0.1) and self._thread.is_alive():
            pass

    # ---- Thread network ----

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._carry()
        finally:
            for port in list(self._listeners):
                self._close_port(port)
            self._drop_all(lambda connection: True)
            self._selector.close()
            self._wake_out.close()
            self._wake_in.close()

    def _carry(self) -> None:
        now = time.monotonic()
        wait_s = 1.0
        if len(self._listeners) < len(self._ports):
            self._open_ports()
            wait_s = LOOK_S
        for connection in tuple(self._connections):
            wait_s = min(wait_s, self._send_due(connection, now))
        for key, events in self._selector.select(max(0.0, wait_s)):
            if key.data is None:
                self._obey()
            elif isinstance(key.data, int):
                self._take_call(key.data)
            else:
                connection, end = key.data
                if connection in self._connections and events & selectors.EVENT_READ:
                    self._receive(connection, end)

    def _obey(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)
        with self._lock:
            orders = list(self._orders)
            self._orders.clear()
        for order in orders:
            order()

    def _move(self, node_id: str, ports: dict[int, tuple[str, str]]) -> None:
        old = {port for port, (owner, _) in self._ports.items() if owner == node_id}
        for port in old - ports.keys():
            del self._ports[port]
            self._close_port(port)
        self._ports |= ports

    def _open_ports(self) -> None:
        """Listen for the nodes that listen again."""
        for port in (self._ports.keys() - self._listeners.keys()) & _listened_on():
            listener = socket.create_server((OUTSIDE, port), backlog=512)
            listener.setblocking(False)
            self._listeners[port] = listener
            self._selector.register(listener, selectors.EVENT_READ, port)

    def _close_port(self, port: int) -> None:
        listener = self._listeners.pop(port, None)
        if listener is not None:
            self._selector.unregister(listener)
            listener.close()

    def _take_call(self, port: int) -> None:
        if port not in self._listeners:
            return
        node_id, caller = self._ports[port]
        try:
            sock, _ = self._listeners[port].accept()
        except OSError:
            return
        connection = _Connection(node_id, port, _End(sock))
        self._connections.add(connection)
        if caller:
            connection.link = caller, node_id
            self._dial(connection)
        if connection in self._connections:
            self._watch(connection)

    def _dial(self, connection: _Connection) -> None:
        """Connect to the node itself: at once, on one machine."""
        try:
            sock = socket.create_connection((INSIDE, connection.port), timeout=DIAL_S)
            if sock.getsockname() == sock.getpeername():
                sock.close()
                raise ConnectionRefusedError
        except OSError as error:
            # First, so that who sees its connection end and tries again is refused.
            if isinstance(error, ConnectionRefusedError):
                self._close_port(connection.port)
            self._drop(connection)
            return
        connection.callee = _End(sock)

    def _watch(self, connection: _Connection) -> None:
        """Look for what comes, except where too much is held back already."""
        for end in connection.ends:
            other = connection.callee if end is connection.caller else connection.caller
            full = other is not None and other.waiting_bytes >= HELD_BYTES_MAX
            done = other is not None and other.ended
            wanted = 0 if full or done else selectors.EVENT_READ
            if wanted == end.events:
                continue
            if end.events:
                self._selector.unregister(end.sock)
            if wanted:
                self._selector.register(end.sock, wanted, (connection, end))
            end.events = wanted

    def _receive(self, connection: _Connection, end: _End) -> None:
        try:
            data = end.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)
            return
        other = connection.callee if end is connection.caller else connection.caller
        if connection.half_open:
            if not data:
                self._drop(connection)
            return
        if not data:
            if other is None:
                self._drop(connection)
                return
            other.ended = True
        elif connection.link is None:
            self._name(connection, data)
        elif end is connection.caller and connection.link[0] != CLIENT:
            connection.frames += data
            self._pass_frames(connection)
        elif other is not None:
            self._put(connection, other, data)
        if connection in self._connections:
            self._watch(connection)

    def _name(self, connection: _Connection, data: bytes) -> None:
        """Find out whose connection it is; only then is the node dialled."""
        connection.unnamed += data
        first = bytes(connection.unnamed)
        if len(first) < PREFIX_BYTES:
            return
        try:
            length = PREFIX_BYTES + handshake_bytes_after(first[:PREFIX_BYTES])
            if len(first) < length:
                return
            hello = decode_handshake(first[:length])
            assert isinstance(hello, Hello)
        except Exception:
            log.exception("no node's connection to %s", connection.node_id)
            self._drop(connection)
            return
        connection.link = hello.node_id, connection.node_id
        self._dial(connection)
        if connection.callee is not None:
            connection.callee.put(0.0, first[:length])
            connection.frames += first[length:]
            self._pass_frames(connection)

    def _pass_frames(self, connection: _Connection) -> None:
        """Hand on what is whole; here frames are lost, and come twice."""
        assert connection.callee is not None
        weather = self._weather_of(connection)
        data = connection.frames
        at = 0
        while len(data) - at >= _LENGTH.size:
            end = at + _LENGTH.size + _LENGTH.unpack_from(data, at)[0]
            if end > len(data):
                break
            if self._rng.random() >= weather.lose:
                frame = bytes(data[at:end])
                self._put(connection, connection.callee, frame)
                if self._rng.random() < weather.repeat:
                    self._put(connection, connection.callee, frame)
            at = end
        del data[:at]

    def _put(self, connection: _Connection, end: _End, data: bytes) -> None:
        weather = self._weather_of(connection)
        due = time.monotonic()
        if weather.delay_s:
            due += weather.delay_s + self._rng.uniform(-weather.jitter_s, weather.jitter_s)
        if weather.bytes_per_s:
            due = max(due, end.last_due) + len(data) / weather.bytes_per_s
        end.put(due, data)

    def _weather_of(self, connection: _Connection) -> Weather:
        with self._lock:
            return self._weather.get(connection.link or ("", ""), FAIR)

    def _send_due(self, connection: _Connection, now: float) -> float:
        """Send what is due; the seconds until something is again."""
        wait_s = 1.0
        if self._weather_of(connection).cut or connection.half_open:
            return wait_s
        for end in connection.ends:
            while end.waiting and end.waiting[0][0] <= now:
                due, data = end.waiting[0]
                try:
                    sent = end.sock.send(data)
                except BlockingIOError:
                    wait_s = min(wait_s, 0.005)
                    break
                except OSError:
                    self._drop(connection)
                    return wait_s
                end.waiting_bytes -= sent
                if sent < len(data):
                    end.waiting[0] = due, data[sent:]
                else:
                    end.waiting.popleft()
            if end.waiting:
                wait_s = min(wait_s, max(0.001, end.waiting[0][0] - now))
            elif end.ended:
                self._drop(connection, with_reset=False)
                return wait_s
        self._watch(connection)
        return wait_s

    def _drop(self, connection: _Connection, *, with_reset: bool = True) -> None:
        self._connections.discard(connection)
        for end in connection.ends:
            if end.events:
                self._selector.unregister(end.sock)
                end.events = 0
            with contextlib.suppress(OSError):
                if with_reset:
                    end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.sock.close()

    def _drop_all(self, wanted: Callable[[_Connection], bool]) -> None:
        for connection in [c for c in self._connections if wanted(c)]:
            self._drop(connection)

    def _forget_callees(self, wanted: Callable[[Link], bool]) -> None:
        for connection in self._connections:
            if connection.link and wanted(connection.link) and connection.callee:
                callee, connection.callee = connection.callee, None
                if callee.events:
                    self._selector.unregister(callee.sock)
                callee.sock.close()
                connection.half_open = True

    def _end_half_open(self) -> None:
        self._drop_all(lambda connection: connection.half_open)


def _listened_on() -> set[int]:
    """The ports on which somebody listens at ``INSIDE``, as Linux tells."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inside = f"{int.from_bytes(socket.inet_aton(INSIDE), sys.byteorder):08X}"
    words = (line.split(maxsplit=4) for line in lines)
    local = (w[1].split(":") for w in words if w[3] == "0A")  # TCP_LISTEN
    return {int(port, 16) for host, port in local if host == inside}
