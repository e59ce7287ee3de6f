"""Random histories: the store against a model of a few lines, and against itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_commands import encode_payload
from kv_errors import KVError
from kv_store import ExpiredKeysError, KeyValueStore
from kv_types import OK, Reply

NOW = 1_700_000_000_000
KEYS = (b"a", b"b", b"c")

NOT_AN_INTEGER = "!value is not an integer or out of range"
OVERFLOW = "!increment or decrement would overflow"


def told(reply: Reply) -> Reply:
    """An error becomes ``!`` and its text, so that replies can be compared."""
    return f"!{reply}" if isinstance(reply, KVError) else reply


# ---- Commands, clocks, histories ----------------------------------------------------------------

Words = st.SearchStrategy[list[bytes]]


def _number(low: int, high: int) -> st.SearchStrategy[bytes]:
    return st.integers(low, high).map(lambda number: b"%d" % number)


def _maybe(*options: bytes) -> Words:
    """One of the words, or none."""
    return st.sampled_from([[], *([option] for option in options)])


def _command(name: bytes, *parts: st.SearchStrategy[bytes] | Words) -> Words:
    def flatten(made: tuple[bytes | list[bytes], ...]) -> list[bytes]:
        argv = [name]
        for part in made:
            argv += part if isinstance(part, list) else [part]
        return argv

    return st.tuples(*parts).map(flatten)


_KEY = st.sampled_from(KEYS)
_VALUE = st.sampled_from([b"", b"1", b"-5", b"01", b"x", b"9223372036854775807"])
# Small, so that deadlines, purges and the clock often meet on the same millisecond.
_MOMENT = _number(NOW - 2, NOW + 12)
_SPAN = _number(1, 8)

COMMANDS = st.one_of(
    _command(b"SET", _KEY, _VALUE),
    _command(
        b"SET",
        _KEY,
        _VALUE,
        st.one_of(_maybe(b"NX", b"XX"), _command(b"IFEQ", _VALUE)),
        _maybe(b"GET"),
        st.one_of(_maybe(b"KEEPTTL"), _command(b"PX", _SPAN), _command(b"PXAT", _MOMENT)),
    ),
    _command(b"GETSET", _KEY, _VALUE),
    _command(b"GETDEL", _KEY),
    _command(b"MSET", _KEY, _VALUE, _KEY, _VALUE),
    _command(b"APPEND", _KEY, _VALUE),
    _command(b"INCRBY", _KEY, _number(-3, 3)),
    _command(b"CAS", _KEY, _number(0, 12), _VALUE),
    _command(b"DEL", _KEY, _KEY),
    _command(b"DELEX", _KEY, st.just(b"IFEQ"), _VALUE),
    _command(b"PEXPIRE", _KEY, _number(-1, 8), _maybe(b"NX", b"XX", b"GT", b"LT")),
    _command(b"PEXPIREAT", _KEY, _MOMENT),
    _command(b"PERSIST", _KEY),
    _command(b"PURGE", _KEY, _MOMENT),
    _command(b"FLUSHALL"),
)
# Each command with the stamp that some primary gave it: clocks that disagree, and step back.
HISTORIES = st.lists(st.tuples(COMMANDS, st.integers(NOW, NOW + 12)), max_size=40)


# ---- The model ----------------------------------------------------------------------------------

Row = tuple[bytes, int, int | None]  # value, version, deadline


class Model:
    """What the commands mean, told as simply as can be: all that is due goes with each entry."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.now_ms = 0
        self.index = 0

    def alive(self, now_ms: int) -> dict[bytes, Row]:
        return {k: row for k, row in self.rows.items() if row[2] is None or row[2] > now_ms}

    def apply(self, argv: Sequence[bytes], stamp_ms: int) -> object:
        self.index += 1
        self.now_ms = max(self.now_ms, stamp_ms)
        self.rows = self.alive(self.now_ms)
        reply: object = getattr(self, argv[0].decode().lower())(*argv[1:])
        self.rows = self.alive(self.now_ms)
        return reply

    def value(self, key: bytes) -> bytes | None:
        return self.rows[key][0] if key in self.rows else None

    def deadline(self, key: bytes) -> int | None:
        return self.rows[key][2] if key in self.rows else None

    def put(self, key: bytes, value: bytes, deadline: int | None = None) -> None:
        self.rows[key] = (value, self.index, deadline)

    def set(self, key: bytes, value: bytes, *options: bytes) -> object:
        old = self.value(key)
        get = b"GET" in options
        if (
            (b"NX" in options and old is not None)
            or (b"XX" in options and old is None)
            or (b"IFEQ" in options and old != options[1])
        ):
            return old if get else None
        deadline = self.deadline(key) if b"KEEPTTL" in options else None
        if b"PX" in options:
            deadline = self.now_ms + int(options[-1])
        if b"PXAT" in options:
            deadline = int(options[-1])
        self.put(key, value, deadline)
        return old if get else OK

    def getset(self, key: bytes, value: bytes) -> object:
        return self.set(key, value, b"GET")

    def getdel(self, key: bytes) -> object:
        return self.rows.pop(key)[0] if key in self.rows else None

    def mset(self, key: bytes, value: bytes, other_key: bytes, other_value: bytes) -> object:
        self.set(key, value)
        return self.set(other_key, other_value)

    def append(self, key: bytes, suffix: bytes) -> object:
        value = (self.value(key) or b"") + suffix
        self.put(key, value, self.deadline(key))
        return len(value)

    def incrby(self, key: bytes, increment: bytes) -> object:
        value = self.value(key)
        value = b"0" if value is None else value
        if not value.removeprefix(b"-").isdigit() or b"%d" % int(value) != value:
            return NOT_AN_INTEGER
        if not -(2**63) <= int(value) < 2**63:  # APPEND makes such
            return NOT_AN_INTEGER
        number = int(value) + int(increment)
        if not -(2**63) <= number < 2**63:
            return OVERFLOW
        self.put(key, b"%d" % number, self.deadline(key))
        return number

    def cas(self, key: bytes, expected: bytes, value: bytes) -> object:
        version = self.rows[key][1] if key in self.rows else 0
        if version != int(expected):
            present = f"at version {version}" if version else "missing"
            return f"!the key is {present}, not at version {int(expected)}"
        self.put(key, value)
        return self.index

    def delete(self, *keys: bytes) -> int:
        return sum(self.rows.pop(key, None) is not None for key in keys)

    def delex(self, key: bytes, _: bytes, expected: bytes) -> object:
        return self.delete(key) if self.value(key) == expected else 0

    def pexpire(self, key: bytes, span: bytes, *options: bytes) -> object:
        if key not in self.rows:
            return 0
        present, new = self.deadline(key), self.now_ms + int(span)
        ends = float("inf") if present is None else present
        if (
            (b"NX" in options and present is not None)
            or (b"XX" in options and present is None)
            or (b"GT" in options and new <= ends)
            or (b"LT" in options and new >= ends)
        ):
            return 0
        self.put(key, self.rows[key][0], new)
        return 1

    def pexpireat(self, key: bytes, moment: bytes) -> object:
        return self.pexpire(key, b"%d" % (int(moment) - self.now_ms))

    def persist(self, key: bytes) -> object:
        if self.deadline(key) is None:
            return 0
        self.put(key, self.rows[key][0])
        return 1

    def flushall(self) -> object:
        self.rows.clear()
        return OK


