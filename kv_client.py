"""The client library: a cluster seen as one store, through failovers.

Rule 1: every write stands in a client session under a serial of its own (thesis 6.3), so that it
is done once however often it is sent, and answered as the first time.
Rule 2: so any request is sent again, elsewhere and after a pause, until it is answered or
``timeout_s`` has passed; whether it was refused (no connection, MOVED, CLUSTERDOWN, BUSY), or may
have been done (the connection broke or went silent after it was sent, or the node said UNKNOWN).
Rule 3: after an attempt that may have been done, only the answer of the store itself is taken for
definite. Without one in time the caller gets ``OutcomeUnknownError`` and can look.

The session is opened by the first write. One that has ended (after an hour without a write) is
replaced by another, unless a write was under way in it: whether that was done is unknown then.

A client may be shared by any number of threads: each call takes a connection from the pool for
itself. It starts no thread. Read on in ``kv_protocol.py`` for the bytes, in ``kv_errors.py`` for
the errors, in ``example_client.py`` for its use.
"""

from __future__ import annotations

import json
import math
import random
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar, cast

from kv_commands import lookup
from kv_config import parse_address
from kv_errors import (
    AnswerForgottenError,
    BadRequestError,
    BusyError,
    KVError,
    MismatchError,
    NoPrimaryError,
    NoSessionError,
    NotPrimaryError,
    OutcomeUnknownError,
    ProtocolError,
)
from kv_protocol import ReplyParser, encode_request, json_or_text, text_or_json_bytes
from kv_types import Reply

JSONValue = None | bool | int | float | str | Sequence["JSONValue"] | Mapping[str, "JSONValue"]
# One argument of a request, as a caller may write it; text becomes UTF-8.
Argument = str | bytes | int

T = TypeVar("T")

DEFAULT_NODES: Final = ("127.0.0.1:6379", "127.0.0.1:6380", "127.0.0.1:6381")
# A live host answers a connection attempt within this even on a bad day: one SYN sent again.
CONNECT_S_MAX: Final = 1.5
# And who answers nothing on a new connection for this long is passed over for a while: the others
# may still redirect to a primary that hangs, until they elect another.
PROBE_S_MAX: Final = 1.0
PAUSE_S_MIN: Final = 0.020
PAUSE_S_MAX: Final = 0.500
# What is sent before replies are read. Both fit into the sockets' buffers, so that a client that
# still sends and a server that already answers never wait for each other.
CHUNK_BYTES_MAX: Final = 64 * 1024
CHUNK_REQUESTS_MAX: Final = 1024
RECEIVE_BYTES: Final = 64 * 1024
CLOSE_S_MAX: Final = 0.5
_OPEN_SESSION: Final = [b"SESSION", b"OPEN"]
_ONE_OF_MANY: Final = "it would be about one connection of many"
# What is not sent, and why.
UNSUITABLE_COMMANDS: Final[Mapping[bytes, str]] = {
    **dict.fromkeys((b"HELLO", b"READONLY", b"READWRITE", b"RESET"), _ONE_OF_MANY),
    **dict.fromkeys((b"QUIT", b"CLIENT"), _ONE_OF_MANY),
    b"BACKUP": "its answer is a stream; use cluster_manager.py --action backup",
}


