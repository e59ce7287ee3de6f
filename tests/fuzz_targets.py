"""What is fuzzed, each with what it may do with any bytes at all.

| target | takes bytes as | must |
|---|---|---|
| requests | what a client sends | give the same requests and errors however the bytes are cut |
| commands | requests, each done on a store | answer each, in both languages; keep the state hash right |
| replies | what a server sends | give replies or ProtocolError, the same however they are cut |
| frames | what a peer sends after the handshake | give messages as they were sent, or FrameError |
| handshakes | a peer's first frame | give a Hello or Refused fit to print, or FrameError |
| log | one file of a log's directory | recover a beginning of the log, or raise DataDirError |
| sealed-log | the same with right checksums | recover some log, or raise DataDirError |
| state | state.db or its -wal | give the old state or the new one, or raise StateDbError |
| backup | a backup | restore that very state, or raise StateDbError |
| sealed-backup | the same under a right seal | the same: the sender's disk may be damaged |
| config | a settings file | give Settings, or raise ConfigError |
| client-port | what a client sends to a live node | go on serving others, memory flat |
| peer-port | the same at the port for peers | likewise |

``make`` gives the next input, ``change`` makes one from another, ``run`` raises for one that is not taken so, ``check`` after many.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Final, Self, cast

import replication_log
import state_db
from kv_commands import check, encode_payload
from kv_config import ConfigError, Settings, parse_settings
from kv_errors import KVError
from kv_protocol import RequestParser, encode_line, encode_reply, encode_request, line_value
from kv_store import ExpiredKeysError, KeyValueStore
from kv_types import Reply
from raft_frames import (
    PREFIX_BYTES,
    FrameError,
    Hello,
    Refused,
    decode_handshake,
    encode_handshake,
    encode_message,
    handshake_bytes_after,
)
from raft_snapshots import restore_backup
from raft_types import (
    AppendEntries,
    AppendReply,
    Entry,
    HardState,
    HashReport,
    Message,
    SnapshotChunk,
    VoteRequest,
    encode_entries,
)
from replication_log_format import (
    SEGMENT_HEADER_BYTES,
    DataDirError,
    encode_record,
    scan,
)
from state_db import StateDbError, verify_stream
from tests.cluster import SHORT_TIMERS, Cluster
from tests.fuzz_mutations import mutated
from tests.log_files import IDENTITY, VOTE, entries, entry, open_log, segments, write_log
from tests.states import NOW, State, copy_directory, flush, load, open_db, snapshot, state, write
from tests.test_kv_protocol import parse, parse_step_by_step, replies_of
from tests.test_kv_store_server import Baseline, exchange, receive_all
from tests.test_raft_frames import CLUSTER, MESSAGES, A, B, C, decode, decoder


class Target:
    """One place where bytes come in; open while it is in a ``with`` block."""

    name: ClassVar[str]
    choice_bytes: ClassVar[int] = 0  # at the beginning of an input: they choose what it is for
    is_live: ClassVar[bool] = False  # another process takes it

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self) -> None:
        """Make what the inputs are made of."""

    def close(self) -> None:
        """Leave nothing behind."""

    def make(self, rng: random.Random) -> bytes:
        """An input."""
        raise NotImplementedError

    def change(self, rng: random.Random, data: bytes) -> bytes:
        """Another input, made from one that reached something new."""
        return data[: self.choice_bytes] + mutated(rng, data[self.choice_bytes :], changes_max=3)

    def run(self, data: bytes) -> None:
        """Raises whatever there is to find."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises for what only many inputs together bring about."""


class _OnDisk(Target):
    """A target with a directory of its own."""

    directory: Path

    def open(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"kv-fuzz-{self.name}-"))

    def close(self) -> None:
        shutil.rmtree(self.directory)


def _joined(rng: random.Random, parts: Iterable[bytes], count_max: int = 6) -> bytes:
    return b"".join(rng.choices(list(parts), k=rng.randint(1, count_max)))


def _pieces(data: bytes) -> list[bytes]:
    """The data cut at places that follow from the data."""
    rng = random.Random(zlib.crc32(data))
    ends = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(1, 8)))
    return [data[start:end] for start, end in pairwise([0, *ends, len(data)])]


# ---- What clients send -------------------------------------------------------------------------

