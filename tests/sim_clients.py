"""Clients of a simulated cluster: they ask, wait, lose patience, ask again, and tell what they saw.

Rule 1: a client knows what a client can know: what it sent, and the answers that reached it. Only
what it does not know makes it ask elsewhere.
Rule 2: a refusal is definite, so the same request may be sent again; silence is not. After silence
only reads, and writes in a session under the same serial, are sent again.

I10  what was answered OK is in the log, where the answer says
I11  linearizable per key, by what the clients saw (``linearizability.py``)
I12  what was refused was never done; what has a serial was done once at most, once if answered
I15  in the end each client has its answers, whichever server it asks first
G5   a value that was once seen gone never comes back, for the log says so before a reader does;
     and by the log, no key that expires goes before its time, or is read after it

Used by ``sim_cluster.py``; the part of a node that stands between its clients and the core is here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

from kv_commands import decode_payload, encode_payload
from kv_errors import AnswerForgottenError, KVError, MismatchError, NoSessionError
from kv_store import ExpiredKeysError, purge_request
from kv_types import RepeatedReply, Reply
from raft_core import NotLeaderError, TooMuchUncommittedError, TransferUnderWayError
from raft_types import Entry, EntryKind, MemberId, Role, Room
from tests.linearizability import Kind, Operation, Outcome, check_counter, check_register
from tests.raft_servers import describe_command
from tests.sim_invariants import ViolationError

if TYPE_CHECKING:
    from tests.sim_cluster import SimServer, Simulation

Argv = Sequence[bytes]

# Besides registers, which there are always.
WORKLOADS = ("counter", "expiring", "other", "session")
PATIENCE_TICKS = 40  # until an answer is no longer waited for
REFUSALS_MAX = 12  # then a client gives up, but not what may have been done
KEY_OPERATIONS_MAX = 50  # the checker's limit; then another key takes its place
CHECK_STEPS_MAX = 100_000
LAST_ONES = 100  # the number of the first client that wants one thing only


@dataclass(slots=True)
class Wanted:
    """What a client is at."""

    kind: Kind | None  # None: not a matter of the history
    key: str
    argv: list[bytes]
    called_at: float
    argument: str | None = None
    expected_version: int | None = None
    until_answered: bool = False  # done twice is as good as once, so it may be sent again
    may_be_done: bool = False
    serial: int = 0
    refusals: int = 0

    @property
    def is_read(self) -> bool:
        """Whether it changes nothing."""
        return self.argv[0] == b"GETS"

    @property
    def is_once(self) -> bool:
        """Whether it has a serial."""
        return self.argv[:2] == [b"SESSION", b"DO"]

    @property
    def may_be_sent_again(self) -> bool:
        """Whether it does no harm that it may have been done."""
        return self.is_once or self.is_read or self.until_answered


@dataclass(slots=True, eq=False)
class Request:
    """One attempt, as a server knows it."""

    client: Client | None  # None: nobody waits for the answer
    attempt: int
    argv: Argv
    term: int = 0  # of the leadership that took it on


@dataclass(slots=True)
class Desk:
    """What a server owes its clients."""

    writes: dict[int, Request] = field(default_factory=dict)  # by index
    reads: dict[int, Request] = field(default_factory=dict)  # by token, waiting for their round
    reads_at: list[tuple[int, Request]] = field(default_factory=list)  # for the state machine
    # Reads that found keys due, by the index of the PURGE.
    purges: dict[int, Request] = field(default_factory=dict)

    def take_all(self) -> list[Request]:
        """Everything, which is owed no more."""
        reads = [*self.reads.values(), *(request for _, request in self.reads_at)]
        all_of_them = [*self.writes.values(), *reads, *self.purges.values()]
        for owed in (self.writes, self.reads, self.reads_at, self.purges):
            owed.clear()
        return all_of_them


@dataclass(slots=True)
class Lifetime:
    """A value that expires, or that there is none, from an entry of the log on."""

    index: int
    value: bytes | None = None
    deadline_ms: int = 0


class Lifetimes:
    """What the log says of the keys that expire, worked out beside the store (promise G5)."""

    def __init__(self) -> None:
        self._lifetimes: dict[bytes, list[Lifetime]] = {}  # of each key, in the log's order
        self._log_ms = 0  # the latest stamp

    def on_entry(self, index: int, stamp_ms: int, argv: Argv) -> None:
        """The next command of the log: its stamp, and what it did."""
        self._log_ms = max(self._log_ms, stamp_ms)
        match argv:
            case [b"SET", key, value, b"PX", ttl_ms] if key.startswith(b"t"):
                lifetime = Lifetime(index, value, self._log_ms + int(ttl_ms))
                self._lifetimes.setdefault(key, []).append(lifetime)
            case [b"PURGE", *pairs]:
                for key, deadline in zip(pairs[::2], pairs[1::2], strict=True):
                    now = self.at(key, index)
                    if now.value and now.deadline_ms == int(deadline) <= self._log_ms:
                        self._lifetimes[key].append(Lifetime(index))

    def at(self, key: bytes, index: int) -> Lifetime:
        """What there is after this entry."""
        lifetimes = self._lifetimes.get(key, ())
        return next((one for one in reversed(lifetimes) if one.index <= index), Lifetime(0))


class Session:
    """One session, in which several clients may be at something: a client that does not wait."""

    def __init__(self, session_id: int) -> None:
        self.id = session_id
        self._last_serial = 0
        self._unanswered: set[int] = set()

    def begin(self, wanted: Wanted) -> None:
        """Give it the next serial."""
        self._last_serial = wanted.serial = self._last_serial + 1
        self._unanswered.add(wanted.serial)
        once = b"SESSION DO %d %d %d" % (self.id, wanted.serial, min(self._unanswered))
        wanted.argv[:0] = once.split()

    def end(self, wanted: Wanted) -> None:
        """It is not asked for again."""
        self._unanswered.discard(wanted.serial)


class Client:
    """One that does one thing at a time."""

    def __init__(self, clients: Clients, number: int, *, in_session: bool = False) -> None:
        self._clients = clients
        self._cluster = clients.cluster
        self.number = number
        self.in_session = in_session
        self.session: Session | None = None
        self.home: MemberId | None = None  # who is believed to lead
        self.wanted: Wanted | None = None
        self._attempt = 0
        self.versions: dict[str, int] = {}  # as last seen

    def think(self) -> None:
        """The next thing comes after a while, unless the storm is over."""
        cluster = self._cluster
        if self.session is not None and self.wanted is not None:
            self.session.end(self.wanted)
        self.wanted = None
        if not self._is_done:
            cluster.at(cluster.pause(cluster.weather.client_ticks), self._begin)

    def _begin(self) -> None:
        if self.wanted is None and not self._is_done:
            self.want(self._clients.choose(self))

    @property
    def _is_done(self) -> bool:
        return self._cluster.is_over or self.number >= LAST_ONES

    def want(self, wanted: Wanted) -> None:
        """Begin with this."""
        if self.session and wanted.argv[0] != b"SESSION" and not wanted.is_read:
            self.session.begin(wanted)
        self.wanted = wanted
        self._send()

    def _send(self) -> None:
        cluster, wanted = self._cluster, self.wanted
        if wanted is None:
            return
        self._attempt += 1
        if self.home is None:
            self.home = cluster.rng.choice(sorted(cluster.servers.keys() or cluster.disks.keys()))
        request = Request(self, self._attempt, tuple(wanted.argv))
        if cluster.tracing:
            words = "_".join(word.decode() for word in wanted.argv)
            cluster.say(f"client {self.number} asks {self.home} for {words}")
        if not cluster.chance(cluster.weather.drop):
            cluster.at(cluster.delay(), self._clients.serve, self.home, request)
        cluster.at(PATIENCE_TICKS, self.on_silence, self._attempt)

    # ---- What it hears ----

    def on_refusal(self, attempt: int, leader: MemberId | None) -> None:
        """It was certainly not done; perhaps there is a hint who leads."""
        wanted, cluster = self.wanted, self._cluster
        if attempt != self._attempt or wanted is None:
            return
        self._attempt += 1  # whatever comes of the last one has come
        self.home = leader
        wanted.refusals += 1
        is_patient = cluster.is_over or wanted.may_be_sent_again
        if wanted.refusals < REFUSALS_MAX or is_patient:
            cluster.at(cluster.rng.uniform(0.1, 3), self._send)
        else:
            self._clients.refused(wanted)
            self.think()

    def on_silence(self, attempt: int) -> None:
        """Nobody knows whether it was done."""
        wanted = self.wanted
        if attempt != self._attempt or wanted is None:
            return
        self._clients.counts["outcomes unknown"] += 1
        self.home = None
        if wanted.may_be_sent_again:
            wanted.may_be_done = True
            self._clients.counts["asked again"] += 1
            self._send()
        else:
            self._attempt += 1
            self._clients.unknown(self, wanted)
            self.think()

    def on_answer(self, attempt: int, reply: Reply, index: int) -> None:
        """It was done, at this index of the log if it is a write."""
        wanted = self.wanted
        if attempt != self._attempt or wanted is None:
            return
        self._attempt += 1
        if isinstance(reply, RepeatedReply):
            self._clients.counts["answered as the first time"] += 1
            index = reply.index
            reply = reply.reply
        if isinstance(reply, NoSessionError):
            self._clients.session_ended(self)
            if wanted.may_be_done:
                self._clients.unknown(self, wanted)
            else:
                self._clients.refused(wanted)
        else:
            is_known = not isinstance(reply, AnswerForgottenError)
            self._cluster.invariants.require(
                is_known, f"I12: client {self.number} waits for an answer that is forgotten"
            )
            self._clients.answered(self, wanted, reply, index)
        self.think()


class Clients:
    """All of them, what they saw, and the servers' side of it."""

    def __init__(self, cluster: Simulation, without: Collection[str]) -> None:
        self.cluster = cluster
        self.counts = cluster.counts
        self._habits = cluster.habits
        rng = cluster.rng
        sessions = rng.choice((0, 0.5, 1))
        self._clients = [
            Client(self, number, in_session=cluster.chance(sessions))
            for number in range(rng.choice((3, 6, 12)))
        ]
        self._probes: list[Client] = []
        self._shares_session = cluster.chance(0.5)
        self._shared: Session | None = None  # what whoever needs one takes part in
        drawn = [kind for kind in WORKLOADS for _ in range(rng.choice((0, 1, 10)))]
        self._kinds = ["register", *(kind for kind in drawn if kind not in without)]
        self._key_count = rng.choice((1, 3, 6))
        self._reads = rng.choice((0.3, 0.6, 0.95))  # among what is done to keys that expire
        self._operations_of: Counter[str] = Counter()
        self._numbers = count(1)
        self.history: list[Operation] = []
        self._refused: set[str] = set()  # arguments of what was never done, by the answer
        self._done: dict[str, int] = {}  # and of what was, at this index
        self._applied_index = 0  # by whichever server is furthest
        self._expiring: dict[str, list[Operation]] = {}
        self._lifetimes = Lifetimes()

    def start(self) -> None:
        """All begin, each in its own time."""
        for client in self._clients:
            client.think()

    @property
    def are_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return all(client.wanted is None for client in self._clients) and self.have_answers

    # ---- What clients want ----

    def choose(self, client: Client) -> Wanted:
        """The next thing that it wants."""
        kind = self.cluster.rng.choice(self._kinds)
        if client.in_session and client.session is None:
            client.session = self._shared
            self.counts["sessions shared"] += client.session is not None
        if client.in_session and client.session is None:
            return self._wanted(None, "", b"SESSION OPEN")
        match kind:
            case "counter" if client.session:
                return self._count(self._key("n"))
            case "expiring":
                return self._expire(self._key("t"))
            case "other":
                return self._do_other()
            case "session" if client.session and self.cluster.chance(self._habits.closes):
                return self._wanted(None, "", b"SESSION CLOSE %d" % client.session.id)
            case _:
                return self._use_register(client, self._key("r"))

    def _key(self, letter: str) -> str:
        """One of a few keys, none of which is used too often to be checked."""
        name = f"{letter}{self.cluster.rng.randrange(self._key_count)}"
        self._operations_of[name] += 1
        return f"{name}.{self._operations_of[name] // KEY_OPERATIONS_MAX}"

    def _wanted(
        self,
        kind: Kind | None,
        key: str,
        words: bytes,
        argument: str | None = None,
        expected_version: int | None = None,
    ) -> Wanted:
        now = self.cluster.now
        return Wanted(kind, key, words.split(), now, argument, expected_version)

    def _use_register(self, client: Client, key: str) -> Wanted:
        name, value, rng = key.encode(), f"v{next(self._numbers)}", self.cluster.rng
        match rng.choice(("read", "read", "set", "cas", "cas", "delete")):
            case "read":
                return self._wanted(Kind.READ, key, b"GETS %b" % name)
            case "set":
                return self._wanted(Kind.WRITE, key, b"SET %b %b" % (name, value.encode()), value)
            case "cas":
                version = client.versions.get(key, 0)
                words = b"CAS %b %d %b" % (name, version, value.encode())
                return self._wanted(Kind.CAS, key, words, value, version)
            case _:
                return self._wanted(Kind.DELETE, key, b"DEL %b" % name)

    def _count(self, key: str) -> Wanted:
        if self.cluster.chance(self._habits.counts_by_reading):
            return self._wanted(Kind.READ, key, b"GETS " + key.encode())
        return self._wanted(Kind.INCREMENT, key, b"INCR " + key.encode())

    def _expire(self, key: str) -> Wanted:
        if self.cluster.chance(self._reads):
            return self._wanted(Kind.READ, key, b"GETS " + key.encode())
        value, ttl_ms = f"v{next(self._numbers)}", self.cluster.rng.choice((300, 3000, 20_000))
        words = b"SET %b %b PX %d" % (key.encode(), value.encode(), ttl_ms)
        return self._wanted(Kind.WRITE, key, words, value)

    def _do_other(self) -> Wanted:
        """What moves the state about, and the history does not tell."""
        rng = self.cluster.rng
        one, other = rng.choices((b"x0", b"x1", b"x2", b"x3", b"x4", b"x5"), k=2)
        number = next(self._numbers)
        commands = (
            *(b"MSET %b %d %b %d" % (one, number, other, number), b"APPEND %b %d" % (one, number)),
            *(b"EXPIRE %b 3" % one, b"PERSIST %b" % one, b"GETDEL %b" % one),
            *(b"SET %b %b" % (one, b"%d" % number * 20), b"SETNX %b %d" % (one, number)),
            *(b"PEXPIRE %b 0" % one, b"GETSET %b %d" % (one, number), b"INCR %b" % one),
        )
        return self._wanted(None, "", rng.choice(commands))

    # ---- What came of it ----

    def _record(
        self, client: Client, wanted: Wanted, ended_at: float | None, reply: Reply, index: int
    ) -> None:
        if wanted.kind is None:
            return
        result: str | int | None = None
        version: int | None = None
        if wanted.kind is Kind.READ and isinstance(reply, list):
            value, version = reply
            result = int(value) if wanted.key.startswith("n") else value.decode()
        elif isinstance(reply, MismatchError):
            result, version = 0, reply.version
        elif isinstance(reply, int):
            result = 1 if wanted.kind is Kind.CAS else reply
        if (wanted.kind is Kind.CAS and result) or (
            wanted.kind is Kind.WRITE and ended_at is not None
        ):
            version = index
        client.versions[wanted.key] = version or 0
        operation = Operation(
            client=client.number,
            kind=wanted.kind,
            key=wanted.key,
            called_at=wanted.called_at,
            ended_at=ended_at,
            argument=wanted.argument,
            result=result,
            expected_version=wanted.expected_version,
            version=version,
        )
        if wanted.key.startswith("t"):
            self._expiring.setdefault(wanted.key, []).append(operation)
        else:
            self.history.append(operation)

    def answered(self, client: Client, wanted: Wanted, reply: Reply, index: int) -> None:
        """A client has its answer."""
        cluster = self.cluster
        self.counts["answers"] += 1
        if cluster.tracing:
            at_index = "" if wanted.is_read else f" at {index}"
            cluster.say(f"client {client.number} hears {reply!r}{at_index}")
        if not wanted.is_read:
            entry = cluster.invariants.committed[index - 1]
            argv = wanted.argv[5:] if wanted.is_once else wanted.argv
            if decode_payload(entry.data)[1] != argv:
                done = describe_command(entry.data)
                text = f"I10: client {client.number} was answered for {index}, which is {done}"
                raise ViolationError(text)
        if wanted.argv[:2] == [b"SESSION", b"OPEN"]:
            assert isinstance(reply, int)
            client.session = Session(reply)
            if self._shares_session:
                self._shared = client.session
            self.counts["sessions opened"] += 1
        elif wanted.argv[:2] == [b"SESSION", b"CLOSE"]:
            self.session_ended(client)
            self.counts["sessions closed"] += 1
        self._record(client, wanted, cluster.now, reply, index)

    def session_ended(self, client: Client) -> None:
        """It is closed, by this client or another one that shared it."""
        if self._shared is client.session:
            self._shared = None
        client.session = None

    def unknown(self, client: Client, wanted: Wanted) -> None:
        """A client will never know."""
        if not wanted.is_read:
            self._record(client, wanted, None, None, 0)

    def refused(self, wanted: Wanted) -> None:
        """A client knows that it was not done."""
        self.counts["refused for good"] += 1
        if wanted.argument is not None:
            self._refused.add(wanted.argument)

    # ---- A server's side ----

    def serve(self, name: MemberId, request: Request) -> None:
        """A request reaches a server."""
        cluster, server = self.cluster, self.cluster.servers.get(name)
        if server is None:
            self._refuse(request, None)  # nobody listens there
        elif not cluster.sleeps(server, self.serve, name, request):
            if server.audit.trouble:
                self._refuse(request, None)
                return
            if server.core.role is Role.LEADER and server.lease.must_wait():
                self.counts["old leases waited for"] += 1
                self._refuse(request, name)
                return
            try:
                self._take_on(server, request)
            except (NotLeaderError, TransferUnderWayError, TooMuchUncommittedError) as error:
                self.counts[type(error).__name__] += 1
                hint = server.core.leader_id if isinstance(error, NotLeaderError) else name
                self._refuse(request, hint)
            cluster.after(server)

    def _take_on(self, server: SimServer, request: Request) -> None:
        request.term = server.core.term
        if request.argv[0] == b"GETS":
            if server.lease.is_valid() and server.core.committed_in_own_term:
                self.cluster.invariants.on_lease_read(server)
                self._read_at(server, request, server.core.commit_index)
                return
            token = next(self._numbers)
            server.core.read_index(token)
            self.cluster.invariants.on_read_asked(token)
            server.desk.reads[token] = request
        else:
            payload = encode_payload(server.clock.now_ms(self.cluster.now), request.argv)
            server.desk.writes[server.core.propose([payload])] = request
            self.counts["writes"] += 1

    def ask_at_once(self, name: MemberId, delay: float) -> None:
        """A write and a read that are waiting when a server wakes up; nobody hears the answers."""
        number = next(self._numbers)
        for words in (b"SET awake %d" % number, b"GETS awake"):
            self.cluster.at(delay, self.serve, name, Request(None, 0, words.split()))

    def do_upkeep(self, server: SimServer) -> None:
        """As the primary does from time to time: delete what is due."""
        core, now_ms = server.core, server.clock.now_ms(self.cluster.now)
        most = (len(core.membership.voters) - 1) // 2
        self.cluster.invariants.require(
            0 <= core.failures_tolerated <= max(0, most)
            and (core.role is not Role.LEADER or core.cluster_room is Room.PLENTY),
            f"{server.name} tolerates {core.failures_tolerated} of {most}, or says a disk is full",
        )
        if core.role is Role.LEADER and (pairs := server.store.due(now_ms, 100)):
            try:
                core.propose([encode_payload(now_ms, purge_request(pairs))])
                self.counts["purges"] += 1
            except (TransferUnderWayError, TooMuchUncommittedError):
                self.counts["purges put off"] += 1

    def on_applied(self, server: SimServer, entry: Entry, reply: Reply) -> None:
        """The server has applied an entry; somebody may wait for it."""
        if entry.index > self._applied_index:
            self._applied_index = entry.index
            if entry.kind is EntryKind.COMMAND:
                stamp_ms, words, _ = decode_payload(entry.data)
                if isinstance(reply, KVError | RepeatedReply):
                    words = []  # it did nothing, but it has a stamp
                written = [word.decode() for word in words if word.startswith(b"v")]
                self._done |= dict.fromkeys(written, entry.index)
                self._lifetimes.on_entry(entry.index, stamp_ms, words)
        desk = server.desk
        request = desk.writes.pop(entry.index, None)
        if request is not None:
            assert request.term == entry.term, "T33: another's entry"
            self.cluster.invariants.on_served(entry.index)
            self._answer(request, reply, entry.index)
        purge = desk.purges.pop(entry.index, None)
        if purge is not None:
            self._read(server, purge)
        while desk.reads_at and desk.reads_at[0][0] <= entry.index:
            self._read(server, desk.reads_at.pop(0)[1])

    def on_read_given(self, server: SimServer, token: int, index: int) -> None:
        """The core allows this read once the state machine has come so far."""
        self.cluster.invariants.on_read_given(token, index)
        request = server.desk.reads.pop(token, None)
        assert request is not None, "T48: its client was told that it was not done"
        assert request.term == server.core.term and server.core.role is Role.LEADER, "T48"
        self._read_at(server, request, index)

    def _read_at(self, server: SimServer, request: Request, index: int) -> None:
        if index > server.applied_index:
            server.desk.reads_at.append((index, request))
        else:
            self._read(server, request)

    def _read(self, server: SimServer, request: Request) -> None:
        now_ms = server.clock.now_ms(self.cluster.now)
        try:
            reply = server.store.read(request.argv, now_ms)
            # Else a slower clock could bring back, on another primary, what was said to be gone.
            is_there = request.argv[1] in server.store._values
            self.cluster.invariants.require(
                is_there == (reply is not None),
                f"G5: {server.name} tells another story of {request.argv[1]!r} than the log",
            )
            self.cluster.invariants.on_served(server.applied_index)
            if request.argv[1].startswith(b"t"):
                self._check_lifetime(server, request.argv[1], reply, now_ms)
            self._answer(request, reply, 0)
        except ExpiredKeysError as expired:
            try:
                payload = encode_payload(now_ms, purge_request(expired.pairs))
                server.desk.purges[server.core.propose([payload])] = request
                self.counts["reads that purge"] += 1
            except (TransferUnderWayError, TooMuchUncommittedError):
                self._refuse(request, server.name)

    def _check_lifetime(self, server: SimServer, key: bytes, reply: Reply, now_ms: int) -> None:
        lifetime = self._lifetimes.at(key, server.applied_index)
        expected = None if lifetime.value is None else [lifetime.value, lifetime.index]
        is_over = reply is not None and now_ms >= lifetime.deadline_ms
        self.cluster.invariants.require(
            reply == expected and not is_over,
            f"G5: {server.name} answers {reply!r} for {key!r} at {now_ms} ms; the log: {lifetime}",
        )

    def leadership_lost(self, server: SimServer) -> None:
        """Who waits is told: a write is unknown, a read was not done (raft-traps T25)."""
        for request in server.desk.take_all():
            if request.client is None:
                continue
            if request.argv[0] == b"GETS":
                self._refuse(request, None)
            else:
                self._tell(request.client.on_silence, request.attempt)

    def _answer(self, request: Request, reply: Reply, index: int) -> None:
        if request.client is not None:
            self._tell(request.client.on_answer, request.attempt, reply, index)

    def _refuse(self, request: Request, leader: MemberId | None) -> None:
        if request.client is not None:
            self._tell(request.client.on_refusal, request.attempt, leader)

    def _tell(self, hears: object, *args: object) -> None:
        cluster = self.cluster
        if not cluster.chance(cluster.weather.drop):
            cluster.at(cluster.delay(), hears, *args)  # type: ignore[arg-type]

    # ---- In the calm ----

    def ask_each(self, names: Sequence[MemberId]) -> None:
        """Each of these servers is asked first by somebody who wants something done."""
        self._probes = [Client(self, LAST_ONES + i) for i in range(len(names))]
        for client, name in zip(self._probes, names, strict=True):
            client.home = name
            wanted = self._wanted(None, "", b"SET last %b" % name.encode())
            wanted.until_answered = True
            client.want(wanted)

    @property
    def have_answers(self) -> bool:
        """Whether all of them have."""
        return all(client.wanted is None for client in self._probes)

    def ask_for_all(self) -> None:
        """After all storms: each server is asked first by somebody, and each key is read once more."""
        self.ask_each(sorted(self.cluster.servers))
        for key in sorted({operation.key for operation in self.history}):
            reader = Client(self, LAST_ONES + len(self._probes))
            self._probes.append(reader)
            reader.want(self._wanted(Kind.READ, key, b"GETS " + key.encode()))

    def check(self) -> None:
        """I11, I12 and G5, by all that was seen."""
        require = self.cluster.invariants.require
        for key, operations in _by_key(self.history).items():
            if key.startswith("n"):
                problems = check_counter(operations)
                require(not problems, f"I12: counter {key}: {problems}")
                self.counts["counters checked"] += 1
                continue
            known = [o for operation in operations for o in self._as_known(operation)]
            verdict = check_register(known, CHECK_STEPS_MAX)
            # Not even given up: what could not be decided proves nothing.
            is_fine = verdict.outcome is Outcome.LINEARIZABLE
            require(is_fine, f"I11: {key} is {verdict.outcome}: {verdict.reason}")
            self.counts["registers linearizable"] += 1
        done = self._refused & self._done.keys()
        require(not done, f"I12: {sorted(done)} were refused, and are done")
        for operations in self._expiring.values():
            self._check_expiring(operations)

    def _as_known(self, operation: Operation) -> list[Operation]:
        """What never came to its client's knowledge, the log knows; that makes the search short."""
        if operation.is_known or operation.argument is None:
            return [operation]
        index = self._done.get(str(operation.argument))
        if index is None:
            return []
        end = self.cluster.now
        return [replace(operation, ended_at=end, result=1, version=index)]

    def _check_expiring(self, operations: list[Operation]) -> None:
        written = {o.argument: o.ended_at for o in operations if o.kind is Kind.WRITE}
        reads = [o for o in operations if o.kind is Kind.READ and o.ended_at is not None]
        for gone in reads:
            for back in reads:
                if gone.result is None and back.result is not None:
                    assert gone.ended_at is not None
                    ended_at = written.get(back.result)
                    came_back = (
                        ended_at is not None
                        and ended_at < gone.called_at
                        and gone.ended_at < back.called_at
                    )
                    self.cluster.invariants.require(
                        not came_back, f"G5: {back.key} was gone, and came back: {gone}; {back}"
                    )
        self.counts["expiring keys checked"] += 1


def _by_key(operations: Sequence[Operation]) -> dict[str, list[Operation]]:
    keys: dict[str, list[Operation]] = {}
    for operation in operations:
        keys.setdefault(operation.key, []).append(operation)
    return keys