class Address(NamedTuple):
    """Where a node answers clients."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """``HOST:PORT`` or ``[IPv6]:PORT``; ValueError for anything else."""
        return cls(*parse_address(text))


class Versioned(NamedTuple):
    """A value and the version under which ``cas`` will replace it."""

    value: JSONValue
    version: int


# ---- One request ---------------------------------------------------------------------------------


class _Session:
    """A client session, in which many calls of many threads may be under way at once."""

    def __init__(self, session_id: int) -> None:
        self.id = session_id
        # Guards what follows.
        self._lock = threading.Lock()
        self._next_serial = 1
        self._unanswered: OrderedDict[int, None] = OrderedDict()  # serials, ascending

    def begin(self) -> int:
        """A serial for a write."""
        with self._lock:
            serial = self._next_serial
            self._next_serial += 1
            self._unanswered[serial] = None
            return serial

    def end(self, serial: int) -> None:
        """Nobody will ask for this serial again."""
        with self._lock:
            del self._unanswered[serial]

    @property
    def first_unanswered(self) -> int:
        """The cluster may forget the answers before this serial."""
        with self._lock:
            return next(iter(self._unanswered), self._next_serial)


class _Call:
    """One request from its first attempt to its last; decides when another attempt is safe.

    Invariant: once ``open`` is false, ``reply`` is what the caller is told.
    """

    __slots__ = (
        *("_argv", "_maybe_done", "_reads", "_serial", "_session"),
        *("data", "in_session", "open", "repeatable", "reply"),
    )

    def __init__(self, argv: list[bytes]) -> None:
        self._argv = argv
        self._reads, self.in_session, self.repeatable = _nature(argv)
        self._session: _Session | None = None
        self._serial = 0
        self._maybe_done = False
        self.open = True
        self.reply: Reply = None
        self.data = b"" if self.in_session else encode_request(argv)

    def prepare(self, session: _Session | None) -> None:
        """Make ``data``, for the attempt that comes now."""
        if not self.in_session:
            return
        if self._session is None:
            assert session is not None
            self._session = session
            self._serial = session.begin()
        numbers = b"%d %d %d" % (self._session.id, self._serial, self._session.first_unanswered)
        self.data = encode_request([b"SESSION", b"DO", *numbers.split(), *self._argv])

    def answer(self, reply: Reply) -> None:
        """Take a node's answer; the call stays open where another attempt is safe and may help."""
        self.reply = reply
        match reply:
            case AnswerForgottenError():
                self.open = False
            case OutcomeUnknownError():
                self._maybe_done = not self._reads
                self.open = self.repeatable
            case NoSessionError() if self._session is not None and not self._maybe_done:
                self.leave_session()  # to be done in another one
            case KVError():
                self.open = reply.retryable
            case _:
                self.open = False
        if not self.open:
            self._close()

    def leave_session(self) -> None:
        """Its serial will not be asked for again."""
        if self._session is not None:
            self._session.end(self._serial)
            self._session = None

    def lose(self, why: str) -> None:
        """The request was sent, and no answer will come."""
        self.answer(OutcomeUnknownError(f"The answer was lost: {why}"))

    def refuse(self, error: KVError) -> None:
        """There is no session for it."""
        if self.in_session:
            self.reply, self.open = error, False
            self._close()

    def give_up(self, why: str) -> None:
        """The deadline has passed."""
        if not isinstance(self.reply, BusyError):
            self.reply = NoPrimaryError(why)
        self.open = False
        self._close()

    def _close(self) -> None:
        self.leave_session()
        reply = self.reply
        if not self._maybe_done or not isinstance(reply, KVError) or not reply.definite:
            return
        # Rule 3: a refusal is true of the last attempt only.
        if not (self.in_session and isinstance(reply, MismatchError | BadRequestError)):
            self.reply = OutcomeUnknownError(f"It may have been done, but then: {reply}")


def _nature(argv: list[bytes]) -> tuple[bool, bool, bool]:
    """Whether the request changes nothing, stands in a session, and may be sent again regardless."""
    try:
        command = lookup(argv)
    except BadRequestError:
        # Wrong, or a command of a newer server: the server will tell, nothing is assumed.
        return False, False, False
    # A session that is opened twice is one that nobody uses, and ends by itself.
    reads = not command.flags & {"write", "admin"} or argv == _OPEN_SESSION
    in_session = "write" in command.flags and command.name != "SESSION"
    return reads, in_session, reads or in_session


def _to_bytes(argument: Argument) -> bytes:
    # Keys that another client stored as bytes that are no UTF-8 come and go unharmed.
    if isinstance(argument, bytes):
        return argument
    return str(argument).encode("utf-8", "surrogateescape")


# ---- One connection ------------------------------------------------------------------------------


