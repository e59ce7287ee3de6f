"""What clients do while nodes and links fail, and what must be true of what they were told.

Rule 1: each request is noted with its moments and its answer, on one clock; what got no answer, or
``UNKNOWN``, is noted as unknown. What was refused is noted nowhere: if its value is read all the
same, that is a value which nobody wrote.
Rule 2: nobody waits for the faults: clients go on all the time, and a run that did too little
of anything proves nothing (``chaos.py`` calls it invalid).
Rule 3: every value is written once.
Rule 4: a refusal is noted by its code: what the faults can't cause fails the run.

The letters are those of the fault model: W1 registers, W2 lists, W3 counters in sessions, W4 a
bank, W6 expiry, W9 stale reads.
"""

from __future__ import annotations

import itertools
import random
import select
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar, Final

from kv_client import KVStoreClient
from kv_config import Address, format_address
from kv_errors import (
    AnswerForgottenError,
    KVError,
    MismatchError,
    NoPrimaryError,
    NotPrimaryError,
    OutcomeUnknownError,
)
from kv_types import Reply
from tests.cluster import RespConnection
from tests.linearizability import (
    Kind,
    ListRead,
    Operation,
    Outcome,
    Value,
    check_bank,
    check_counter,
    check_registers,
    check_set_full,
)

# Longer than an election with short timers, so that few outcomes are unknown.
ANSWER_S: Final = 3.0
IMPATIENT_S: Final = 0.2
PAUSE_S_MAX: Final = 0.02
# What the checker can do (fault-model.md): clients, operations and unknown outcomes a key.
REGISTERS: Final = 5
OPERATIONS_MAX: Final = 200
UNKNOWN_MAX: Final = 6
ELEMENTS_MAX: Final = 500
ACCOUNTS: Final = 4
BALANCE: Final = 100
# Of each kind of request, on the average of a run: less proves nothing about it.
ANSWERS_PER_S_MIN: Final = 0.5
# One machine, one clock: what a stamp may be late by.
EXPIRY_SLACK_S: Final = 0.25


class Notes:
    """Everything that the clients were told. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.operations: list[Operation] = []
        self.answered: list[float] = []  # moments of success
        self.counts = {"ok": 0, "definite": 0, "unknown": 0}
        self.done: Counter[str] = Counter()  # what was answered, by workload and kind of request
        self.refusals: dict[str, str] = {}  # by code of the error: what was said first
        self.problems: list[str] = []

    def add(self, operation: Operation) -> None:
        with self._lock:
            self.operations.append(operation)
            if operation.ended_at is None:
                self.counts["unknown"] += 1
            else:
                self.counts["ok"] += 1
                self.answered.append(operation.ended_at)

    def did(self, what: str) -> None:
        """One more of these was answered."""
        with self._lock:
            self.done[what] += 1

    def refused(self, error: KVError) -> None:
        """A client was told that its request was certainly not done."""
        with self._lock:
            self.counts["definite"] += 1
            self.refusals.setdefault(error.code, str(error))

    def complain(self, problem: str) -> None:
        with self._lock:
            self.problems.append(problem)

    @contextmanager
    def noting(
        self, kind: Kind, key: str, argument: Value = None, **more: object
    ) -> Iterator[Call]:
        """Note what the block does as one operation; the block says what the answer was."""
        call = Call(threading.get_ident(), kind, key, argument, more)
        try:
            yield call
        except OutcomeUnknownError:
            self.add(call.operation(None))
        except KVError as error:
            self.refused(error)
        else:
            self.add(call.operation(time.monotonic()))

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Note how a request was refused that stands in no history: a read that has its own list."""
        try:
            yield
        except OutcomeUnknownError:
            pass
        except KVError as error:
            self.refused(error)


class Call:
    """A request that is under way."""

    def __init__(
        self, client: int, kind: Kind, key: str, argument: Value, more: dict[str, object]
    ) -> None:
        self._known = (client, kind, key)
        self._argument = argument
        self._more = more
        self.called_at = time.monotonic()
        self.result: Value = None
        self.version: int | None = None

    def operation(self, ended_at: float | None) -> Operation:
        made = Operation(*self._known, self.called_at, ended_at, self._argument, **self._more)  # type: ignore[arg-type]
        if ended_at is None:
            return made
        return replace(made, result=self.result, version=self.version)