setattr(Model, "del", Model.delete)  # a word that Python keeps for itself


# ---- The store against the model ----------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(HISTORIES, st.integers(NOW - 5, NOW + 20))
def test_store_when_given_any_history_agrees_with_the_model(
    history: list[tuple[list[bytes], int]], reader_ms: int
) -> None:
    """Replies and the visible state are those of a plain dict with deadlines, at any clock."""
    store, model = KeyValueStore(), Model()
    for index, (argv, stamp_ms) in enumerate(history, 1):
        reply = told(store.apply(index, encode_payload(stamp_ms, argv)))

        if argv[0] == b"PURGE":  # of keys that the model has let go already, so it is no news
            argv = [b"DEL"]
            reply = 0
        assert (argv, reply) == (argv, model.apply(argv, stamp_ms))
        assert store.state_hash == store.recompute_state_hash()
        check_what_a_reader_sees(store, model, reader_ms)


def check_what_a_reader_sees(store: KeyValueStore, model: Model, reader_ms: int) -> None:
    """The model's rows at the reader's time; or, of a key that has gone, a wish to purge it."""
    now_ms = max(reader_ms, model.now_ms)
    alive = model.alive(now_ms)
    due = store.due(reader_ms, len(KEYS))
    for key in KEYS:
        try:
            seen = store.read([b"GETS", key], reader_ms)
        except ExpiredKeysError as error:
            assert key not in alive
            assert [*error.pairs] == [pair for pair in due if pair[0] == key]
            continue
        value, version, deadline = alive.get(key, (None, None, None))
        left_ms = -1 if deadline is None else deadline - now_ms
        assert seen == (None if value is None else [value, version])
        assert store.read([b"PTTL", key], reader_ms) == (-2 if value is None else left_ms)
        assert key not in dict(due)


# ---- The store against itself -------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(HISTORIES, st.randoms(use_true_random=False))
def test_two_stores_when_given_the_same_log_are_equal_at_every_index(
    history: list[tuple[list[bytes], int]], chance: random.Random
) -> None:
    """Same log, same replies and hashes; what is read in between, on one, takes no part.

    Source: raft-traps T58.
    """
    log = [encode_payload(stamp_ms, argv) for argv, stamp_ms in history]
    quiet, busy = KeyValueStore(), KeyValueStore()
    replies = [told(quiet.apply(index, data)) for index, data in enumerate(log, 1)]

    for index, data in enumerate(log, 1):
        assert told(busy.apply(index, data)) == replies[index - 1]
        assert busy.state_hash == quiet.hash_at(index)
        busy.due(NOW * 2, chance.randrange(4))
        for argv in ([b"GET", b"a"], [b"MGET", b"a", b"b"], [b"KEYS", b"*"]):
            with suppress(ExpiredKeysError):
                busy.read(argv, NOW + chance.randrange(-20, 20))

    assert (busy.memory_bytes, len(busy)) == (quiet.memory_bytes, len(quiet))
    assert (busy.last_stamp_ms, busy.applied_index) == (quiet.last_stamp_ms, len(log))