class _Connection:
    """A connection to one node, used by one thread at a time. OSError: it is of no more use."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        self.address = address
        self._socket = socket.create_connection(address, timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = ReplyParser()

    def is_usable(self) -> bool:
        """False if something came while it was idle: a node that stepped down has closed it.

        Without this look, the first ``incr`` after a failover would have an unknown outcome.
        """
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def send(self, data: bytes, deadline: float) -> None:
        self._socket.settimeout(_seconds_until(deadline))
        self._socket.sendall(data)

    def replies(self, count: int, silence_s: float, deadline: float) -> Iterator[Reply]:
        """The next ``count`` replies as they come; TimeoutError after ``silence_s`` of nothing."""
        while count:
            try:
                batch = self._parser.take()
            except ProtocolError as error:
                raise ConnectionError(f"its answer is not RESP: {error}") from error
            if len(batch) > count:
                raise ConnectionError("it gave more replies than there were requests")
            count -= len(batch)
            yield from batch
            if not batch:
                self._socket.settimeout(min(silence_s, _seconds_until(deadline)))
                data = self._socket.recv(RECEIVE_BYTES)
                if not data:
                    raise ConnectionError("it closed the connection")
                self._parser.feed(data)

    def last_words(self) -> list[Reply]:
        """What has arrived of a node that has closed the connection."""
        self._socket.settimeout(0)
        with suppress(OSError, ProtocolError):
            while data := self._socket.recv(RECEIVE_BYTES):
                self._parser.feed(data)
        with suppress(ProtocolError):
            return self._parser.take()
        return []

    def close(self) -> None:
        self._socket.close()


def _seconds_until(deadline: float) -> float:
    # Never 0, which would mean "do not wait" to a socket instead of "time is up".
    return max(deadline - time.monotonic(), 0.001)


# ---- All nodes -----------------------------------------------------------------------------------


class _Directory:
    """Which nodes there are, and which one is thought to be the primary. Any thread."""

    def __init__(self, seeds: Sequence[Address]) -> None:
        self._seeds = tuple(seeds)  # never changed: still tried when the news turns out to be bad
        # Guards what follows.
        self._lock = threading.Lock()
        self._members: tuple[Address, ...] = ()  # as the cluster itself told last
        self._primary: Address | None = None  # a guess: only the node's own answer counts
        self._turn = 0

    def nodes(self) -> list[Address]:
        """Every address worth trying, members first."""
        with self._lock:
            return list(dict.fromkeys((*self._members, *self._seeds)))

    def pick(self) -> Address:
        """The primary where one is thought to be, else each node in turn."""
        nodes = self.nodes()
        with self._lock:
            if self._primary is not None:
                return self._primary
            self._turn += 1
            return nodes[self._turn % len(nodes)]

    def learn(self, members: Sequence[Address]) -> None:
        with self._lock:
            self._members = tuple(members)

    def moved(self, primary: Address) -> None:
        with self._lock:
            self._primary = primary

    def failed(self, address: Address) -> None:
        with self._lock:
            if self._primary == address:
                self._primary = None


def _pauses() -> Iterator[float]:
    """Seconds to wait before each next attempt: doubling, and random so that clients spread out."""
    pause_s = PAUSE_S_MIN
    while True:
        yield random.uniform(pause_s / 2, pause_s)
        pause_s = min(pause_s * 2, PAUSE_S_MAX)


# ---- The client ----------------------------------------------------------------------------------


class KVStoreClient:
    """A cluster as one store of JSON values under text keys. See the module for its rules.

    ``nodes`` are some addresses of the cluster (``"host:port"``), at least one of them alive at the
    first call; the others are learned. ``timeout_s`` covers a whole call with all its attempts.
    Every method may raise ``NoPrimaryError`` (not done in time) or another error of ``kv_errors``;
    writes may raise ``OutcomeUnknownError`` where no answer came in time.
    """

    def __init__(self, nodes: Iterable[str] = DEFAULT_NODES, *, timeout_s: float = 10.0) -> None:
        nodes = nodes.split(",") if isinstance(nodes, str) else nodes
        seeds = [Address.parse(node) for node in nodes]
        if not seeds:
            raise ValueError("nodes must name at least one HOST:PORT")
        if not timeout_s > 0:
            raise ValueError("timeout_s must be more than 0")
        self._timeout_s = timeout_s
        # How long a silent node is waited for where asking another is safe: hung nodes and lost
        # routes show as silence. A third leaves time for two more.
        self._silence_s = timeout_s / 3
        self._directory = _Directory(seeds)
        self._answered_by = threading.local()
        # Guards _idle and _closed. Held for memory work only.
        self._lock = threading.Lock()
        self._idle: dict[Address, list[_Connection]] = {}  # last used first; at most one a thread
        self._closed = False
        # Held by who opens a session, while it waits for the cluster.
        self._opening = threading.Lock()
        self._session: _Session | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; a call that runs in another thread still gets the answer it waits for."""
        self._close_session()
        with self._lock:
            self._closed = True
            idle = [connection for stack in self._idle.values() for connection in stack]
            self._idle.clear()
        for connection in idle:
            connection.close()

    @property
    def nodes(self) -> list[str]:
        """All known addresses: those learned from the cluster and those given."""
        return [str(address) for address in self._directory.nodes()]

    @property
    def last_node(self) -> str | None:
        """The node that answered this thread's last call, as ``host:port``; None if none did."""
        return cast("str | None", getattr(self._answered_by, "node", None))

    # ---- Values ----

    def set(
        self,
        key: str,
        value: JSONValue,
        *,
        nx: bool = False,
        xx: bool = False,
        ttl_s: float | None = None,
    ) -> bool:
        """Store ``value``; False if ``nx`` found the key or ``xx`` did not, and nothing was done.

        With ``ttl_s`` the key expires that many seconds after the write; without it, or with
        ``math.inf``, never.
        """
        argv: list[Argument] = ["SET", key, text_or_json_bytes(value)]
        if nx:
            argv.append("NX")
        if xx:
            argv.append("XX")
        if ttl_s is not None and ttl_s != math.inf:
            argv += ["PX", _milliseconds(ttl_s)]
        return self.execute(*argv) is not None

    def get(self, key: str, default: JSONValue = None) -> JSONValue:
        """The value, or ``default`` if there is no such key."""
        return _value(self.execute("GET", key), default)

    def gets(self, key: str) -> Versioned | None:
        """The value with its version for ``cas``, or None if there is no such key."""
        reply = self.execute("GETS", key)
        if reply is None:
            return None
        value, version = _expect(list, reply)
        return Versioned(_value(value, None), _expect(int, version))

    def cas(self, key: str, value: JSONValue, version: int) -> int:
        """Store ``value`` if the key still has ``version`` (0: does not exist); the new version.

        Raises ``MismatchError`` with the present version otherwise.
        """
        return _expect(int, self.execute("CAS", key, version, text_or_json_bytes(value)))

    def delete(self, *keys: str) -> int:
        """How many of the keys there were; now there are none of them."""
        return _expect(int, self.execute("DEL", *keys))

    def exists(self, *keys: str) -> int:
        """How many of the keys there are."""
        return _expect(int, self.execute("EXISTS", *keys))

    def keys(self, pattern: str = "*") -> list[str]:
        """The keys that match a glob pattern (``*``, ``?``, ``[a-c]``), in no order."""
        reply = _expect(list, self.execute("KEYS", pattern))
        return [_expect(bytes, key).decode("utf-8", "surrogateescape") for key in reply]

    def mget(self, keys: Sequence[str]) -> list[JSONValue]:
        """The values in the order of ``keys``, None where there is none; read at one instant."""
        reply = self.execute("MGET", *keys) if keys else []
        return [_value(value, None) for value in _expect(list, reply)]

    def mset(self, values: Mapping[str, JSONValue]) -> None:
        """Store all of them, as one write."""
        argv: list[Argument] = ["MSET"]
        for key, value in values.items():
            argv += [key, text_or_json_bytes(value)]
        if values:
            self.execute(*argv)

    def incr(self, key: str, by: int = 1) -> int:
        """Add to a whole number (0 if there is no such key); the sum."""
        return _expect(int, self.execute("INCRBY", key, by))

    def decr(self, key: str, by: int = 1) -> int:
        return _expect(int, self.execute("DECRBY", key, by))

    def append(self, key: str, text: str) -> int:
        """Add to the end of the stored text; its length in bytes."""
        return _expect(int, self.execute("APPEND", key, text))

    # ---- Expiry ----

    def expire(self, key: str, ttl_s: float) -> bool:
        """Let the key expire in ``ttl_s`` seconds; False if there is no such key."""
        return self.execute("PEXPIRE", key, _milliseconds(ttl_s)) == 1

    def ttl(self, key: str) -> float | None:
        """Seconds until the key expires, ``math.inf`` if never, None if there is no such key."""
        left_ms = _expect(int, self.execute("PTTL", key))
        # -1 and -2 are Redis' words for "no deadline" and "no key".
        return {-1: math.inf, -2: None}.get(left_ms, left_ms / 1000)

    def persist(self, key: str) -> bool:
        """Take the deadline away; False if there was none."""
        return self.execute("PERSIST", key) == 1

    # ---- The whole store and its nodes ----

    def dbsize(self) -> int:
        return _expect(int, self.execute("DBSIZE"))

    def flushall(self) -> None:
        """Delete every key."""
        self.execute("FLUSHALL")

    def ping(self) -> bool:
        """True if any node answers, primary or not."""
        return self.execute("PING") == "PONG"

    def status(self, node: str | None = None) -> dict[str, JSONValue]:
        """STATUS of the node this client talks to, or of ``node`` (OSError: it does not answer)."""
        if node is None:
            return _json_object(self.execute("STATUS"))
        return _json_object(self._ask(Address.parse(node), b"STATUS"))

    def statuses(self) -> dict[str, dict[str, JSONValue] | None]:
        """STATUS of every known node by address, None where it does not answer."""
        self._learn(self.execute("CLUSTER"))
        found: dict[str, dict[str, JSONValue] | None] = {}
        for address in self._directory.nodes():
            try:
                found[str(address)] = _json_object(self._ask(address, b"STATUS"))
            except OSError:
                found[str(address)] = None
        return found

    # ---- Any request ----

    def execute(self, *argv: Argument) -> Reply:
        """The reply to one request in Redis' words, as ``execute("SET", "k", "v")``."""
        reply = self.execute_many([argv])[0]
        if isinstance(reply, KVError):
            raise reply
        return reply

    def execute_many(self, requests: Iterable[Sequence[Argument]]) -> list[Reply]:
        """The replies to many requests, sent without waiting for each; errors stand in their place.

        Around a failover some may be sent again after later ones were done: requests whose order
        matters belong in separate calls.
        """
        self._answered_by.node = None
        calls = [self._call(argv) for argv in requests]
        try:
            self._run(calls, time.monotonic() + self._timeout_s)
        finally:
            for call in calls:  # some may have been interrupted
                call.leave_session()
        return [call.reply for call in calls]

    def _call(self, argv: Sequence[Argument]) -> _Call:
        if not argv:
            raise BadRequestError("A request needs at least a command.")
        words = [_to_bytes(argument) for argument in argv]
        if why := UNSUITABLE_COMMANDS.get(words[0].upper()):
            raise BadRequestError(f"{words[0].decode()} is not for this client: {why}.")
        return _Call(words)

    def _run(self, calls: Sequence[_Call], deadline: float) -> None:
        """Attempt after attempt, until every call is answered or the deadline has passed."""
        pauses = _pauses()
        excuses: dict[Address, str] = {}  # what each node said that did not help
        waiting = deque(calls)
        while waiting:
            session = None
            if any(call.in_session for call in waiting):
                try:
                    session = self._open_session(deadline)
                except KVError as error:
                    for call in waiting:
                        call.refuse(error)
                    waiting = deque(call for call in waiting if call.open)
                    continue
            address = self._directory.pick()
            chunk = _take_chunk(waiting, session)
            failure = self._attempt(address, chunk, deadline)
            waiting.extendleft(call for call in reversed(chunk) if call.open)
            if failure is None:
                pauses = _pauses()
                continue
            excuses[address] = _excuse(failure)
            if isinstance(failure, NoSessionError):
                self._forget_session(session)
            # A redirect is followed at once, unless it leads back to where this call has been:
            # nodes may point at each other, or at the dead.
            follows = isinstance(failure, NotPrimaryError) and _primary_of(failure) not in excuses
            if waiting and not follows:
                time.sleep(min(next(pauses), max(0.0, deadline - time.monotonic())))
            # Of an attempt that has no time left one would learn only that it may have been done.
            if time.monotonic() >= deadline:
                told = "; ".join(f"{node}: {excuse}" for node, excuse in excuses.items())
                for call in waiting:
                    call.give_up(f"No primary answered within {self._timeout_s:g} s ({told}).")
                return

    def _attempt(self, address: Address, calls: Sequence[_Call], deadline: float) -> KVError | None:
        """Send the calls to one node and hand them its answers; what went wrong, if anything."""
        answered = 0
        maybe_sent = False
        patient = not all(call.repeatable for call in calls)
        try:
            with self._connection(address, deadline) as connection:
                # If the last byte does not leave, only the requests before the last may be done.
                maybe_sent = len(calls) > 1
                try:
                    connection.send(b"".join(call.data for call in calls), deadline)
                except ConnectionError:
                    # Who closes on a request that is too large says so first.
                    for call, reply in zip(calls, connection.last_words(), strict=False):
                        call.answer(reply)
                        answered += 1
                    raise
                maybe_sent = True
                silence_s = math.inf if patient else self._silence_s
                for reply in connection.replies(len(calls), silence_s, deadline):
                    calls[answered].answer(reply)
                    answered += 1
        except OSError as error:
            self._directory.failed(address)
            for call in calls[answered:]:
                if maybe_sent:
                    call.lose(f"{address}: {_reason(error)}")
            return NoPrimaryError(_reason(error))
        self._answered_by.node = str(address)
        refusal = next((call.reply for call in calls if call.open), None)
        match refusal:
            case NotPrimaryError():
                self._directory.moved(_primary_of(refusal))
            case BusyError() | NoSessionError() | None:
                pass
            case _:
                self._directory.failed(address)
        return refusal if isinstance(refusal, KVError) else None

    # ---- The session ----

    def _open_session(self, deadline: float) -> _Session:
        """The session that writes stand in now. Raises what a request may raise."""
        session = self._session
        if session is not None:
            return session
        if not self._opening.acquire(timeout=_seconds_until(deadline)):
            raise NoPrimaryError("no session could be opened in time")
        try:
            if self._session is None:
                call = _Call(_OPEN_SESSION)
                self._run([call], deadline)
                if isinstance(call.reply, KVError):
                    # Whatever became of that, the write that was to stand in it was not sent.
                    raise call.reply if call.reply.definite else NoPrimaryError(str(call.reply))
                self._session = _Session(_expect(int, call.reply))
            return self._session
        finally:
            self._opening.release()

    def _forget_session(self, session: _Session | None) -> None:
        with self._opening:
            if self._session is session:
                self._session = None

    def _close_session(self) -> None:
        """Give the cluster its memory back, if that is quickly done; the session ends by itself."""
        session, self._session = self._session, None
        address = self._directory.pick()
        if session is None or self._closed or (connection := self._take_idle(address)) is None:
            return
        with suppress(OSError):
            argv = [b"SESSION", b"CLOSE", b"%d" % session.id]
            _exchange(connection, argv, time.monotonic() + CLOSE_S_MAX)
        connection.close()

    # ---- Connections ----

    def _ask(self, address: Address, *argv: bytes) -> Reply:
        """One node's own answer, whatever its role; OSError if there is none."""
        deadline = time.monotonic() + self._silence_s
        with self._connection(address, deadline) as connection:
            return _exchange(connection, argv, deadline)

    @contextmanager
    def _connection(self, address: Address, deadline: float) -> Iterator[_Connection]:
        """A connection for the caller alone, kept for the next one unless an error comes out."""
        connection = self._take_idle(address) or self._open(address, deadline)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if not self._closed:
                self._idle.setdefault(address, []).append(connection)
                return
        connection.close()

    def _take_idle(self, address: Address) -> _Connection | None:
        while True:
            with self._lock:
                if self._closed:
                    raise RuntimeError("the client is closed")
                stack = self._idle.get(address)
                if not stack:
                    return None
                connection = stack.pop()
            if connection.is_usable():
                return connection
            connection.close()

    def _open(self, address: Address, deadline: float) -> _Connection:
        """A new connection to a node that has proved to be alive by telling the members.

        The kernel accepts connections for a process that hangs: a request that is not repeatable
        must not be the first thing such a node is sent.
        """
        connection = _Connection(address, min(CONNECT_S_MAX, _seconds_until(deadline)))
        try:
            hung_at = time.monotonic() + min(self._silence_s, PROBE_S_MAX)
            self._learn(_exchange(connection, [b"CLUSTER"], min(deadline, hung_at)))
        except BaseException:
            connection.close()
            raise
        return connection

    def _learn(self, reply: Reply) -> None:
        """Take the addresses of all members from a CLUSTER reply (raft-traps T56)."""
        if isinstance(reply, KVError):
            raise ConnectionError(f"the node refuses to serve: {reply}")
        try:
            members = json.loads(_expect(bytes, reply))["members"]
            addresses = [Address(str(member["host"]), int(member["port"])) for member in members]
        except (ProtocolError, ValueError, LookupError, TypeError) as error:
            raise ConnectionError(f"no node of a KV store: it answers {reply!r:.80}") from error
        # A node that has yet to join knows of none, which is no news.
        if addresses:
            self._directory.learn(addresses)