_TYPED: Final = """\
SET k v; GET k; SET k {"a": [1, 2.5, null]}; SET k v NX GET PX 100; SET k v IFEQ w; GETS k;
SETEX k 10 v; PSETEX k 10 v; SETNX k v; GETSET k v; GETDEL k; MSET a 1 b 2; MGET a b k; APPEND k x;
INCR n; INCRBY n 5; DECRBY n 9223372036854775807; DECR n; CAS k 3 v; DEL k n; DELETE k; UNLINK a b;
DELEX k IFEQ v; EXPIRE k 5 GT; PEXPIRE k -1; EXPIREAT k 9999999999; PEXPIREAT k 1 XX; PERSIST k;
TTL k; PTTL k; STRLEN k; EXISTS k n; TYPE k; KEYS *[a-c]?; DBSIZE; FLUSHALL ASYNC; PING; ECHO x;
SESSION OPEN; SESSION DO 1 1 1 APPEND s x; SESSION DO 1 2 1 INCR n; SESSION CLOSE 1; HELLO 3;
CLIENT SETNAME me; CONFIG GET max*; COMMAND DOCS get; SELECT 0; INFO; STATUS; CLUSTER; ROLE; HELP;
MULTI; QUIT; READONLY; WAIT 1 1; SENTINEL masters; MEMBER LIST; DISCARD; PURGE k 1; TIME; LOLWUT"""
_REQUESTS: Final = tuple(line.strip().encode() for line in _TYPED.split(";"))
_AS_RESP: Final = tuple(encode_request(line.split()) for line in _REQUESTS)
_AS_LINES: Final = tuple(line + b"\n" for line in _REQUESTS)
_CLIENT_WORDS: Final = (
    *(
        b"\r\n",
        b"\n",
        b"*1\r\n",
        b"$4\r\n",
        b"$-1\r\n",
        b"*0\r\n",
        b"$0\r\n\r\n",
        b'"',
        b"'",
        b"\\x",
    ),
    *(b"SESSION", b"DO", b"GET", b"NX", b"EX", b"[", b"[^-", b"-9223372036854775808", b"1e999"),
    *(b'{"a":', b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"POST / HTTP/1.1\r\n", b" "),
)


def _client_bytes(rng: random.Random) -> bytes:
    corpus = rng.choice((_AS_RESP, _AS_LINES))
    if rng.random() < 0.5:
        # One request with words from others: well-formed, so that it gets further.
        argv = rng.choice(_REQUESTS).split()
        for _ in range(rng.randint(0, 3)):
            word = rng.choice(
                (rng.choice(_CLIENT_WORDS), rng.choice(rng.choice(_REQUESTS).split()))
            )
            place = rng.randint(1, len(argv))
            argv[place : place + rng.randint(0, 1)] = [
                word
            ]  # before the one there, or in its place
        return _joined(rng, corpus) + encode_request(argv)
    return mutated(rng, _joined(rng, corpus), _CLIENT_WORDS)


class Requests(Target):
    """The parser of a node."""

    name = "requests"

    def make(self, rng: random.Random) -> bytes:
        return _client_bytes(rng)

    def run(self, data: bytes) -> None:
        for request_bytes_max in (60, 1 << 20):
            whole = parse([data], request_bytes_max)
            assert parse(_pieces(data), request_bytes_max) == whole, "cuts change the outcome"
            assert parse_step_by_step([data], request_bytes_max) == whole, "the short way differs"


class Commands(Target):
    """What is parsed is done, as a node does it: checked, through the log, applied, answered."""

    name = "commands"

    def make(self, rng: random.Random) -> bytes:
        return _client_bytes(rng)

    def run(self, data: bytes) -> None:
        parser = RequestParser(1 << 20)
        parser.feed(data)
        store, twin = KeyValueStore(), KeyValueStore()
        for both in (store, twin):
            for line in ("SET k v", "SET n 7 PX 1000", "SESSION OPEN", "SET a 1"):
                write(both, *line.encode().split())
        for number, item in enumerate(parser.take()):
            reply = item if isinstance(item, KVError) else self._do(store, twin, item, number)
            for protocol in (2, 3):
                encode_reply(reply, protocol, 1)
            encode_line({"value": line_value(reply)})
        assert store.state_hash == store.recompute_state_hash() == twin.state_hash

    @staticmethod
    def _do(store: KeyValueStore, twin: KeyValueStore, argv: list[bytes], number: int) -> Reply:
        try:
            command = check(argv)
        except KVError as error:
            return error
        if "write" in command.flags:
            payload = encode_payload(NOW + 100 * number, argv)
            reply = store.apply(store.applied_index + 1, payload)
            again = twin.apply(twin.applied_index + 1, payload)
            assert encode_reply(reply) == encode_reply(again), "two nodes answer differently"
            return reply
        if argv[0].upper() in store._reads:
            with contextlib.suppress(ExpiredKeysError):
                return store.read(argv, NOW + 100 * number)
        return None


