"""The replicated state: keys, values, versions and deadlines, changed only by log entries in order.

Rule 1: ``apply`` is a pure function of the state and the entry: no clock, no chance, no float and
no order of a dict takes part, so equal logs make equal states on every node (raft-traps T58).
Rule 2: time in ``apply`` is the entry's own stamp and never goes back. A key whose deadline has
passed by it is absent for that entry, and is deleted when the entry touches it.
Rule 3: a read deletes nothing and never calls a key expired by itself. It raises
``ExpiredKeysError``; the server lets a PURGE through the log decide, then reads again. So what one
reader was told stays true on every later primary, whatever its clock says (promise G5).
Rule 4: what changes nothing leaves version and hash alone. What changes a key gives it the log
index as its version, be it the value or the deadline that changed.
Rule 5: what a flush hands out is the state at its begin, whatever is applied while it runs: a row
that changes before it was handed out is kept aside as it was.
Rule 6: what a client sent twice under one serial is done once, here and nowhere else: the log may
hold it twice, and any primary may be asked again. See ``kv_client_sessions.py``.

No lock of its own: everything runs under the caller's store lock, ``apply`` and ``skip`` on
raft-applier, ``read`` on client threads. One-key reads too: a reader that got in between the keys
of an MSET would see half of an entry.
Read on in ``kv_commands.py`` for the syntax of the commands, in ``raft_node.py`` for the caller,
and in ``state_db.py`` for where a flush goes.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

from kv_client_sessions import ClientSessions, Write
from kv_commands import (
    INT64_MAX,
    INT64_MIN,
    ExpireOptions,
    check,
    compile_glob,
    decode_payload,
    lookup,
    parse_delex,
    parse_expected_version,
    parse_expire,
    parse_increment,
    parse_int,
    parse_set,
    wrong_arity,
)
from kv_errors import BadRequestError, KVError, MismatchError, NoSessionError, TooLargeError
from kv_types import OK, Reply, SimpleString

# Redis' own limit for a string (proto-max-bulk-len).
VALUE_BYTES_MAX: Final = 512 * 1024 * 1024
# How far back ``hash_at`` remembers: more than a follower that is being compared may lag.
HISTORY_ENTRIES: Final = 8192
# What one PURGE deletes at most: a KEYS over more of them takes several rounds. Keys may be large,
# and an entry of the log has to fit into a frame; one key always does, for it came in a request.
EXPIRED_PAIRS_MAX: Final = 1000
EXPIRED_KEYS_BYTES_MAX: Final = 1024 * 1024

# What a key takes beside the bytes of key and value: two bytes objects, an int, and its share of
# two dicts (which are between half and three quarters full). Calibrated against the RSS.
RECORD_OVERHEAD_BYTES: Final = 240
# The same for a deadline: an int, its share of a second dict, and a tuple in the heap.
DEADLINE_OVERHEAD_BYTES: Final = 165

# What a flush hands out under one hold of the store lock: about 0.3 ms worth.
FLUSH_ROWS_MAX: Final = 500
# Sessions may be large, if seldom: kv_client_sessions.ANSWERS_BYTES_MAX each.
FLUSH_SESSIONS_MAX: Final = 20

_NO_DEADLINE: Final = 0  # a stored deadline is later than some stamp, so never 0
_HEAP_SLACK: Final = 1000

_Argv = Sequence[bytes]
_Read = Callable[[_Argv, int], Reply]  # argv, now in ms


class ExpiredKeysError(Exception):
    """A read depends on keys that are due but still stored: PURGE ``pairs``, then read again."""

    def __init__(self, pairs: Sequence[tuple[bytes, int]]) -> None:
        super().__init__(f"{len(pairs)} keys are due to be purged")
        self.pairs = pairs  # key, deadline in ms


def _for_one_purge(pairs: Iterable[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    """The first of these, at least one, whose keys make an entry of a bearable size."""
    taken: list[tuple[bytes, int]] = []
    room_bytes = EXPIRED_KEYS_BYTES_MAX
    for pair in pairs:
        room_bytes -= len(pair[0])
        if taken and room_bytes < 0:
            break
        taken.append(pair)
    return taken


def purge_request(pairs: Iterable[tuple[bytes, int]]) -> list[bytes]:
    """The PURGE command for keys and their deadlines, as the primary proposes it."""
    request = [b"PURGE"]
    for key, deadline_ms in pairs:
        request += (key, b"%d" % deadline_ms)
    return request


# The length of the key in front makes the encoding unambiguous.
_pack_hash_header = struct.Struct(">IQQ").pack
_unpack_hash = struct.Struct(">Q").unpack
_HASH_MASK: Final = 2**64 - 1


def _record_hash(key: bytes, value: bytes, version: int, deadline_ms: int) -> int:
    header = _pack_hash_header(len(key), version, deadline_ms)
    number: int = _unpack_hash(blake2b(header + key + value, digest_size=8).digest())[0]
    return number


# ---- The state as rows, for the disk -----------------------------------------------------------

KeyRow = tuple[bytes, int, int, bytes]  # key, version, deadline in ms (0: none), value
SessionRow = tuple[int, bytes]  # session id, what is known of the session


class Table(StrEnum):
    """The kinds of rows."""

    KEY = "key"
    SESSION = "session"


class Slice(NamedTuple):
    """Rows to put in place of those with the same key, and keys whose rows are to be deleted."""

    table: Table
    rows: Sequence[KeyRow | SessionRow]
    gone: Sequence[bytes | int]
    clear: bool = False  # first, all rows of the table go


_K = TypeVar("_K", bound=bytes | int)


class _TableFlush(Generic[_K]):
    """What a flush has to say of one table; ``row`` gives a key's row as it is, None if it is gone."""

    def __init__(
        self,
        table: Table,
        keys: dict[_K, None],
        clear: bool,
        row: Callable[[_K], KeyRow | SessionRow | None],
    ) -> None:
        self.table = table
        self.keys = keys  # never changed while the flush runs
        self.clear = clear
        self._row = row
        self._left = iter(keys)
        # Rows of ``keys`` as they were before they changed during this flush. A key that was taken
        # before gets one too, which nobody reads: to tell would cost more.
        self._kept: dict[_K, KeyRow | SessionRow | None] = {}

    def keep(self, key: _K) -> None:
        """The row of ``key`` is about to change."""
        if key in self.keys and key not in self._kept:
            self._kept[key] = self._row(key)

    def take(self, count: int) -> Slice | None:
        """The next rows; None after the last."""
        kept, read = self._kept, self._row
        rows, gone = [], []
        for key in islice(self._left, count):
            row = kept[key] if key in kept else read(key)
            if row is None:
                gone.append(key)
            else:
                rows.append(row)
        return Slice(self.table, rows, gone) if rows or gone else None