# ---- Requests and replies ------------------------------------------------------------------------


def _take_chunk(waiting: deque[_Call], session: _Session | None) -> list[_Call]:
    """As many calls as may be sent before replies are read; at least one."""
    chunk: list[_Call] = []
    size = 0
    while waiting and len(chunk) < CHUNK_REQUESTS_MAX:
        waiting[0].prepare(session)
        size += len(waiting[0].data)
        if chunk and size > CHUNK_BYTES_MAX:
            break
        chunk.append(waiting.popleft())
    return chunk


def _primary_of(redirect: NotPrimaryError) -> Address:
    return Address(redirect.host, redirect.port)


def _excuse(failure: KVError) -> str:
    if isinstance(failure, NotPrimaryError):
        return f"says that {_primary_of(failure)} is the primary"
    return str(failure)


def _exchange(connection: _Connection, argv: Sequence[bytes], deadline: float) -> Reply:
    connection.send(encode_request(argv), deadline)
    (reply,) = connection.replies(1, math.inf, deadline)
    return reply


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return error.strerror or str(error)


def _milliseconds(ttl_s: float) -> int:
    """Whole milliseconds, at least one for any time above 0: a TTL never rounds down to "gone"."""
    if not math.isfinite(ttl_s):
        raise BadRequestError("A time to live is a number of seconds; persist() takes it away.")
    return math.ceil(ttl_s * 1000)


def _expect(kind: type[T], reply: Reply) -> T:
    if not isinstance(reply, kind):
        raise ProtocolError(f"expected {kind.__name__} in the reply, got {reply!r:.80}")
    return reply


def _value(reply: Reply, default: JSONValue) -> JSONValue:
    return default if reply is None else cast("JSONValue", json_or_text(_expect(bytes, reply)))


def _json_object(reply: Reply) -> dict[str, JSONValue]:
    found = json.loads(_expect(bytes, reply))
    if not isinstance(found, dict):
        raise ProtocolError(f"expected a JSON object, got {found!r:.80}")
    return found