class Replies(Target):
    """The parser of the client library."""

    name = "replies"
    _WORDS = (
        *(
            b"*2\r\n",
            b"%1\r\n",
            b">1\r\n",
            b"|1\r\n",
            b"~1\r\n",
            b"$2\r\nab\r\n",
            b"$-1\r\n",
            b"_\r\n",
        ),
        *(b"=5\r\ntxt:x\r\n", b"!3\r\nERR\r\n", b":1\r\n", b"+OK\r\n", b"-ERR x\r\n", b",1.5\r\n"),
        *(b"-MOVED 1 host:1\r\n", b"-MISMATCH 3 x\r\n", b"(12\r\n", b"#t\r\n", b"*0\r\n", b"\r\n"),
    )

    def make(self, rng: random.Random) -> bytes:
        data = _joined(rng, self._WORDS, 12)
        return mutated(rng, data, self._WORDS) if rng.random() < 0.8 else data

    def run(self, data: bytes) -> None:
        assert replies_of([data]) == replies_of(_pieces(data)), "cuts change the outcome"


# ---- What peers send ---------------------------------------------------------------------------


def _resealed(frame: bytes) -> bytes:
    """The frame with a length and a checksum that fit what it has become."""
    inner = struct.pack(">I", len(frame) - 4) + frame[4:-4]
    return inner + struct.pack(">I", zlib.crc32(inner))


class Frames(Target):
    """The decoder of a peer's messages."""

    name = "frames"
    _FRAMES = tuple(encode_message(CLUSTER, message) for message in MESSAGES)

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutated(rng, _joined(rng, self._FRAMES, 4))
        frame = rng.choice(self._FRAMES)
        # The header stays, or nothing behind it would ever be looked at.
        changed = _resealed(frame[:30] + mutated(rng, frame[30:-4]) + bytes(4))
        return rng.choice(self._FRAMES) + changed + rng.choice(self._FRAMES)

    def run(self, data: bytes) -> None:
        whole = self._taken([data])
        assert self._taken(_pieces(data)) == whole, "cuts change the outcome"
        for message in whole:
            if not isinstance(message, str):
                assert decode(encode_message(CLUSTER, message)) == [message]

    @staticmethod
    def _taken(pieces: Iterable[bytes]) -> list[Message | str]:
        frames = decoder()
        taken: list[Message | str] = []
        try:
            for piece in pieces:
                frames.feed(piece)
                taken += frames.take()
        except FrameError as error:
            taken.append(str(error))
        return taken


class Handshakes(Target):
    """The decoder of what a stranger says first."""

    name = "handshakes"
    _GREETINGS = (
        encode_handshake(Hello(CLUSTER, A, B, C, True, "node-ä", "host.example", 16379)),
        encode_handshake(Refused(CLUSTER, A, B, C, "no")),
    )

    def make(self, rng: random.Random) -> bytes:
        greeting = rng.choice(self._GREETINGS)
        if rng.random() < 0.3:
            return mutated(rng, greeting)
        return _resealed(greeting[:6] + mutated(rng, greeting[6:-4])[:1000] + bytes(4))

    def run(self, data: bytes) -> None:
        if len(data) < PREFIX_BYTES:
            return
        try:
            length = handshake_bytes_after(data[:PREFIX_BYTES])
            if len(data) < PREFIX_BYTES + length:
                return
            greeting = decode_handshake(data[: PREFIX_BYTES + length])
        except FrameError as error:
            assert str(error)
            return
        text = greeting.node_id + greeting.host if isinstance(greeting, Hello) else greeting.reason
        assert not text or text.isprintable()


# ---- The log -----------------------------------------------------------------------------------