# ---- Clients -----------------------------------------------------------------------------------


class RawClient:
    """Redis' protocol by hand: follows redirects, repeats what was certainly not done, no more."""

    def __init__(self, addresses: Sequence[Address], answer_s: float = ANSWER_S) -> None:
        self._answer_s = answer_s
        self._addresses = list(addresses)
        self._turn = itertools.cycle(self._addresses)
        self._at = next(self._turn)
        self._connection: RespConnection | None = None

    def call(self, *argv: str | bytes) -> Reply:
        """The reply. Raises KVError: definite means not done, OutcomeUnknownError what it says."""
        deadline = time.monotonic() + self._answer_s
        while True:
            try:
                connection = self._connected()
            except OSError:
                self._leave()
                self._pause(deadline)
                continue
            try:
                connection.sock.settimeout(max(0.001, deadline - time.monotonic()))
                reply = connection.ask(*argv)
            except OSError as error:
                self._leave()
                raise OutcomeUnknownError(str(error)) from error
            if isinstance(reply, NotPrimaryError):
                self._leave((reply.host, reply.port))
            elif isinstance(reply, KVError) and reply.retryable:
                self._leave()
            elif isinstance(reply, KVError):
                raise reply
            else:
                return reply
            self._pause(deadline)

    def _connected(self) -> RespConnection:
        if self._connection is not None:
            # A node that stepped down has closed it: nothing must be sent into that.
            # Not by select(), which knows no descriptor above 1,023.
            poll = select.poll()
            poll.register(self._connection.sock, select.POLLIN)
            if not poll.poll(0):
                return self._connection
            self._leave()
        self._connection = RespConnection(self._at, timeout_s=1.0)
        return self._connection

    def _leave(self, to: Address | None = None) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._at = to or next(self._turn)

    def _pause(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise NoPrimaryError("nobody answered in time")
        time.sleep(0.01)

    def move_on(self) -> None:
        """Ask another node next, which may know of a newer primary."""
        self._leave()

    def close(self) -> None:
        self._leave()


class SessionClient:
    """Writes that are sent again until they are answered, and done once (SESSION DO)."""

    def __init__(self, raw: RawClient, stop: threading.Event) -> None:
        self._raw = raw
        self._stop = stop
        self._session = ""
        self._serial = 0

    def do(self, *argv: str) -> Reply:
        """The answer. Raises OutcomeUnknownError if the run ends first, KVError if refused."""
        if not self._session:
            self._session = str(self._repeat("SESSION", "OPEN"))
        self._serial += 1
        serial = str(self._serial)
        return self._repeat("SESSION", "DO", self._session, serial, serial, *argv)

    def _repeat(self, *argv: str | bytes) -> Reply:
        unknown = False
        while True:
            try:
                return self._raw.call(*argv)
            except AnswerForgottenError:
                raise AssertionError(f"the answer was never acknowledged: {argv}") from None
            except OutcomeUnknownError:
                unknown = True
                if self._stop.is_set():
                    raise
            except NoPrimaryError:
                if self._stop.is_set():
                    if unknown:
                        raise OutcomeUnknownError("the run has ended") from None
                    raise


# ---- Workloads ---------------------------------------------------------------------------------


class Workload:
    """Some clients, and what must be true in the end."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]  # of requests, each of which must be answered again and again

    def __init__(self, addresses: Sequence[Address], notes: Notes, seed: int) -> None:
        self.addresses = addresses
        self.notes = notes
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self._closers: list[Callable[[], None]] = []

    def clients(self) -> list[Callable[[], None]]:
        """A function for each client: one step of what it does over and over."""
        raise NotImplementedError

    def check(self, final: KVStoreClient) -> list[str]:
        """What is wrong, now that all is well again; ``undecided: ...`` is not decided."""
        raise NotImplementedError

    def raw(self, answer_s: float = ANSWER_S) -> RawClient:
        client = RawClient(self.rng.sample(self.addresses, len(self.addresses)), answer_s)
        self._closers.append(client.close)
        return client

    def library(self) -> KVStoreClient:
        client = KVStoreClient(map(format_address, self.addresses), timeout_s=ANSWER_S)
        self._closers.append(client.close)
        return client

    def close(self) -> None:
        for close in self._closers:
            close()

    def did(self, kind: str) -> None:
        """One more request of this kind was answered."""
        assert kind in self.kinds
        self.notes.did(f"{self.name}: {kind}")

    def lacking(self, seconds: float) -> list[str]:
        """The kinds of requests of which too few were answered in so many seconds."""
        done = {kind: self.notes.done[f"{self.name}: {kind}"] for kind in self.kinds}
        return [
            f"too little traffic: {count} {kind} of {self.name} were answered in {seconds:.0f} s"
            for kind, count in done.items()
            if count < ANSWERS_PER_S_MIN * seconds
        ]

    def of(self, prefix: str) -> list[Operation]:
        return [o for o in self.notes.operations if o.key.startswith(prefix)]


class Registers(Workload):
    """W1: reads, writes, compare-and-sets and deletions of a few keys at a time, by 8 clients."""

    name = "registers"
    kinds: ClassVar[tuple[str, ...]] = ("reads", "writes", "compare-and-sets", "deletions")

    def __init__(self, addresses: Sequence[Address], notes: Notes, seed: int) -> None:
        super().__init__(addresses, notes, seed)
        self._numbers = itertools.count(1)
        self._values = itertools.count(1)
        self._keys = [self._new_key() for _ in range(REGISTERS)]
        self._operations: defaultdict[str, int] = defaultdict(int)
        self._unknown: defaultdict[str, int] = defaultdict(int)

    def _new_key(self) -> str:
        return f"register:{next(self._numbers)}"

    def _pick(self) -> str:
        with self.lock:
            place = self.rng.randrange(REGISTERS)
            key = self._keys[place]
            if self._operations[key] >= OPERATIONS_MAX or self._unknown[key] >= UNKNOWN_MAX:
                key = self._keys[place] = self._new_key()
            self._operations[key] += 1
            return key

    @contextmanager
    def _noting(
        self, kind: Kind, key: str, argument: Value = None, **more: object
    ) -> Iterator[Call]:
        with self.notes.noting(kind, key, argument, **more) as call:
            try:
                yield call
            except OutcomeUnknownError:
                with self.lock:
                    self._unknown[key] += kind is not Kind.READ
                raise

    def clients(self) -> list[Callable[[], None]]:
        return [self._library_client() for _ in range(4)] + [self._raw_client() for _ in range(4)]

    def _library_client(self) -> Callable[[], None]:
        client = self.library()
        seen: dict[str, int] = {}

        def read(key: str) -> None:
            with self._noting(Kind.READ, key) as call:
                found = client.gets(key)
                call.result, call.version = _int(found and found.value), found and found.version
                seen[key] = call.version or 0
                self.did("reads")

        def cas(key: str) -> None:
            value, version = next(self._values), seen.get(key, 0)
            with self._noting(Kind.CAS, key, value, expected_version=version) as call:
                try:
                    call.version = seen[key] = client.cas(key, value, version)
                    call.result = True
                except MismatchError as error:
                    call.result, call.version = False, error.version
                    seen[key] = error.version
                self.did("compare-and-sets")

        def write(key: str) -> None:
            value = next(self._values)
            with self._noting(Kind.WRITE, key, value):
                client.set(key, value)
                self.did("writes")

        def delete(key: str) -> None:
            with self._noting(Kind.DELETE, key) as call:
                call.result = client.delete(key) == 1
                self.did("deletions")

        steps = (read, read, read, cas, cas, cas, write, delete)
        return lambda: random.choice(steps)(self._pick())

    def _raw_client(self) -> Callable[[], None]:
        client = self.raw()

        def read(key: str) -> None:
            with self._noting(Kind.READ, key) as call:
                call.result = _int(client.call("GET", key))
                self.did("reads")

        def write(key: str) -> None:
            value = next(self._values)
            with self._noting(Kind.WRITE, key, value):
                client.call("SET", key, str(value))
                self.did("writes")

        def delete(key: str) -> None:
            with self._noting(Kind.DELETE, key) as call:
                call.result = client.call("DEL", key) == 1
                self.did("deletions")

        steps = (read, read, read, read, write, write, write, delete)
        return lambda: random.choice(steps)(self._pick())

    def check(self, final: KVStoreClient) -> list[str]:
        keys = sorted(self._operations)
        called_at = time.monotonic()
        values = final.mget(keys)
        ended_at = time.monotonic()
        for key, value in zip(keys, values, strict=True):
            last = Operation(-1, Kind.READ, key, called_at, ended_at, result=_int(value))
            self.notes.add(last)
        problems = []
        for key, verdict in check_registers(self.of("register:")).items():
            if verdict.outcome is Outcome.VIOLATION:
                problems.append(f"{key} is not linearizable: {verdict.reason}")
            elif verdict.outcome is Outcome.UNDECIDED:
                problems.append(f"undecided: {key}: {verdict.reason}")
        return problems


def _int(value: object) -> int | None:
    return None if value is None else int(value)  # type: ignore[call-overload]


class Lists(Workload):
    """W2: each number is appended once; nothing acknowledged is lost, nothing comes twice."""

    name = "lists"
    kinds: ClassVar[tuple[str, ...]] = ("appends", "reads")

    def __init__(self, addresses: Sequence[Address], notes: Notes, seed: int) -> None:
        super().__init__(addresses, notes, seed)
        self._elements = itertools.count(1)
        self._lists = 1
        self._appended = 0
        self._reads: defaultdict[str, list[ListRead]] = defaultdict(list)

    def clients(self) -> list[Callable[[], None]]:
        return [*map(self._appender, (self.raw(), self.raw())), self._reader(self.raw())]

    def _key(self) -> str:
        return f"list:{self._lists}"

    def _appender(self, client: RawClient) -> Callable[[], None]:
        def append() -> None:
            with self.lock:
                self._appended += 1
                self._lists += self._appended % ELEMENTS_MAX == 0
                key, element = self._key(), str(next(self._elements))
            with self.notes.noting(Kind.APPEND, key, element):
                client.call("APPEND", key, f"{element},")
                self.did("appends")

        return append

    def _reader(self, client: RawClient) -> Callable[[], None]:
        def read() -> None:
            key, called_at = self._key(), time.monotonic()
            with self.notes.judging():
                self._note_read(key, called_at, client.call("GET", key))
                self.did("reads")
            self.stop.wait(0.1)

        return read

    def _note_read(self, key: str, called_at: float, value: object) -> None:
        text = value.decode() if isinstance(value, bytes) else str(value or "")
        elements = tuple(text.split(",")[:-1])
        self._reads[key].append(ListRead(called_at, time.monotonic(), elements))

    def check(self, final: KVStoreClient) -> list[str]:
        problems = []
        for number in range(1, self._lists + 1):
            key, called_at = f"list:{number}", time.monotonic()
            self._note_read(key, called_at, final.execute("GET", key))
            appends = [o for o in self.of("list:") if o.key == key]
            problems += [f"{key}: {p}" for p in check_set_full(appends, self._reads[key])]
        return problems


class Counters(Workload):
    """W3: increments in sessions, sent again until answered; each counts exactly once."""

    name = "counters"
    kinds: ClassVar[tuple[str, ...]] = ("increments", "reads")

    def clients(self) -> list[Callable[[], None]]:
        session, library = SessionClient(self.raw(), self.stop), self.library()
        return [
            self._counter(lambda: session.do("INCR", "counter")),
            self._counter(lambda: library.incr("counter")),
            self._reader(),
        ]

    def _counter(self, increment: Callable[[], Reply]) -> Callable[[], None]:
        def step() -> None:
            with self.notes.noting(Kind.INCREMENT, "counter") as call:
                call.result = _int(increment())
                self.did("increments")

        return step

    def _reader(self) -> Callable[[], None]:
        client = self.raw()

        def read() -> None:
            with self.notes.noting(Kind.READ, "counter") as call:
                call.result = _int(client.call("GET", "counter"))
                self.did("reads")

        return read

    def check(self, final: KVStoreClient) -> list[str]:
        with self.notes.noting(Kind.READ, "counter") as call:
            call.result = _int(final.get("counter"))
        return check_counter(self.of("counter"))


class Bank(Workload):
    """W4: a teller moves money by MSET; whoever reads all accounts at once sees all the money.

    Each transfer leaves a key of its own, so that one which was acknowledged and lost is missed.
    """

    name = "bank"
    kinds: ClassVar[tuple[str, ...]] = ("transfers", "audits")

    def __init__(self, addresses: Sequence[Address], notes: Notes, seed: int) -> None:
        super().__init__(addresses, notes, seed)
        self._bank = 0  # 0: none is open
        self._opened = 0
        self._reads: list[list[int]] = []
        self._slips = itertools.count(1)
        self._acknowledged: list[str] = []  # the keys of transfers

    def clients(self) -> list[Callable[[], None]]:
        return [self._teller(), self._auditor()]

    def _accounts(self, bank: int) -> list[str]:
        return [f"bank:{bank}:{number}" for number in range(ACCOUNTS)]

    def _teller(self) -> Callable[[], None]:
        client = self.raw()
        balances: list[int] = []

        def write(values: dict[int, int]) -> None:
            accounts = self._accounts(self._opened)
            words = [w for place, money in values.items() for w in (accounts[place], str(money))]
            slip = f"slip:{next(self._slips)}"
            try:
                client.call("MSET", *words, slip, "done")
            except OutcomeUnknownError:
                self._bank = 0  # its balances are not known any more: another one is opened
                raise
            self.did("transfers")
            self._acknowledged.append(slip)
            for place, money in values.items():
                balances[place] = money

        def step() -> None:
            with self.notes.noting(Kind.WRITE, f"bank:{self._opened}"):
                if not self._bank:
                    self._opened += 1
                    balances[:] = [0] * ACCOUNTS
                    write(dict.fromkeys(range(ACCOUNTS), BALANCE))
                    self._bank = self._opened
                    return
                giver, taker = self.rng.sample(range(ACCOUNTS), 2)
                money = self.rng.randint(0, balances[giver])
                write({giver: balances[giver] - money, taker: balances[taker] + money})

        return step

    def _auditor(self) -> Callable[[], None]:
        client = self.raw()

        def read() -> None:
            if bank := self._bank:
                with self.notes.judging():
                    found = client.call("MGET", *self._accounts(bank))
                    assert isinstance(found, list)
                    self._reads.append([_int(money) or 0 for money in found])
                    self.did("audits")

        return read

    def check(self, final: KVStoreClient) -> list[str]:
        found = final.mget(self._acknowledged)
        slips = zip(self._acknowledged, found, strict=True)
        lost = [f"{slip} was acknowledged and is lost" for slip, there in slips if there is None]
        return lost + check_bank(self._reads, ACCOUNTS * BALANCE)


class Expiry(Workload):
    """W6: a key is there until its time is over, and never after.

    In the end the primary is asked, and all nodes have the same state.
    """

    name = "expiry"
    kinds: ClassVar[tuple[str, ...]] = ("writes", "reads")

    def __init__(self, addresses: Sequence[Address], notes: Notes, seed: int) -> None:
        super().__init__(addresses, notes, seed)
        self._numbers = itertools.count(1)
        self.set: list[tuple[str, float, float, float]] = []  # key, called, ended, its time

    def clients(self) -> list[Callable[[], None]]:
        return [self._setter(), self._reader()]

    def _setter(self) -> Callable[[], None]:
        client = self.raw()

        def set_one() -> None:
            key, ttl_ms = f"expiry:{next(self._numbers)}", self.rng.randint(300, 3000)
            called_at = time.monotonic()
            with self.notes.noting(Kind.WRITE, key, key):
                client.call("SET", key, "here", "PX", str(ttl_ms))
                self.set.append((key, called_at, time.monotonic(), ttl_ms / 1000))
                self.did("writes")
            self.stop.wait(0.02)

        return set_one

    def _reader(self) -> Callable[[], None]:
        client = self.raw()

        def read() -> None:
            if not self.set:
                return
            key, set_called_at, set_ended_at, ttl_s = random.choice(self.set[-100:])
            called_at = time.monotonic()
            with self.notes.judging():
                there = client.call("GET", key) is not None
                ended_at = time.monotonic()
                self.did("reads")
                if not there and ended_at < set_called_at + ttl_s - EXPIRY_SLACK_S:
                    self.notes.complain(f"{key} expired early, read {called_at}..{ended_at}")
                if there and called_at > set_ended_at + ttl_s + EXPIRY_SLACK_S:
                    self.notes.complain(f"{key} outlived its time, read {called_at}..{ended_at}")

        return read

    def check(self, final: KVStoreClient) -> list[str]:
        last = max((ended + ttl_s for _, _, ended, ttl_s in self.set), default=0.0)
        time.sleep(max(0.0, last + EXPIRY_SLACK_S - time.monotonic()))
        keys = [key for key, *_ in self.set]
        found = final.mget(keys)
        return [f"{k} came back" for k, value in zip(keys, found, strict=True) if value is not None]


class StaleReads(Workload):
    """W9: every node is asked itself, all the time, for a number that only grows.

    The writer waits for nobody and holds on to no primary: so it finds the next one first.
    """

    name = "stale reads"
    kinds: ClassVar[tuple[str, ...]] = ("writes", "reads")

    def __init__(self, addresses: Sequence[Address], notes: Notes, seed: int) -> None:
        super().__init__(addresses, notes, seed)
        self._acknowledged = 0

    def clients(self) -> list[Callable[[], None]]:
        return [self._writer(), *map(self._hunter, self.addresses)]

    def _writer(self) -> Callable[[], None]:
        raw = self.raw(IMPATIENT_S)
        client = SessionClient(raw, self.stop)
        numbers = itertools.count(1)

        def write() -> None:
            raw.move_on()
            number = next(numbers)
            with self.notes.noting(Kind.WRITE, "hunted", number):
                client.do("SET", "hunted", str(number))
                self._acknowledged = number
                self.did("writes")

        return write

    def _hunter(self, address: Address) -> Callable[[], None]:
        connection: RespConnection | None = None

        def read() -> None:
            nonlocal connection
            at_least, called_at = self._acknowledged, time.monotonic()
            try:
                connection = connection or RespConnection(address, timeout_s=1.0)
                reply = connection.ask("GET", "hunted")
            except OSError:
                if connection is not None:
                    connection.close()
                connection = None
                self.stop.wait(0.05)
                return
            if isinstance(reply, KVError):
                if not isinstance(reply, NotPrimaryError):  # which most nodes say to most reads
                    self.notes.refused(reply)
                self.stop.wait(0.02)
                return
            self.did("reads")
            if (_int(reply) or 0) < at_least:
                self.notes.complain(
                    f"{address} answered {reply!r} at {called_at:.6f}..{time.monotonic():.6f}; "
                    f"{at_least} was acknowledged before"
                )

        def close() -> None:
            if connection is not None:
                connection.close()

        self._closers.append(close)
        return read

    def check(self, final: KVStoreClient) -> list[str]:
        value = _int(final.get("hunted")) or 0
        return [] if value >= self._acknowledged else [f"{self._acknowledged} lost: {value}"]


WORKLOADS: Final = (Registers, Lists, Counters, Bank, Expiry, StaleReads)


class Load:
    """All workloads at once, each client in a thread, from ``with`` to its end."""

    def __init__(self, addresses: Sequence[Address], notes: Notes, seed: int) -> None:
        self.workloads = [kind(addresses, notes, seed) for kind in WORKLOADS]
        self.notes = notes
        self._threads = [
            threading.Thread(target=self._loop, args=(workload, step), name=f"load-{workload.name}")
            for workload in self.workloads
            for step in workload.clients()
        ]

    def _loop(self, workload: Workload, step: Callable[[], None]) -> None:
        while not workload.stop.wait(random.uniform(0, PAUSE_S_MAX)):
            try:
                step()
            except Exception as error:  # noqa: BLE001  # a client that dies has proved nothing
                self.notes.complain(f"a client of {workload.name} died: {error!r}")
                return

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for workload in self.workloads:
            workload.stop.set()
        for thread in self._threads:
            thread.join()
        for workload in self.workloads:
            workload.close()

    def lacking(self, seconds: float) -> list[str]:
        """What was done too seldom in so many seconds, by all workloads."""
        return [text for workload in self.workloads for text in workload.lacking(seconds)]

    def check(self, final: KVStoreClient) -> list[str]:
        """Everything that is wrong, by all workloads."""
        found = list(self.notes.problems)
        for workload in self.workloads:
            found += [f"{workload.name}: {problem}" for problem in workload.check(final)]
        return found + [p for p in self.notes.problems if p not in found]