class _Changes(Generic[_K]):
    """Which rows of one table have changed since the last flush began."""

    def __init__(self, table: Table) -> None:
        self._table = table
        # As a set in the order of changes: keys and values made one after the other lie side by
        # side in memory, so a flush in this order takes half the time.
        self._keys: dict[_K, None] = {}
        self._cleared = False  # all rows went; ``_keys`` counts from there
        self._flush: _TableFlush[_K] | None = None

    def touch(self, key: _K) -> None:
        """The row of ``key`` is about to change."""
        if self._flush is not None:
            self._flush.keep(key)
        self._keys[key] = None

    def clear(self) -> None:
        """All rows have gone; a flush under way has them still."""
        self._keys = {}
        self._cleared = True

    def begin(self, row: Callable[[_K], KeyRow | SessionRow | None]) -> _TableFlush[_K]:
        """What has changed, to be handed out; from here on changes are counted anew."""
        self._flush = flush = _TableFlush(self._table, self._keys, self._cleared, row)
        self._keys = {}
        self._cleared = False
        return flush

    def end(self, flush: _TableFlush[_K], saved: bool) -> None:
        """``flush`` is over; if it was not saved, what it had to say is to be said again."""
        self._flush = None
        if saved or self._cleared:  # cleared since: what was before is no news any more
            return
        self._cleared = flush.clear
        # The fewer are added to the more: a million at once would hold the lock for a while.
        small, large = sorted((self._keys, flush.keys), key=len)
        large.update(small)
        self._keys = large