class Log(_OnDisk):
    """A log's directory, one file of which is damaged; an input names it by its first two bytes."""

    name = "log"
    choice_bytes = 2

    def open(self) -> None:
        super().open()
        replication_log._ZEROS_BYTES = 2048
        batches = ([entry(1)], entries(2, 3), [entry(4, data=b"x" + bytes(700))], entries(5, 9))
        self._logs = []
        for number, segment_bytes_max in enumerate((64 << 20, 300)):
            directory = self.directory / str(number)
            write_log(directory, *batches, segment_bytes_max=segment_bytes_max)
            with open_log(directory, segment_bytes_max=segment_bytes_max) as log:
                log.append(HardState(2, None), [entry(8, term=2)])
            files = [directory / "identity.json", *segments(directory)]
            self._logs.append((directory, [path.name for path in files]))
        # After each record: where records are cut off without a trace, what is left is a log.
        self._tails: list[list[Entry]] = [[]]
        for batch in (*batches, [entry(8, term=2)]):
            self._tails.append([*self._tails[-1][: batch[0].index - 1], *batch])

    def close(self) -> None:
        replication_log._ZEROS_BYTES = 256 << 10
        super().close()

    def make(self, rng: random.Random) -> bytes:
        number = rng.randrange(len(self._logs))
        directory, names = self._logs[number]
        which = rng.randrange(len(names))
        content = (directory / names[which]).read_bytes()
        return bytes((number, which)) + self._damaged(rng, content)

    @staticmethod
    def _damaged(rng: random.Random, content: bytes) -> bytes:
        return mutated(rng, content, changes_max=3)

    def run(self, data: bytes) -> None:
        copy = self._copy(data)
        try:
            with open_log(copy) as log:
                if log.identity == IDENTITY:
                    tail = list(log.recovered.tail)
                    assert tail in self._tails, f"recovered {tail}"
                    assert log.recovered.hard_state in (
                        HardState(0, None),
                        VOTE,
                        HardState(2, None),
                    )
                    log.append(HardState(3, None), [entry(len(tail) + 1, term=3)])
                else:
                    raise AssertionError(f"the identity became {log.identity}")
        except DataDirError as error:
            assert str(copy) in str(error)

    def _copy(self, data: bytes) -> Path:
        directory, names = self._logs[data[0]]
        copy = copy_directory(directory, self.directory / "copy")
        (copy / names[data[1]]).write_bytes(data[2:])
        return copy


class SealedLog(Log):
    """The same, but what is damaged has right checksums: another program wrote it, or a bug."""

    name = "sealed-log"

    def make(self, rng: random.Random) -> bytes:
        directory, names = self._logs[0]
        which = 1
        path = directory / names[which]
        content = path.read_bytes()
        with path.open("rb") as file:
            records = list(scan(path, file.fileno(), len(content)))
        damaged = rng.randrange(len(records) + 1)
        parts = [content[:SEGMENT_HEADER_BYTES]]
        if damaged == len(records):
            header = mutated(rng, parts[0][8:-4], changes_max=2)[: SEGMENT_HEADER_BYTES - 12]
            fields = parts[0][:8] + header.ljust(SEGMENT_HEADER_BYTES - 12, b"\0")
            parts[0] = fields + zlib.crc32(fields).to_bytes(4, "big")
        for number, (_offset, _size, kind, payload) in enumerate(records):
            if number == damaged:
                payload = mutated(rng, payload, changes_max=2)
                kind = rng.choice((kind, kind, kind, 0, 1, 2))
            record = bytearray(encode_record(None, payload))
            struct.pack_into(">I", record, 4, kind)
            record[12:16] = zlib.crc32(record[:12]).to_bytes(4, "big")
            parts.append(bytes(record))
        return bytes((0, which)) + b"".join(parts)

    def run(self, data: bytes) -> None:
        copy = self._copy(data)
        with contextlib.suppress(DataDirError), open_log(copy) as log:
            found = log.recovered
            indexes = [one.index for one in found.tail]
            terms = [one.term for one in found.tail]
            assert indexes == list(range(found.last_index - len(indexes) + 1, found.last_index + 1))
            assert terms == sorted(terms)
            assert not terms or terms[-1] <= found.hard_state.term
            encode_entries(found.tail)


# ---- State and backup --------------------------------------------------------------------------


def _filled_store() -> KeyValueStore:
    store = KeyValueStore()
    for number in range(40):
        write(store, b"SET", b"key%d" % number, b"%d" % number * 9)
    write(store, b"SET", b"long", b"0123456789" * 450, b"PX", b"5000")
    for line in ("SESSION OPEN", "SESSION DO 42 1 1 APPEND key39 9"):
        write(store, *line.encode().split())
    return store


