"""One client's connection: requests of both languages in, replies out.

Rule 1: everything that one ``recv`` brought is one batch: a run of writes is proposed together, a
run of reads shares one read barrier, and the replies leave in one send.
Rule 2: a definite error is only given for what was not proposed (promise G4).
Rule 3: while no primary is known, a data command is held for a moment instead of refused, so that
a failover is a pause and not an error.

Rule 4: a batch that is one short run is handed over: it joins those of other clients, and is answered
by the thread that applies it or confirms the read. Waking the client's own thread for it would cost
more than all the rest (docs/adr/0005, 0007).

Each ``Session`` belongs to one connection of ``kv_store_server.py``: to its thread ``client-N``, or
while that sleeps to ``read-clients``. What they share is the ``Service``. The commands' meaning is
in ``kv_store.py``, their syntax in ``kv_commands.py``.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import kv_commands
import kv_members
from kv_config import Settings
from kv_errors import (
    BadRequestError,
    KVError,
    MismatchError,
    NoPrimaryError,
    NoSpaceError,
    NotPrimaryError,
    OutOfMemoryError,
    TooLargeError,
)
from kv_protocol import (
    Item,
    RequestParser,
    encode_line,
    encode_reply,
    line_key,
    line_value,
    reply_size_bytes,
)
from kv_store import ExpiredKeysError, KeyValueStore, purge_request
from kv_types import OK, RepeatedReply, Reply, SimpleString, Verbatim
from raft_node import RaftNode
from raft_status import Pending

# What Redis' clients take this server for; newer numbers make some ask for more than there is.
REDIS_VERSION: Final = "7.0.15"
HOLD_S: Final = 1.5
# One batch becomes one run of log entries; a longer pipeline is proposed in several.
BATCH_REQUESTS_MAX: Final = 1024
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
# More is only made once this has been sent: a short pipeline can ask for gigabytes.
REPLIES_BYTES_MAX: Final = 1024 * 1024
# Of values for a line, which are looked at for JSON (some 0.3 s a MiB): more is not for a thread that
# hears peers, for those that are not heard are taken for dead.
LINES_BYTES_MAX: Final = 64 * 1024
BACKUPS_MAX: Final = 2  # at once: each holds a copy of the state on the disk until it is sent
# Allowed where memory or the disk is short; a session because a client may need one to delete under.
SHRINKING: Final = frozenset(
    {
        *("DEL", "DELETE", "UNLINK", "DELEX", "GETDEL", "FLUSHALL", "SESSION"),
        *("EXPIRE", "PEXPIRE", "EXPIREAT", "PEXPIREAT", "PERSIST"),
    }
)

Argv = Sequence[bytes]


@dataclass
class Service:
    """What all sessions of a server share."""

    settings: Settings
    node: RaftNode
    store: KeyValueStore
    run_id: str = field(default_factory=lambda: secrets.token_hex(20))
    started_s: float = field(default_factory=time.monotonic)
    ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    sessions: dict[int, Session] = field(default_factory=dict)
    # Counted without a lock: figures for people, where a lost count now and then does no harm.
    commands_count: int = 0
    connections_count: int = 0
    backups: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(BACKUPS_MAX))

    def now_ms(self) -> int:
        """The wall clock, which only ever reaches the state as a stamp in the log."""
        return time.time_ns() // 1_000_000


class Batch:
    """What several clients ask at once: their writes proposed together, their reads in one round.

    Gathered and begun by one thread; answered by the thread that applies, or confirms the reads.
    """

    def __init__(self, node: RaftNode) -> None:
        self._node = node
        # By whether they are blind, which decides when they are answered.
        self._writes: dict[bool, list[tuple[Session, Sequence[Argv]]]] = {}
        self._payloads: dict[bool, list[bytes]] = {}
        self._reads: list[tuple[Session, Sequence[Argv]]] = []

    def add_writes(
        self, session: Session, run: Sequence[Argv], payloads: Sequence[bytes], blind: bool
    ) -> None:
        """``run`` is all that ``session`` has received."""
        self._writes.setdefault(blind, []).append((session, run))
        self._payloads.setdefault(blind, []).extend(payloads)
        session.begin()

    def add_reads(self, session: Session, run: Sequence[Argv]) -> None:
        """``run`` is all that ``session`` has received."""
        self._reads.append((session, run))
        session.begin()

    def start(self) -> Iterator[Session]:
        """Propose the writes, ask for the reads; returns the sessions that are refused.

        Nothing of theirs was proposed: they have it back, to answer it on their own threads.
        """
        if self._reads:
            reads = self._reads
            yield from self._try(reads, lambda: self._node.read_later(partial(_end_reads, reads)))
        for blind, writes in self._writes.items():
            begin = partial(
                self._node.propose_later,
                self._payloads[blind],
                partial(_end_writes, writes),
                blind=blind,
            )
            yield from self._try(writes, begin)

    def _try(
        self, runs: Sequence[tuple[Session, Sequence[Argv]]], begin: Callable[[], None]
    ) -> Iterator[Session]:
        try:
            begin()
        except KVError:
            for session, run in runs:
                session.take_back(run)
                yield session


def _end_writes(writes: Sequence[tuple[Session, Sequence[Argv]]], pending: Pending) -> None:
    offset = 0
    for session, run in writes:
        session.end_writes(run, pending, offset)
        offset += len(run)


def _end_reads(reads: Sequence[tuple[Session, Sequence[Argv]]], pending: Pending) -> None:
    for session, run in reads:
        session.end_reads(run, pending)


class Session:
    """The state of one connection, and the one place that answers its requests."""

    def __init__(
        self,
        service: Service,
        peer: str,
        *,
        deliver: Callable[[bytes, Iterator[bytes] | None, Callable[[], None]], None],
        stop_reading: Callable[[], None],
        is_gone: Callable[[], bool],
    ) -> None:
        """``deliver(replies, more, sent)`` sends from any thread without waiting.

        Then it sends what ``more`` gives, if anything, on a thread that may wait, and in the end
        it calls ``sent``.
        ``stop_reading`` lets the client's thread see the end of its requests. ``is_gone`` says
        whether the client has closed its side.
        """
        self.service = service
        self.node = service.node
        self.store = service.store
        self.id = next(service.ids)
        self.peer = peer
        self.stop_reading = stop_reading
        self._is_gone = is_gone
        self.name = b""
        self.protocol = 2
        self.reads_stale = False
        self.closing = False
        self.last_write_index = 0
        self.began_s = time.monotonic()
        self.parser = RequestParser(service.settings.request_bytes_max)
        self._deliver = deliver
        self._items: list[Item] = []  # received, and not yet answered
        self._held_until_s: float | None = None  # while there is no primary
        self._in_multi = False  # a MULTI was refused, and its EXEC has not come
        # Held from handing a run to a batch until its replies are sent (or it came back).
        self._under_way = threading.Lock()
        # A run of reads that came back, because this node ceased to lead: it was not answered.
        self._came_back: Sequence[Argv] = []
        service.connections_count += 1
        service.sessions[self.id] = self

    def receive(self, data: bytes) -> None:
        """Take what the client sent apart; then ``hand_over`` or ``answer``."""
        self.parser.feed(data)
        items = self.parser.take()
        self.service.commands_count += len(items)
        self._items += items

    def hand_over(self, batch: Batch) -> bool:
        """Leave all that was received to ``batch``; False: ``answer`` it, on a thread that waits."""
        items = self._items
        if self._under_way.locked() or self._came_back or self.parser.broken or not items:
            return False
        if self._in_multi:
            return False
        command = self._checked(items[0])
        if isinstance(command, KVError) or not command.flags & {"write", "read"}:
            return False
        flag = "write" if "write" in command.flags else "read"
        run, end = self._gather(items, 0, flag)
        if end < len(items):
            return False
        if flag == "write":
            batch.add_writes(self, run, *self._payloads(run))
        elif not self.reads_stale and all("fast" in kv_commands.lookup(argv).flags for argv in run):
            batch.add_reads(self, run)
        else:
            return False
        return True

    def answer(self) -> Iterator[bytes]:
        """The replies to what was received; then see ``closing``.

        Each piece is made when the one before it has been sent.
        """
        self.wait()
        self._held_until_s = None
        if self._came_back:
            run, self._came_back = self._came_back, []
            yield from self._read_all(run)
        items, self._items = self._items, []
        out: list[bytes] = []
        size_bytes = position = 0
        while position < len(items) and not self.closing:
            if self.parser.language == "lines" and _is_backup(items[position]):
                self.closing = True
                yield b"".join(out)
                yield from kv_members.backup(self.node, self.service.backups)
                return
            position, replies = self._answer_run(items, position)
            for reply in replies:
                out.append(reply)
                size_bytes += len(reply)
                if size_bytes > REPLIES_BYTES_MAX:
                    yield b"".join(out)
                    out.clear()
                    size_bytes = 0
        self.closing = self.closing or self.parser.broken
        if out:
            yield b"".join(out)

    def wait(self) -> None:
        """Return when no other thread is answering for this connection."""
        with self._under_way:
            pass

    # ---- Batches -------------------------------------------------------------------------------

    def _answer_run(self, items: Sequence[Item], position: int) -> tuple[int, Iterable[bytes]]:
        """Answer ``items`` from ``position``, as many as go together; where to go on, and replies."""
        first = items[position]
        command = self._refuse_transaction(first) or self._checked(first)
        if isinstance(command, KVError):
            return position + 1, [self._encode([], command, 0)]
        assert not isinstance(first, KVError)
        if "write" in command.flags:
            run, end = self._gather(items, position, "write")
            return end, self._write(run)
        if "read" in command.flags:
            run, _ = self._gather(items, position, "read")
            replies = self._read(run)
            return position + len(replies), replies
        try:
            if command.name == "BACKUP":
                text = "BACKUP is for the line language: use cluster_manager.py --action backup"
                raise BadRequestError(text)
            reply = _LOCAL[command.name](self, first)
        except KVError as error:
            reply = error
        return position + 1, [self._encode(first, reply, 0)]

    def _refuse_transaction(self, item: Item) -> KVError | None:
        """MULTI is not there yet: then nothing up to EXEC may be done, one by one, instead."""
        word = b"" if isinstance(item, KVError) else item[0].upper()
        if word == b"MULTI":
            self._in_multi = True
            return BadRequestError("MULTI is not supported: use MSET, CAS or SET ... IFEQ instead")
        if not self._in_multi:
            return None
        if word in (b"EXEC", b"DISCARD"):
            self._in_multi = False
            return _ExecAbortError("Transaction discarded because MULTI is not supported.")
        return BadRequestError(
            "not done: it stands between MULTI, which is not supported, and EXEC"
        )

    def _checked(self, item: Item) -> kv_commands.Command | KVError:
        if isinstance(item, KVError):
            return item
        try:
            command = kv_commands.check(item)
        except KVError as error:
            return error
        if "write" in command.flags and (shortage := self._shortage()):
            acting = kv_commands.lookup(kv_commands.acting(item))
            return command if acting.name in SHRINKING else shortage
        return command

    def _shortage(self) -> KVError | None:
        """What there is too little of for a write that may take more."""
        limit = self.service.settings.memory_bytes_max
        if limit and self.store.memory_bytes > limit:
            return OutOfMemoryError("command not allowed when used memory > --max-memory")
        if trouble := self.node.room_trouble():
            return NoSpaceError(trouble)
        return None

    def _gather(self, items: Sequence[Item], start: int, flag: str) -> tuple[list[Argv], int]:
        """The requests from ``start`` on that are of the same kind, and where they end."""
        run: list[Argv] = []
        size_bytes = 0
        end = start
        while end < len(items) and len(run) < BATCH_REQUESTS_MAX and size_bytes < BATCH_BYTES_MAX:
            item = items[end]
            if end > start:
                command = self._checked(item)
                if isinstance(command, KVError) or flag not in command.flags:
                    break
            assert not isinstance(item, KVError)
            run.append(self._as_resp(item))
            size_bytes += sum(map(len, item))
            end += 1
        return run, end

    def _as_resp(self, argv: Argv) -> Argv:
        """A line's GET also tells the version, so it is asked as GETS."""
        if self.parser.language == "lines" and argv[0].upper() == b"GET":
            return [b"GETS", *argv[1:]]
        return argv

    def _held(self, attempt: Callable[[], None]) -> KVError | None:
        """Run ``attempt``; while there is no primary, hold the request for up to HOLD_S.

        That is for all that was received together: a pipeline of a thousand runs is held once.
        """
        while True:
            try:
                attempt()
            except NoPrimaryError as error:
                if self._held_until_s is None:
                    self._held_until_s = time.monotonic() + HOLD_S
                left_s = self._held_until_s - time.monotonic()
                if left_s <= 0 or self.node.wait_for_primary(left_s) is None:
                    return error
                time.sleep(min(0.01, max(0.0, left_s)))
            except KVError as error:
                return error
            else:
                return None

    def _write(self, run: Sequence[Argv]) -> Iterable[bytes]:
        payloads, blind = self._payloads(run)
        done: list[Pending] = []
        error = self._held(lambda: done.append(self.node.propose(payloads, blind=blind)))
        if error is not None:
            return self._encode_all(run, [error] * len(run))
        # One at a time: a short run can ask for gigabytes of what it replaces.
        return self._encoded(run, *self._write_replies(run, done[0]))

    def _payloads(self, run: Sequence[Argv]) -> tuple[list[bytes], bool]:
        now_ms = self.service.now_ms()
        payloads = [kv_commands.encode_payload(now_ms, argv) for argv in run]
        is_async = self.service.settings.replication == "async"
        return payloads, is_async and all(map(kv_commands.is_blind, run))

    def _write_replies(
        self, run: Sequence[Argv], pending: Pending, offset: int = 0
    ) -> tuple[Sequence[Reply], int]:
        """The replies to a run that begins ``offset`` entries after the first of ``pending``.

        With the index of its own first entry.
        """
        first = pending.first + offset
        if pending.error is not None:
            return [pending.error] * len(run), first
        self.last_write_index = first + len(run) - 1
        # Answered before it was applied: a blind write's reply is always OK.
        return pending.replies[offset : offset + len(run)] or [OK] * len(run), first

    def _encode_all(
        self, run: Sequence[Argv], replies: Sequence[Reply], first: int = 0
    ) -> list[bytes]:
        return [*self._encoded(run, replies, first)]

    def _encoded(
        self, run: Sequence[Argv], replies: Sequence[Reply], first: int
    ) -> Iterator[bytes]:
        for i, (argv, reply) in enumerate(zip(run, replies, strict=True)):
            yield self._encode(argv, reply, first + i)

    def _read_all(self, run: Sequence[Argv]) -> Iterator[bytes]:
        """The replies to a run, in pieces."""
        while run:
            replies = self._read(run)
            yield b"".join(replies)
            run = run[len(replies) :]

    def _read(self, run: Sequence[Argv]) -> list[bytes]:
        """The replies to the first of ``run``: at least one, and as many as should be held."""
        stale = self.reads_stale and not self.node.is_primary
        if stale:
            if self.node.suspicion:
                return self._encode_all(run, [NoPrimaryError(self.node.suspicion)] * len(run))
        else:
            error = self._held(self.node.read_barrier)
            if error is not None:
                return self._encode_all(run, [error] * len(run))
        replies: list[Reply] = []
        while not replies:
            now_ms = self.service.now_ms()
            try:
                self._read_store(run, replies, now_ms, stale=stale)
            except ExpiredKeysError as expired:
                error = self._purge(expired.pairs, now_ms)
                if error is not None and not replies:
                    replies.append(error)
        return self._encode_all(run[: len(replies)], replies)

    def _read_store(
        self, run: Sequence[Argv], replies: list[Reply], now_ms: int, *, stale: bool = False
    ) -> None:
        """Add the replies to the first of ``run``, until they are REPLIES_BYTES_MAX."""
        size_bytes = 0
        read = self.store.read_stale if stale else self.store.read
        with self.node.store_lock:
            for argv in run:
                reply = read(argv, now_ms)
                replies.append(reply)  # kept if a later one raises
                size_bytes += reply_size_bytes(reply)
                if size_bytes > REPLIES_BYTES_MAX:
                    return

    def _purge(self, pairs: Sequence[tuple[bytes, int]], now_ms: int) -> KVError | None:
        """Delete keys whose deadline has passed, so that a read may say that they are gone.

        Before anyone is told so it has to be in the log: otherwise a clock that runs slower could
        bring a key back after a failover (promise G5).
        """
        try:
            self.node.propose([kv_commands.encode_payload(now_ms, purge_request(pairs))])
        except KVError as error:
            return error if error.definite else NoPrimaryError()  # a read is always definite
        return None

    # ---- Handed over to a Batch ----------------------------------------------------------------

    def begin(self) -> None:
        """A batch has what was received: nothing else is answered until ``end`` (or it fails)."""
        self._under_way.acquire()
        self._items = []

    def take_back(self, run: Sequence[Argv]) -> None:
        """The batch was not begun: ``answer`` them after all."""
        self._items[:0] = [list(argv) for argv in run]
        self._under_way.release()

    def end_writes(self, run: Sequence[Argv], pending: Pending, offset: int) -> None:
        """A run was applied, or failed."""
        self._deliver_all(run, *self._write_replies(run, pending, offset))

    def end_reads(self, run: Sequence[Argv], pending: Pending) -> None:
        """The store may be read for a run, or it can't."""
        if pending.error is not None:
            # The client's thread has to see to it: wake it, as a lost leadership does anyway.
            self._came_back = run
            self._under_way.release()
            self.stop_reading()
            return
        replies: list[Reply] = []
        # What is due is purged by a thread that may wait: here it would be one inside the other.
        with suppress(ExpiredKeysError):
            self._read_store(run, replies, self.service.now_ms())
        self._deliver_all(run, replies)

    def _deliver_all(self, run: Sequence[Argv], replies: Sequence[Reply], first: int = 0) -> None:
        """Send ``replies``, then those to the rest of ``run``, which are reads."""
        done, rest = run[: len(replies)], run[len(replies) :]
        pieces = self._encoded(done, replies, first)
        more = self._read_all(rest) if rest else None
        limit_bytes = LINES_BYTES_MAX if self.parser.language == "lines" else REPLIES_BYTES_MAX
        if sum(map(reply_size_bytes, replies)) > limit_bytes:
            self._deliver(b"", itertools.chain(pieces, more or ()), self._under_way.release)
        else:
            self._deliver(b"".join(pieces), more, self._under_way.release)

    # ---- Replies -------------------------------------------------------------------------------

    def _encode(self, argv: Argv, reply: Reply, version: int) -> bytes:
        if self.parser.language == "lines":
            return encode_line(_line_reply(argv, reply, version))
        slot = _slot(argv) if isinstance(reply, NotPrimaryError) else 0
        return encode_reply(reply, self.protocol, slot)

    # ---- Commands that need no log -------------------------------------------------------------

    def _ping(self, argv: Argv) -> Reply:
        return argv[1] if len(argv) > 1 else SimpleString("PONG")

    def _echo(self, argv: Argv) -> Reply:
        return argv[1]

    def _select(self, argv: Argv) -> Reply:
        if kv_commands.parse_int(argv[1]) != 0:
            raise BadRequestError("DB index is out of range")
        return OK

    def _quit(self, argv: Argv) -> Reply:
        self.closing = True
        return OK

    def _readonly(self, argv: Argv) -> Reply:
        self.reads_stale = True
        return OK

    def _readwrite(self, argv: Argv) -> Reply:
        self.reads_stale = False
        return OK

    def _reset(self, argv: Argv) -> Reply:
        self.reads_stale = False
        self.protocol = 2
        self.name = b""
        return SimpleString("RESET")

    def _time(self, argv: Argv) -> Reply:
        seconds, rest_ns = divmod(time.time_ns(), 1_000_000_000)
        return [str(seconds).encode(), str(rest_ns // 1000).encode()]

    def _hello(self, argv: Argv) -> Reply:
        protocol = self.protocol
        name = self.name
        if len(argv) > 1:
            if not argv[1].isdigit():
                raise BadRequestError("Protocol version is not an integer or out of range")
            if argv[1] not in (b"2", b"3"):
                return _NoProtoError("unsupported protocol version")
            protocol = int(argv[1])
        options = iter(argv[2:])
        for option in options:
            value = next(options, None) if option.upper() == b"SETNAME" else None
            if value is None:
                text = option.decode(errors="backslashreplace")
                raise BadRequestError(f"Syntax error in HELLO option '{text}'")
            name = _checked_name(value)
        self.protocol, self.name = protocol, name
        return {
            b"server": b"redis",
            b"version": REDIS_VERSION.encode(),
            b"proto": protocol,
            b"id": self.id,
            b"mode": b"standalone",
            b"role": b"master" if self.node.is_primary else b"replica",
            b"modules": [],
        }

    def _client(self, argv: Argv) -> Reply:
        subcommand = argv[1].upper().decode(errors="backslashreplace")
        if subcommand == "ID" and len(argv) == 2:
            return self.id
        if subcommand == "SETNAME" and len(argv) == 3:
            self.name = _checked_name(argv[2])
            return OK
        if subcommand == "GETNAME" and len(argv) == 2:
            return self.name or None
        if subcommand == "HELP":
            return _subcommands("CLIENT", "GETNAME ID INFO LIST SETINFO SETNAME")
        if subcommand == "SETINFO" and len(argv) == 4:
            return OK
        if subcommand == "INFO":
            return Verbatim(self.describe() + "\n")
        if subcommand == "LIST":
            sessions = list(self.service.sessions.values())
            return Verbatim("".join(session.describe() + "\n" for session in sessions))
        if subcommand in ("ID", "GETNAME", "SETNAME", "SETINFO"):
            raise kv_commands.wrong_arity(f"client|{subcommand.lower()}")
        raise BadRequestError(f"unknown subcommand '{subcommand}'. Try CLIENT HELP.")

    def describe(self) -> str:
        """This connection as a row of CLIENT LIST."""
        age_s = int(time.monotonic() - self.began_s)
        name = self.name.decode(errors="replace")
        return f"id={self.id} addr={self.peer} name={name} age={age_s} db=0 resp={self.protocol}"

    def _command(self, argv: Argv) -> Reply:
        subcommand = argv[1].upper() if len(argv) > 1 else b""
        table = kv_commands.COMMANDS
        public = [command for command in table.values() if "internal" not in command.flags]
        if subcommand == b"":
            return [kv_commands.command_row(command) for command in public]
        if subcommand == b"COUNT":
            return len(public)
        if subcommand == b"LIST":
            return [command.name.lower().encode() for command in public]
        if len(argv) - 2 > len(public):  # each name may make a row of a hundred bytes
            text = f"COMMAND INFO and DOCS may name {len(public)} commands at most"
            raise TooLargeError(text)
        names = [arg.upper().decode(errors="replace") for arg in argv[2:]]
        if subcommand == b"INFO":
            known = {command.name: command for command in public}
            return [
                kv_commands.command_row(known[n]) if n in known else None for n in names or known
            ]
        if subcommand == b"DOCS":
            shown = [c for c in public if not names or c.name in names]
            return {
                command.name.lower().encode(): kv_commands.command_doc(command) for command in shown
            }
        if subcommand == b"HELP":
            return _subcommands("COMMAND", "COUNT DOCS INFO LIST")
        text = argv[1].decode(errors="backslashreplace")
        raise BadRequestError(f"unknown subcommand '{text}'. Try COMMAND HELP.")

    def _config(self, argv: Argv) -> Reply:
        match argv[1].upper():
            case b"GET" if len(argv) < 3:
                raise kv_commands.wrong_arity("config|get")
            case b"GET":
                pass
            case b"RESETSTAT":
                self.service.commands_count = self.service.connections_count = 0
                return OK
            case b"HELP":
                return _subcommands("CONFIG", "GET RESETSTAT")
            case b"SET" | b"REWRITE":
                text = "settings are changed on the command line or in --config FILE"
                raise BadRequestError(text)
            case word:
                text = word.decode(errors="backslashreplace")
                raise BadRequestError(f"unknown subcommand '{text}'. Try CONFIG HELP.")
        values = self._config_values()
        return {
            name: value
            for name, value in values.items()
            if any(kv_commands.glob_match(pattern.lower(), name) for pattern in argv[2:])
        }

    def _config_values(self) -> dict[bytes, bytes]:
        """What redis-benchmark and other tools ask for, in Redis' words, and our own settings."""
        settings = self.service.settings
        values = {
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always" if settings.fsync == "always" else "no",
            "maxmemory": settings.memory_bytes_max,
            "maxclients": settings.max_clients,
            "databases": 1,
            "port": settings.port,
            "bind": settings.host,
            "replication": settings.replication,
            "read-mode": settings.read_mode,
            "max-request-bytes": settings.request_bytes_max,
            "heartbeat-interval": f"{settings.heartbeat_interval_s:g}",
            "election-timeout": (
                f"{settings.election_timeout_min_s:g}-{settings.election_timeout_max_s:g}"
            ),
        }
        return {name.encode(): str(value).encode() for name, value in values.items()}

    def _role(self, argv: Argv) -> Reply:
        status = self.node.status()
        if status.role == "PRIMARY":
            return [
                b"master",
                status.last_index,
                [
                    [
                        m.member.host.encode(),
                        str(m.member.port).encode(),
                        str(m.match_index).encode(),
                    ]
                    for m in status.members
                    if not m.is_primary
                ],
            ]
        primary = status.primary
        host, port = (primary.host, primary.port) if primary else ("", 0)
        state = b"connected" if primary else b"connect"
        return [b"slave", host.encode(), port, state, status.applied_index]

    def _wait(self, argv: Argv) -> Reply:
        """How many other voters hold this connection's last write; waits for ``numreplicas``."""
        wanted = kv_commands.parse_int(argv[1])
        try:
            timeout_ms = kv_commands.parse_int(argv[2])
        except BadRequestError:
            raise BadRequestError("timeout is not an integer or out of range") from None
        if timeout_ms < 0:
            raise BadRequestError("timeout is negative")
        # 0 means "for ever" to Redis; a thread of ours waits an hour at most. And, as with Redis, only
        # while its client is there: those who come, ask and go must not gather.
        deadline_s = time.monotonic() + (timeout_ms / 1000 if timeout_ms else 3600.0)
        pause_s = 0.001
        while True:
            status = self.node.status()
            if status.role != "PRIMARY":
                raise self._held(self.node.read_barrier) or NoPrimaryError()
            held = sum(
                1
                for m in status.members
                if m.member.voter
                and not m.is_primary
                and (m.match_index or 0) >= self.last_write_index
            )
            if held >= wanted or time.monotonic() >= deadline_s or self._is_gone():
                return held
            time.sleep(pause_s)
            pause_s = min(1.2 * pause_s, 0.05)

    def _info(self, argv: Argv) -> Reply:
        wanted = {arg.lower().decode(errors="replace") for arg in argv[1:]}
        everything = not wanted or wanted & {"all", "default", "everything"}
        parts = []
        for title, values in self._info_sections().items():
            if everything or title.lower() in wanted:
                lines = "".join(f"{name}:{value}\r\n" for name, value in values.items())
                parts.append(f"# {title}\r\n{lines}")
        return Verbatim("\r\n".join(parts))

    def _info_sections(self) -> dict[str, dict[str, object]]:
        service, status = self.service, self.node.status()
        primary = status.primary
        replication: dict[str, object] = {"role": "slave"}
        if status.role == "PRIMARY":
            replication = {"role": "master", "connected_slaves": len(status.members) - 1}
        elif primary is not None:
            replication.update(
                master_host=primary.host, master_port=primary.port, master_link_status="up"
            )
        else:
            replication.update(master_link_status="down")
        replication["master_repl_offset"] = status.commit_index
        return {
            "Server": {
                "redis_version": REDIS_VERSION,
                "kvstore_version": kv_members.VERSION,
                "redis_mode": "standalone",
                "os": platform.system(),
                "arch_bits": 64,
                "process_id": os.getpid(),
                "run_id": service.run_id,
                "tcp_port": service.settings.port,
                "uptime_in_seconds": int(time.monotonic() - service.started_s),
            },
            "Clients": {
                "connected_clients": len(service.sessions),
                "maxclients": service.settings.max_clients,
                "blocked_clients": 0,
            },
            "Memory": {
                "used_memory": self.store.memory_bytes,
                "maxmemory": service.settings.memory_bytes_max,
            },
            "Persistence": {"loading": 0, "aof_enabled": 1},
            "Stats": {
                "total_connections_received": service.connections_count,
                "total_commands_processed": service.commands_count,
            },
            "Replication": replication,
            "Raft": {
                "raft_role": status.role,
                "raft_term": status.term,
                "raft_commit_index": status.commit_index,
                "raft_applied_index": status.applied_index,
                "raft_state_hash": f"{status.state_hash:016x}",
            },
            "Cluster": {"cluster_enabled": 0},
            "Keyspace": {
                "db0": f"keys={len(self.store)},expires={self.store.expiring_count},avg_ttl=0"
            }
            if len(self.store)
            else {},
        }

    def _status(self, argv: Argv) -> Reply:
        fields = kv_members.status_fields(
            self.node, self.store, self.service.settings, self.service.started_s
        )
        return json.dumps(fields).encode()

    def _cluster(self, argv: Argv) -> Reply:
        if len(argv) > 1:
            raise BadRequestError("only CLUSTER without a subcommand is known so far")
        fields = kv_members.cluster_fields(
            self.node, self.store, self.service.settings, self.service.started_s
        )
        return json.dumps(fields).encode()

    def _member(self, argv: Argv) -> Reply:
        return self._held_reply(lambda: kv_members.change_members(self.node, argv))

    def _failover(self, argv: Argv) -> Reply:
        return self._held_reply(lambda: kv_members.fail_over(self.node, argv))

    def _held_reply(self, attempt: Callable[[], Reply]) -> Reply:
        replies: list[Reply] = []
        error = self._held(lambda: replies.append(attempt()))
        return error or replies[0]

    def _help(self, argv: Argv) -> Reply:
        wanted = {arg.upper().decode(errors="replace") for arg in argv[1:]}
        return {
            command.usage.encode(): command.summary.encode()
            for command in kv_commands.COMMANDS.values()
            if "internal" not in command.flags and (not wanted or command.name in wanted)
        }


class _NoProtoError(BadRequestError):
    """HELLO asked for a version of RESP that is neither 2 nor 3."""

    resp_code = "NOPROTO"


class _ExecAbortError(BadRequestError):
    """Nothing of a transaction was done."""

    resp_code = "EXECABORT"


_LOCAL: Final[Mapping[str, Callable[[Session, Argv], Reply]]] = {
    "PING": Session._ping,
    "ECHO": Session._echo,
    "SELECT": Session._select,
    "QUIT": Session._quit,
    "READONLY": Session._readonly,
    "READWRITE": Session._readwrite,
    "RESET": Session._reset,
    "TIME": Session._time,
    "HELLO": Session._hello,
    "CLIENT": Session._client,
    "COMMAND": Session._command,
    "CONFIG": Session._config,
    "ROLE": Session._role,
    "WAIT": Session._wait,
    "INFO": Session._info,
    "STATUS": Session._status,
    "CLUSTER": Session._cluster,
    "MEMBER": Session._member,
    "FAILOVER": Session._failover,
    "HELP": Session._help,
}


def _checked_name(name: bytes) -> bytes:
    if any(not 0x21 <= byte <= 0x7E for byte in name):
        raise BadRequestError("Client names cannot contain spaces, newlines or special characters.")
    return name


def _is_backup(item: Item) -> bool:
    return not isinstance(item, KVError) and [word.upper() for word in item] == [b"BACKUP"]


def _slot(argv: Argv) -> int:
    """The hash slot that MOVED names for cluster clients; there is one shard of all slots."""
    argv = kv_commands.acting(argv)
    keys = kv_commands.keys_of(kv_commands.lookup(argv), argv)
    return kv_commands.crc16_slot(keys[0]) if keys else 0


def _subcommands(name: str, words: str) -> Reply:
    return [SimpleString(line) for line in (f"{name} <subcommand>:", *words.split(), "HELP")]


# ---- The line language's replies ---------------------------------------------------------------


def _line_reply(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    """``version`` is the index of the entry that a write has become."""
    name = argv[0].upper().decode(errors="replace") if argv else ""
    if isinstance(reply, KVError):
        return _line_error(name, reply)
    if name in _LINE_REPLIES:
        return _LINE_REPLIES[name](argv, reply, version)
    return {"status": "OK", "value": line_value(reply)}


def _line_error(name: str, error: KVError) -> Mapping[str, object]:
    fields: dict[str, object] = {"status": "ERROR", "code": error.code, "message": str(error)}
    if isinstance(error, NotPrimaryError):
        what = kv_commands.COMMANDS.get(name)
        kind = "Reads" if what is not None and "read" in what.flags else "Writes"
        fields["message"] = f"This node is not primary. {kind} not allowed."
        fields["primary"] = {"node_id": error.node_id, "host": error.host, "port": error.port}
    elif isinstance(error, MismatchError):
        fields["version"] = error.version
    return fields


def _line_set(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    return {"status": "OK", "key": line_key(argv[1]), "version": version}


def _line_get(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    key = line_key(argv[1])
    if reply is None:
        return {"status": "NOT_FOUND", "key": key}
    assert isinstance(reply, list)
    value, version_of_value = reply
    return {"status": "OK", "key": key, "value": line_value(value), "version": version_of_value}


def _line_delete(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    return {"status": "OK" if reply else "NOT_FOUND", "deleted": reply}


def _line_exists(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    return {"status": "OK", "exists": bool(reply), "count": reply}


def _line_keys(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    assert isinstance(reply, list)
    return {"status": "OK", "keys": [line_key(key) for key in reply], "count": len(reply)}


def _line_cas(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    return {"status": "OK", "key": line_key(argv[1]), "version": reply}


def _line_session(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    if isinstance(reply, RepeatedReply):
        return _line_session(argv, reply.reply, reply.index)
    match argv[1].upper():
        case b"OPEN":
            return {"status": "OK", "session": reply}
        case b"CLOSE":
            return {"status": "OK", "closed": reply}
        case _:
            return _line_reply(kv_commands.acting(argv), reply, version)


def _line_json(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    assert isinstance(reply, bytes)
    fields: dict[str, object] = {"status": "OK"}
    fields.update(json.loads(reply))
    return fields


def _line_help(argv: Argv, reply: Reply, version: int) -> Mapping[str, object]:
    assert isinstance(reply, dict)
    commands = {usage.decode(): line_value(summary) for usage, summary in reply.items()}
    return {"status": "OK", "commands": commands}


_LINE_REPLIES: Final[Mapping[str, Callable[[Argv, Reply, int], Mapping[str, object]]]] = {
    "SET": _line_set,
    "GETS": _line_get,
    "DEL": _line_delete,
    "DELETE": _line_delete,
    "EXISTS": _line_exists,
    "KEYS": _line_keys,
    "CAS": _line_cas,
    "SESSION": _line_session,
    "STATUS": _line_json,
    "CLUSTER": _line_json,
    "MEMBER": _line_json,
    "FAILOVER": _line_json,
    "HELP": _line_help,
}