class Flush:
    """The rows that have changed since the last flush, as they were when this one began."""

    def __init__(
        self, store: KeyValueStore, keys: _TableFlush[bytes], sessions: _TableFlush[int]
    ) -> None:
        self.applied_index = store.applied_index
        self.last_stamp_ms = store.last_stamp_ms
        self.state_hash = store.state_hash
        self.key_count = len(store)
        self.keys = keys
        self.sessions = sessions

    def slices(
        self, lock: AbstractContextManager[object], rows_max: int = FLUSH_ROWS_MAX
    ) -> Iterator[Slice]:
        """All rows, a table after the other, each slice taken under ``lock`` (the store lock)."""
        yield from _slices(self.keys, lock, rows_max)
        yield from _slices(self.sessions, lock, min(rows_max, FLUSH_SESSIONS_MAX))


def _slices(
    table: _TableFlush[_K], lock: AbstractContextManager[object], rows_max: int
) -> Iterator[Slice]:
    if table.clear:
        yield Slice(table.table, (), (), clear=True)
    while True:
        with lock:
            part = table.take(rows_max)
        if part is None:
            return
        yield part


def _key_row(
    values: dict[bytes, bytes],
    versions: dict[bytes, int],
    deadlines: dict[bytes, int],
    key: bytes,
) -> KeyRow | None:
    value = values.get(key)
    if value is None:
        return None
    return key, versions[key], deadlines.get(key, _NO_DEADLINE), value


# ---- The state machine -------------------------------------------------------------------------