class StateFile(_OnDisk):
    """A member's state, of which a file is damaged; an input's first byte says which."""

    name = "state"
    choice_bytes = 1
    _NAMES = ("state.db", "state.db-wal")

    def open(self) -> None:
        super().open()
        (self.directory / "node").mkdir()
        store = _filled_store()
        with open_db(self.directory / "node") as db:
            flush(store, db)
            for number in range(20):
                write(store, b"DEL", b"key%d" % number)
            flush(store, db)
            self._old = state(store)
            write(store, b"SET", b"key30", b"new")
            # Killed between commit and checkpoint, so that the last save is in the -wal only.
            original, state_db.failpoint = state_db.failpoint, self._kill
            try:
                flush(store, db)
            finally:
                state_db.failpoint = original
            self._new = state(store)

    def _kill(self, name: str) -> None:
        if name == "save-committed":
            copy_directory(self.directory / "node", self.directory / "killed")

    def make(self, rng: random.Random) -> bytes:
        which = rng.randrange(2)
        content = (self.directory / "killed" / self._NAMES[which]).read_bytes()
        return bytes((which,)) + mutated(rng, content, changes_max=3)

    def run(self, data: bytes) -> None:
        copy = copy_directory(self.directory / "killed", self.directory / "copy")
        (copy / self._NAMES[data[0]]).write_bytes(data[1:])
        try:
            found: State | None = state(load(copy))
        except StateDbError:
            found = None
        assert found in (None, self._old, self._new), "another state"


class Backup(_OnDisk):
    """A backup that is checked and restored."""

    name = "backup"

    def open(self) -> None:
        super().open()
        (self.directory / "node").mkdir()
        store = _filled_store()
        with open_db(self.directory / "node") as db:
            flush(store, db)
            self._good = snapshot(db)
        self._state = state(store)

    def make(self, rng: random.Random) -> bytes:
        return mutated(rng, self._good, changes_max=3)

    def run(self, data: bytes) -> None:
        path = self.directory / "backup"
        path.write_bytes(data)
        try:
            verify_stream(path)
            verified = True
        except StateDbError:
            verified = False
        assert self._restored(path) == (self._state if verified else None)

    def _restored(self, path: Path) -> State | None:
        directory = self.directory / "new"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        with open_log(directory) as log, open_db(directory) as db:
            try:
                restore_backup(path, log, db)
            except StateDbError:
                assert state(db.load()[1]) == state(KeyValueStore()), "a part of it was taken"
                return None
            return state(db.load()[1])


class SealedBackup(Backup):
    """One that was damaged before it was sealed."""

    name = "sealed-backup"

    def make(self, rng: random.Random) -> bytes:
        path = self.directory / "made"
        path.write_bytes(mutated(rng, self._good[: -state_db._SEAL.size], changes_max=3))
        fd = os.open(path, os.O_RDWR)
        state_db.SnapshotReader(state_db.StateHeader(), fd).close()
        return path.read_bytes()


# ---- Settings ----------------------------------------------------------------------------------


class Config(_OnDisk):
    """A settings file."""

    name = "config"
    _LINES = (
        *(b'node-id = "node2"', b'host = "::1"', b"port = 6380", b"peer_port = 16380"),
        *(b"primary = true", b'join = ["a:1", "[::1]:2"]', b'join = "a:1,b:2"', b'data-dir = "d"'),
        *(b'replication = "async"', b'fsync = "no"', b"in-memory = false", b"learner = true"),
        *(b"heartbeat-interval = 0.5", b'election-timeout = "2-3"', b"max-clients = 10"),
        *(b'max-memory = "1gb"', b"max-request-bytes = 0x1000", b'log-level = "debug"'),
        *(b'max-log = "64 MiB"', b'advertise-host = "10.0.0.1"', b"[table]", b"a.b = 1"),
    )
    _WORDS = (
        *(b"[", b"{", b"{a=", b'"', b"'''", b"inf", b"nan", b"-1", b"1e400", b"0x" + b"f" * 4000),
        *(
            b"1979-05-27",
            b"\\u0000",
            b"\\ud800",
            b"true",
            b"=",
            b"\n",
            b"#",
            b"[[a]]",
            b"\xff",
            b"a.",
        ),
    )

    def make(self, rng: random.Random) -> bytes:
        lines = b"\n".join(rng.sample(self._LINES, rng.randint(1, 4)))
        if rng.random() < 0.3:
            line = rng.choice(self._LINES).partition(b"=")[0]
            lines += b"\n%b = %b" % (line.strip() or b"x", rng.choice(self._WORDS))
        return mutated(rng, lines, self._WORDS) if rng.random() < 0.8 else lines

    def run(self, data: bytes) -> None:
        path = self.directory / "settings.toml"
        path.write_bytes(data)
        try:
            settings = parse_settings(["--config", str(path)], {})
        except ConfigError as error:
            assert str(error)
        else:
            assert isinstance(settings, Settings)
            str(settings)


# ---- A live node -------------------------------------------------------------------------------

_ENDS: Final = ("read", "half", "drop", "reset")


class ClientPort(Target):
    """One node, many connections; an input's first byte says how its connection ends."""

    name = "client-port"
    is_live = True
    # What would change the cluster, or write a file, stays out.
    _ARGS = (
        *SHORT_TIMERS,
        "--max-request-bytes",
        "1MiB",
        "--max-memory",
        "8MiB",
        "--max-log",
        "1MiB",
    )

    def open(self) -> None:
        self._cluster = Cluster(*self._ARGS, nodes=1)
        self._cluster.__enter__()
        self._address = self._cluster.address("node1")
        self._prepare()
        self._baseline = Baseline(self._cluster)

    def close(self) -> None:
        self._cluster.close()

    def _prepare(self) -> None:
        """The first time of everything, which takes memory that stays."""
        for data in (*_AS_RESP, *_AS_LINES):
            self._send(self._address, data, "read")

    def make(self, rng: random.Random) -> bytes:
        return rng.randbytes(1) + _client_bytes(rng)

    def run(self, data: bytes) -> None:
        self._send(self._address, data[1:], _ENDS[data[0] % len(_ENDS)])
        assert exchange(self._address, b"PING\n").startswith(b'{"status": "OK"')

    @staticmethod
    def _send(address: tuple[str, int], data: bytes, end: str) -> None:
        with socket.create_connection(address, timeout=10) as sock:
            try:
                for piece in _pieces(data):
                    sock.sendall(piece)
                if end in ("read", "half"):
                    sock.shutdown(socket.SHUT_WR)
                    receive_all(sock)  # ends, or times out: then the server hangs
                elif end == "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            except TimeoutError:
                raise
            except OSError:
                pass  # cut off, which is an answer

    def check(self) -> None:
        self._cluster.primary()  # a disk that was slow for a moment makes it give way
        assert self._cluster.ask("node1", "SET after fuzzing")["status"] == "OK"
        self._cluster.ask("node1", "DELETE after")
        with self._cluster.resp("node1") as connection:
            assert connection.ask("FLUSHALL") == "OK"
        self._baseline.check()
        log = self._cluster.node("node1").log.read_text(errors="replace")
        assert "Traceback" not in log, log[log.index("Traceback") - 200 :][:3000]


class PeerPort(ClientPort):
    """The same at the other port; half of the callers know the cluster's id and the member's.

    A peer that has said Hello is believed (Raft tolerates crashes, not lies). So whatever arrives
    whole here is of a term before all others, which does nothing.
    """

    name = "peer-port"

    def _prepare(self) -> None:
        super()._prepare()
        node, status = self._cluster.node("node1"), self._cluster.ask("node1", "STATUS")
        cluster, member = cast(str, status["cluster_id"]), cast(str, status["member_id"])
        self._address = (node.address[0], node.peer_port)
        self._hello = encode_handshake(Hello(cluster, A, member, C, False, "x", "127.0.0.1", 1))
        messages: list[Message] = [
            AppendEntries(A, member, 0, 7, 0, tuple(entries(8, 9, term=0)), 6, 11),
            AppendReply(A, member, 0, False, 0, 11, 7, 5, 2),
            VoteRequest(A, member, 0, 8, 3, True),
            HashReport(A, member, 0, 8, 2**64 - 1, True),
            SnapshotChunk(A, member, 0, 2**64 - 1, 0, b"state", True),
        ]
        self._frames = [encode_message(cluster, message) for message in messages]
        self._send(self._address, self._hello + self._frames[1], "half")

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            # Whole, so that what follows is looked at.
            return rng.randbytes(1) + self._hello + mutated(rng, _joined(rng, self._frames))
        return rng.randbytes(1) + mutated(rng, self._hello + _joined(rng, self._frames))

    def run(self, data: bytes) -> None:
        self._send(self._address, data[1:], _ENDS[data[0] % len(_ENDS)])
        assert self._cluster.ask("node1", "PING")["status"] == "OK"


_ALL: Final[tuple[type[Target], ...]] = (
    *(Requests, Commands, Replies, Frames, Handshakes, Log, SealedLog, StateFile, Backup),
    *(SealedBackup, Config, ClientPort, PeerPort),
)
TARGETS: Final[dict[str, type[Target]]] = {target.name: target for target in _ALL}