class KeyValueStore:
    """The state machine: ``apply`` the log's commands in order, ``read`` what they made.

    All commands follow Redis 7; CAS drops a key's expiry, as SET does.
    """

    def __init__(self) -> None:
        self.applied_index = 0
        self._session_changes: _Changes[int] = _Changes(Table.SESSION)
        self.sessions = ClientSessions(self._session_changes.touch)
        self.last_stamp_ms = 0  # the latest stamp applied; Unix time
        # Sum over all keys of _record_hash, and of the sessions' hashes, modulo 2^64: free of
        # order, and changed key by key.
        self.state_hash = 0
        self._keys_bytes = 0  # an estimate of what the keys take
        # Invariant: both have the same keys. Two dicts of bytes and int, not one of pairs: the garbage
        # collector need not look at them, which for a million pairs takes a tenth of a second, and
        # 30 ms for 20,000 that have changed since it last looked.
        self._values: dict[bytes, bytes] = {}
        self._versions: dict[bytes, int] = {}
        # Invariant: the keys here are in _values too.
        self._deadlines: dict[bytes, int] = {}
        # (deadline, key), the earliest first. Holds every pair of _deadlines, and stale ones, which
        # are told by not being in _deadlines and are at most as many again plus _HEAP_SLACK.
        self._heap: list[tuple[int, bytes]] = []
        self._hides_due = False  # within ``read_stale``
        # state_hash after the entry ``index``, in slot index % HISTORY_ENTRIES.
        self._history = [0] * HISTORY_ENTRIES
        self._history_first = 0  # what was before is not known
        self._changes: _Changes[bytes] = _Changes(Table.KEY)
        self._flush: Flush | None = None
        self._writes: dict[bytes, Write] = {
            b"SET": self._set,
            b"SETNX": self._setnx,
            b"SETEX": self._setex,
            b"PSETEX": self._setex,
            b"GETSET": self._getset,
            b"GETDEL": self._getdel,
            b"MSET": self._mset,
            b"APPEND": self._append,
            b"INCR": self._increment,
            b"DECR": self._increment,
            b"INCRBY": self._increment,
            b"DECRBY": self._increment,
            b"CAS": self._cas,
            b"DEL": self._del,
            b"DELETE": self._del,
            b"UNLINK": self._del,
            b"DELEX": self._delex,
            b"EXPIRE": self._expire,
            b"PEXPIRE": self._expire,
            b"EXPIREAT": self._expire,
            b"PEXPIREAT": self._expire,
            b"PERSIST": self._persist,
            b"PURGE": self._purge,
            b"FLUSHALL": self._flushall,
            b"SESSION": self._session,
        }
        self._reads: dict[bytes, _Read] = {
            b"GET": self._get,
            b"GETS": self._gets,
            b"STRLEN": self._strlen,
            b"MGET": self._mget,
            b"EXISTS": self._exists,
            b"TYPE": self._type,
            b"TTL": self._ttl,
            b"PTTL": self._pttl,
            b"KEYS": self._keys,
            b"DBSIZE": self._dbsize,
        }

    def __len__(self) -> int:
        return len(self._values)

    @property
    def expiring_count(self) -> int:
        """How many keys have a deadline."""
        return len(self._deadlines)

    @property
    def memory_bytes(self) -> int:
        """An estimate of what keys and sessions take, for --max-memory."""
        return self._keys_bytes + self.sessions.memory_bytes

    # ---- The log ----

    def apply(self, index: int, data: bytes) -> Reply:
        """The reply to the command in ``data``, which is entry ``index`` of the log.

        A KVError is returned as the reply. Raises ValueError for a payload that is not a write
        command: no client can bring one about, so this node is older than the log, or broken.
        """
        assert index == self.applied_index + 1, (index, self.applied_index)
        now_ms, argv, once = decode_payload(data)
        if now_ms > self.last_stamp_ms:
            self.last_stamp_ms = now_ms
        else:
            now_ms = self.last_stamp_ms
        if now_ms >= self.sessions.expires_ms:
            self._add_to_hash(self.sessions.expire(now_ms))
        name = argv[0].upper()
        handler = self._writes.get(name)
        if handler is None:
            raise ValueError(f"entry {index} holds the unknown command {argv[0][:80]!r}")
        reply: Reply
        try:
            # It was checked before it was proposed. Yet arity here and syntax in the handlers are
            # looked at again: a fault that slipped through would stop every node at this entry.
            if name != b"PURGE":  # which is not for clients, so ``lookup`` does not know it
                lookup(argv)
            if once is None:
                reply = handler(argv, now_ms, index)
            else:
                reply, change = self.sessions.do_once(once, handler, argv, now_ms, index)
                self.state_hash = (self.state_hash + change) & _HASH_MASK
        except KVError as error:
            reply = error
        self._history[index % HISTORY_ENTRIES] = self.state_hash
        self.applied_index = index
        return reply

    def skip(self, index: int) -> None:
        """Counts entry ``index``, which is not a command, as applied."""
        assert index == self.applied_index + 1, (index, self.applied_index)
        self._history[index % HISTORY_ENTRIES] = self.state_hash
        self.applied_index = index

    def hash_at(self, index: int) -> int | None:
        """``state_hash`` after entry ``index``; None if not applied yet, or too long ago."""
        first = max(self._history_first, self.applied_index - HISTORY_ENTRIES + 1)
        if first <= index <= self.applied_index:
            return self._history[index % HISTORY_ENTRIES]
        return None

    def recompute_state_hash(self) -> int:
        """``state_hash`` from scratch, for audits; takes about a second per million keys."""
        versions, deadlines = self._versions, self._deadlines
        total = sum(
            _record_hash(key, value, versions[key], deadlines.get(key, _NO_DEADLINE))
            for key, value in self._values.items()
        )
        return (total + self.sessions.recompute_state_hash()) & _HASH_MASK

    # ---- To the disk and back ----

    def begin_flush(self) -> Flush:
        """The state as it is now, less what was in it at the last flush that was saved.

        Takes no longer for more keys. One flush at a time: it lasts until ``end_flush``.
        """
        assert self._flush is None, "a flush is under way"
        row = partial(_key_row, self._values, self._versions, self._deadlines)
        self._flush = Flush(
            self, self._changes.begin(row), self._session_changes.begin(self.sessions.row)
        )
        return self._flush

    def end_flush(self, *, saved: bool) -> None:
        """The flush is over. What was not saved is part of the next one."""
        assert self._flush is not None
        self._changes.end(self._flush.keys, saved)
        self._session_changes.end(self._flush.sessions, saved)
        self._flush = None

    @classmethod
    def load(
        cls,
        applied_index: int,
        last_stamp_ms: int,
        keys: Iterable[KeyRow],
        sessions: Iterable[SessionRow] = (),
    ) -> KeyValueStore:
        """The state that flushes up to ``applied_index`` have saved.

        Compare its ``state_hash``, which is made anew, with what the flush had. Raises TypeError,
        ValueError or struct.error for rows that no flush hands out.
        """
        store = cls()
        values, versions, deadlines = store._values, store._versions, store._deadlines
        state_hash = memory_bytes = 0
        for key, version, deadline_ms, value in keys:
            values[key] = value
            versions[key] = version
            if deadline_ms != _NO_DEADLINE:
                deadlines[key] = deadline_ms
            state_hash += _record_hash(key, value, version, deadline_ms)
            memory_bytes += len(key) + len(value)
        store.applied_index = store._history_first = applied_index
        store.last_stamp_ms = last_stamp_ms
        store.sessions.load(sessions)
        store.state_hash = (state_hash + store.sessions.state_hash()) & _HASH_MASK
        store._keys_bytes = (
            memory_bytes
            + len(values) * RECORD_OVERHEAD_BYTES
            + len(deadlines) * DEADLINE_OVERHEAD_BYTES
        )
        store._heap = [(deadline_ms, key) for key, deadline_ms in deadlines.items()]
        heapq.heapify(store._heap)
        store._history[applied_index % HISTORY_ENTRIES] = store.state_hash
        return store

    def adopt(self, other: KeyValueStore) -> None:
        """Become ``other``, a state that was received, which nobody uses any more."""
        commands = self._writes, self._reads  # the methods of this one
        self.__dict__.update(other.__dict__)
        self._writes, self._reads = commands

    # ---- Reads and expiry ----

    def read(self, argv: _Argv, now_ms: int) -> Reply:
        """The reply to a read command that has passed ``kv_commands.check``.

        ``now_ms`` is the reader's clock; the latest stamp applied counts where that is later.
        Raises ExpiredKeysError.
        """
        return self._reads[argv[0].upper()](argv, max(now_ms, self.last_stamp_ms))

    def read_stale(self, argv: _Argv, now_ms: int) -> Reply:
        """``read`` where nothing can be purged: what is due is not shown, and may come back.

        For who asks a secondary and takes what it gets: promise G5 is the primary's.
        """
        self._hides_due = True
        try:
            return self.read(argv, now_ms)
        finally:
            self._hides_due = False

    def due(self, now_ms: int, limit: int) -> list[tuple[bytes, int]]:
        """Keys whose deadline has passed, with it, the earliest first: what one PURGE may delete.

        At most ``limit``, and EXPIRED_KEYS_BYTES_MAX of keys, but for a first one that is longer.
        """
        now_ms = max(now_ms, self.last_stamp_ms)
        heap = self._heap
        found: list[tuple[int, bytes]] = []
        while heap and heap[0][0] <= now_ms and len(found) < limit:
            pair = heapq.heappop(heap)
            deadline_ms, key = pair
            # A pair pushed twice comes twice in a row.
            if self._deadlines.get(key) == deadline_ms and (not found or found[-1] != pair):
                found.append(pair)
        # They stay until a PURGE has been applied: the caller's proposal may fail.
        for pair in found:
            heapq.heappush(heap, pair)
        return _for_one_purge((key, deadline_ms) for deadline_ms, key in found)

    # ---- Changes: every one goes through these ----

    def _live(self, key: bytes, now_ms: int) -> bytes | None:
        """The value that an entry of this effective now finds; deletes the key if it is due."""
        deadline_ms = self._deadlines.get(key)
        if deadline_ms is not None and deadline_ms <= now_ms:
            self._drop(key)
            return None
        return self._values.get(key)

    def _put(self, key: bytes, value: bytes, version: int, deadline_ms: int = _NO_DEADLINE) -> None:
        self._changes.touch(key)
        change = _record_hash(key, value, version, deadline_ms)
        old_value = self._values.get(key)
        if old_value is None:
            had_deadline = False
            self._keys_bytes += RECORD_OVERHEAD_BYTES + len(key) + len(value)
        else:
            old_version = self._versions[key]
            old_deadline_ms = self._deadlines.get(key, _NO_DEADLINE)
            had_deadline = old_deadline_ms != _NO_DEADLINE
            self._keys_bytes += len(value) - len(old_value)
            change -= _record_hash(key, old_value, old_version, old_deadline_ms)
        self.state_hash = (self.state_hash + change) & _HASH_MASK
        self._values[key] = value
        self._versions[key] = version
        if deadline_ms != _NO_DEADLINE:
            self._set_deadline(key, deadline_ms)
        elif had_deadline:
            self._clear_deadline(key)

    def _drop(self, key: bytes) -> None:
        """Deletes a key that is there."""
        self._changes.touch(key)
        value, version = self._values.pop(key), self._versions.pop(key)
        deadline_ms = self._deadlines.get(key, _NO_DEADLINE)
        self._keys_bytes -= RECORD_OVERHEAD_BYTES + len(key) + len(value)
        change = _record_hash(key, value, version, deadline_ms)
        self.state_hash = (self.state_hash - change) & _HASH_MASK
        if deadline_ms != _NO_DEADLINE:
            self._clear_deadline(key)

    def _put_or_drop(
        self, key: bytes, value: bytes, version: int, deadline_ms: int, now_ms: int
    ) -> None:
        """As ``_put``; but with a deadline in the past the key is gone at once."""
        if deadline_ms > now_ms:
            self._put(key, value, version, deadline_ms)
        elif key in self._values:
            self._drop(key)

    def _set_deadline(self, key: bytes, deadline_ms: int) -> None:
        if key not in self._deadlines:
            self._keys_bytes += DEADLINE_OVERHEAD_BYTES
        self._deadlines[key] = deadline_ms
        heapq.heappush(self._heap, (deadline_ms, key))
        self._trim_heap()

    def _clear_deadline(self, key: bytes) -> None:
        del self._deadlines[key]
        self._keys_bytes -= DEADLINE_OVERHEAD_BYTES
        self._trim_heap()

    def _trim_heap(self) -> None:
        if len(self._heap) > 2 * len(self._deadlines) + _HEAP_SLACK:
            self._heap = [(deadline_ms, key) for key, deadline_ms in self._deadlines.items()]
            heapq.heapify(self._heap)

    # ---- Write commands: argv, effective now, log index ----

    def _set(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        key, value = argv[1], argv[2]
        if len(argv) == 3:
            self._put(key, value, index)  # ends the same whether an old value is due or not
            return OK
        options = parse_set(argv)
        old_value = self._live(key, now_ms)
        if (
            (options.if_missing and old_value is not None)
            or (options.if_exists and old_value is None)
            or (options.if_equal is not None and options.if_equal != old_value)
        ):
            return old_value if options.get else None
        if options.expiry is not None:
            self._put_or_drop(key, value, index, options.expiry.deadline_ms(now_ms), now_ms)
        else:
            kept_ms = self._deadlines.get(key, _NO_DEADLINE) if options.keep_ttl else _NO_DEADLINE
            self._put(key, value, index, kept_ms)
        return old_value if options.get else OK

    def _setnx(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        if self._live(argv[1], now_ms) is not None:
            return 0
        self._put(argv[1], argv[2], index)
        return 1

    def _setex(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        expiry = parse_set(argv).expiry
        assert expiry is not None
        self._put(argv[1], argv[3], index, expiry.deadline_ms(now_ms))
        return OK

    def _getset(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        old_value = self._live(argv[1], now_ms)
        self._put(argv[1], argv[2], index)
        return old_value

    def _getdel(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        old_value = self._live(argv[1], now_ms)
        if old_value is not None:
            self._drop(argv[1])
        return old_value

    def _mset(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        if len(argv) % 2 == 0:
            raise wrong_arity("mset")
        for key, value in zip(argv[1::2], argv[2::2], strict=True):
            self._put(key, value, index)
        return OK

    def _append(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        key, suffix = argv[1], argv[2]
        old_value = self._live(key, now_ms) or b""
        if len(old_value) + len(suffix) > VALUE_BYTES_MAX:
            raise BadRequestError("string exceeds maximum allowed size (proto-max-bulk-len)")
        value = old_value + suffix
        self._put(key, value, index, self._deadlines.get(key, _NO_DEADLINE))
        return len(value)

    def _increment(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        key, increment = argv[1], parse_increment(argv)
        old_value = self._live(key, now_ms)
        number = increment if old_value is None else parse_int(old_value) + increment
        if not INT64_MIN <= number <= INT64_MAX:
            raise BadRequestError("increment or decrement would overflow")
        self._put(key, b"%d" % number, index, self._deadlines.get(key, _NO_DEADLINE))
        return number

    def _cas(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        key, value, expected = argv[1], argv[3], parse_expected_version(argv)
        version = 0 if self._live(key, now_ms) is None else self._versions[key]
        if version != expected:
            present = f"at version {version}" if version else "missing"
            raise MismatchError(f"the key is {present}, not at version {expected}", version)
        self._put(key, value, index)
        return index

    def _del(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        count = 0
        for key in argv[1:]:
            if self._live(key, now_ms) is not None:
                self._drop(key)
                count += 1
        return count

    def _delex(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        expected = parse_delex(argv)
        old_value = self._live(argv[1], now_ms)
        if old_value is None or (expected is not None and expected != old_value):
            return 0
        self._drop(argv[1])
        return 1

    def _expire(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        key, options = argv[1], parse_expire(argv)
        value = self._live(key, now_ms)
        if value is None:
            return 0
        deadline_ms = options.expiry.deadline_ms(now_ms)
        if not _may_expire(options, self._deadlines.get(key), deadline_ms):
            return 0
        self._put_or_drop(key, value, index, deadline_ms, now_ms)
        return 1

    def _persist(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        key = argv[1]
        value = self._live(key, now_ms)
        if value is None or key not in self._deadlines:
            return 0
        self._put(key, value, index)
        return 1

    def _purge(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        """How many were deleted. One that comes late, or twice, or from a former primary, finds
        another deadline or none, and does nothing (raft-traps T59).
        """
        count = 0
        for key, deadline in zip(argv[1::2], argv[2::2], strict=True):
            if int(deadline) <= now_ms and self._deadlines.get(key) == int(deadline):
                self._drop(key)
                count += 1
        return count

    def _flushall(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        if self._flush is None:
            self._values.clear()
            self._versions.clear()
            self._deadlines.clear()
        else:  # which goes on with the old ones
            self._values = {}
            self._versions = {}
            self._deadlines = {}
        self._heap.clear()
        self._changes.clear()
        # Sessions stay: a FLUSHALL that is repeated must find that it was done.
        self.state_hash = self.sessions.state_hash() & _HASH_MASK
        self._keys_bytes = 0
        return OK

    def _session(self, argv: _Argv, now_ms: int, index: int) -> Reply:
        check(argv)
        if argv[1].upper() == b"OPEN":
            self._add_to_hash(self.sessions.open(index, now_ms))
            return index
        try:
            self._add_to_hash(self.sessions.close(parse_int(argv[2])))
        except NoSessionError:
            return 0
        return 1

    def _add_to_hash(self, change: int) -> None:
        self.state_hash = (self.state_hash + change) & _HASH_MASK

    # ---- Read commands: argv, now ----

    def _seen(self, key: bytes, now_ms: int) -> bytes | None:
        deadline_ms = self._deadlines.get(key)
        if deadline_ms is not None and deadline_ms <= now_ms:
            if self._hides_due:
                return None
            raise ExpiredKeysError([(key, deadline_ms)])
        return self._values.get(key)

    def _require_none_due(self, keys: Iterable[bytes], now_ms: int) -> None:
        deadlines = self._deadlines
        if not deadlines or self._hides_due:
            return
        due = (
            (key, deadline_ms)
            for key in keys
            if (deadline_ms := deadlines.get(key)) is not None and deadline_ms <= now_ms
        )
        pairs = _for_one_purge(islice(due, EXPIRED_PAIRS_MAX))
        if pairs:
            raise ExpiredKeysError(pairs)

    def _get(self, argv: _Argv, now_ms: int) -> Reply:
        return self._seen(argv[1], now_ms)

    def _gets(self, argv: _Argv, now_ms: int) -> Reply:
        value = self._seen(argv[1], now_ms)
        return None if value is None else [value, self._versions[argv[1]]]

    def _strlen(self, argv: _Argv, now_ms: int) -> Reply:
        return len(self._seen(argv[1], now_ms) or b"")

    def _mget(self, argv: _Argv, now_ms: int) -> Reply:
        self._require_none_due(argv[1:], now_ms)
        values = [self._seen(key, now_ms) for key in argv[1:]]
        # They are copied for the reply, as often as they are named.
        if sum(len(value) for value in values if value is not None) > VALUE_BYTES_MAX:
            # Not raised: a fault of one reader is not one of those that are answered with it.
            return TooLargeError(f"the values of one MGET may have {VALUE_BYTES_MAX} bytes at most")
        return values

    def _exists(self, argv: _Argv, now_ms: int) -> Reply:
        self._require_none_due(argv[1:], now_ms)
        return sum(self._seen(key, now_ms) is not None for key in argv[1:])

    def _type(self, argv: _Argv, now_ms: int) -> Reply:
        return SimpleString("none" if self._seen(argv[1], now_ms) is None else "string")

    def _ttl(self, argv: _Argv, now_ms: int) -> Reply:
        left_ms = self._left_ms(argv[1], now_ms)
        return left_ms if left_ms < 0 else (left_ms + 500) // 1000

    def _pttl(self, argv: _Argv, now_ms: int) -> Reply:
        return self._left_ms(argv[1], now_ms)

    def _left_ms(self, key: bytes, now_ms: int) -> int:
        """Until the key's deadline; -1 if it has none, -2 if there is no key (Redis' numbers)."""
        if self._seen(key, now_ms) is None:
            return -2
        deadline_ms = self._deadlines.get(key)
        return -1 if deadline_ms is None else deadline_ms - now_ms

    def _keys(self, argv: _Argv, now_ms: int) -> Reply:
        matches = compile_glob(argv[1]).fullmatch
        found = [key for key in self._values if matches(key)]
        self._require_none_due(found, now_ms)
        return [key for key in found if self._seen(key, now_ms) is not None]

    def _dbsize(self, argv: _Argv, now_ms: int) -> Reply:
        return len(self._values)


def _may_expire(options: ExpireOptions, present_ms: int | None, deadline_ms: int) -> bool:
    """Whether NX, XX, GT and LT let ``deadline_ms`` replace the present one (None: never ends)."""
    if present_ms is None:
        return not (options.if_some or options.if_later)
    return not (
        options.if_none
        or (options.if_later and deadline_ms <= present_ms)
        or (options.if_earlier and deadline_ms >= present_ms)
    )
