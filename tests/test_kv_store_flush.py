"""What a flush hands out, and a store made of it: the state at the flush's begin, exactly."""

from __future__ import annotations

import gc
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kv_client_sessions
from kv_store import (
    FLUSH_ROWS_MAX,
    HISTORY_ENTRIES,
    Flush,
    KeyRow,
    KeyValueStore,
    Slice,
    Table,
)
from tests.states import NOW, Rows, State, state, write, write_lines
from tests.test_kv_store_model import COMMANDS

UNLOCKED = nullcontext()


class WatchedLock:
    """A lock that knows how often it was taken, and whether it is held."""

    def __init__(self) -> None:
        self.count = 0
        self.is_held = False

    def __enter__(self) -> None:
        assert not self.is_held
        self.is_held = True
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.is_held = False


@pytest.fixture
def store() -> KeyValueStore:
    return KeyValueStore()


def flushed(store: KeyValueStore) -> list[Slice]:
    """All that a flush of its own hands out now."""
    slices = [*store.begin_flush().slices(UNLOCKED)]
    store.end_flush(saved=True)
    return slices


# ---- What is handed out ------------------------------------------------------------------------


def test_flush_when_nothing_has_changed_hands_out_nothing(store: KeyValueStore) -> None:
    """Entries that change no row are told by the flush's index alone."""
    write_lines(store, "SET a 1")
    flushed(store)
    write_lines(store, "SET a 2 NX", "DEL b", "PERSIST a")
    store.skip(store.applied_index + 1)

    flush = store.begin_flush()
    assert [*flush.slices(UNLOCKED)] == []
    assert (flush.applied_index, flush.key_count) == (5, 1)
    assert (flush.state_hash, flush.last_stamp_ms) == (store.state_hash, NOW)


def test_flush_hands_out_what_changed_since_the_last_one(store: KeyValueStore) -> None:
    """A row that changed twice comes once, as it is now; one that went is named."""
    write_lines(store, "SET a 1", "SET b 2", "SET c 3")
    assert flushed(store) == [
        Slice(Table.KEY, [(b"a", 1, 0, b"1"), (b"b", 2, 0, b"2"), (b"c", 3, 0, b"3")], [])
    ]
    write_lines(store, "SET a 4", "PEXPIRE a 5000", "DEL b", "SET d 6", "DEL d")

    assert flushed(store) == [Slice(Table.KEY, [(b"a", 5, NOW + 5000, b"4")], [b"b", b"d"])]
    assert flushed(store) == []


def test_flush_after_flushall_clears_first(store: KeyValueStore) -> None:
    """A million deleted rows are told in one word."""
    write_lines(store, "SET a 1", "SET b 2")
    flushed(store)
    write_lines(store, "SET c 3", "FLUSHALL", "SET b 5")

    assert flushed(store) == [
        Slice(Table.KEY, (), (), clear=True),
        Slice(Table.KEY, [(b"b", 5, 0, b"5")], []),
    ]


def test_flush_holds_the_lock_for_one_slice_at_a_time(store: KeyValueStore) -> None:
    """Requests get in between slices, and a slice is short."""
    for number in range(3 * FLUSH_ROWS_MAX):
        write(store, b"SET", b"%d" % number, b"")
    write_lines(store, "DEL 1")
    lock = WatchedLock()

    for count, part in enumerate(store.begin_flush().slices(lock), 1):
        assert not lock.is_held
        assert lock.count == count
        assert len(part.rows) + len(part.gone) == FLUSH_ROWS_MAX
    assert count == 3


def test_flush_when_one_is_under_way_is_refused(store: KeyValueStore) -> None:
    """Two at once would each miss what the other one hands out."""
    store.begin_flush()

    with pytest.raises(AssertionError, match="under way"):
        store.begin_flush()


def test_flush_when_rows_change_meanwhile_hands_out_the_old_ones(store: KeyValueStore) -> None:
    """Changed, made, deleted, and made again: the flush sees nothing of it."""
    write_lines(store, "SET a 1", "SET b 2", "SET c 3", "DEL c")
    slices = store.begin_flush().slices(UNLOCKED, rows_max=1)
    assert next(slices).rows == [(b"a", 1, 0, b"1")]
    write_lines(store, "SET a 5", "SET b 6", "SET b 7", "DEL b", "SET b 8", "SET c 9", "SET d 10")

    assert [*slices] == [
        Slice(Table.KEY, [(b"b", 2, 0, b"2")], []),
        Slice(Table.KEY, [], [b"c"]),
    ]
    store.end_flush(saved=True)
    (part,) = flushed(store)
    assert sorted(part.rows) == [
        (b"a", 5, 0, b"5"),
        (b"b", 9, 0, b"8"),
        (b"c", 10, 0, b"9"),
        (b"d", 11, 0, b"10"),
    ]


def test_flush_when_flushall_comes_meanwhile_goes_on_with_the_old_state(
    store: KeyValueStore,
) -> None:
    """FLUSHALL puts the old state aside; the flush keeps it until it is done with it."""
    write_lines(store, "SET a 1", "SET b 2", "SET c 3 PX 5000")
    slices = store.begin_flush().slices(UNLOCKED, rows_max=1)
    write_lines(store, "SET b 4", "FLUSHALL", "SET c 6", "FLUSHALL", "SET a 8")

    assert [row for part in slices for row in part.rows] == [
        (b"a", 1, 0, b"1"),
        (b"b", 2, 0, b"2"),
        (b"c", 3, NOW + 5000, b"3"),
    ]
    store.end_flush(saved=True)
    assert flushed(store) == [
        Slice(Table.KEY, (), (), clear=True),
        Slice(Table.KEY, [(b"a", 8, 0, b"8")], []),
    ]
    assert len(store) == 1


@pytest.mark.parametrize("slices_taken", [0, 1, 2])
def test_flush_when_it_was_not_saved_is_part_of_the_next(
    store: KeyValueStore, slices_taken: int
) -> None:
    """Wherever it broke off, no change is forgotten."""
    write_lines(store, "SET x 1", "FLUSHALL", "SET a 3", "SET b 4")
    slices = store.begin_flush().slices(UNLOCKED, rows_max=1)
    for _ in range(slices_taken):
        next(slices)
    write_lines(store, "SET b 5", "SET c 6")
    store.end_flush(saved=False)

    clear, part = flushed(store)
    assert clear == Slice(Table.KEY, (), (), clear=True)
    assert sorted(part.rows) == [(b"a", 3, 0, b"3"), (b"b", 5, 0, b"5"), (b"c", 6, 0, b"6")]


def test_flush_hands_out_sessions_by_the_same_rules(store: KeyValueStore) -> None:
    """What changed, as it was at the begin, named if it went, and again if it was not saved."""
    write_lines(store, "SESSION OPEN", "SESSION OPEN", "SESSION DO 1 1 1 DEL a")
    rows = sorted(state(store)[4].values())
    slices = store.begin_flush().slices(UNLOCKED, rows_max=1)
    write_lines(store, "SESSION DO 2 1 1 DEL a", "SESSION CLOSE 1", "FLUSHALL")
    assert [*slices] == [Slice(Table.SESSION, [row], []) for row in rows]
    store.end_flush(saved=False)

    clear, part = flushed(store)
    assert clear == Slice(Table.KEY, (), (), clear=True)
    assert part == Slice(Table.SESSION, list(state(store)[4].values()), [1])
    assert [row[0] for row in part.rows] == [2]
    assert part.rows != rows[1:]
    assert flushed(store) == []


def test_flush_when_not_saved_after_flushall_came_meanwhile_is_forgotten(
    store: KeyValueStore,
) -> None:
    """The clearing is what is left to say, and what came after it."""
    write_lines(store, "SET a 1", "SET b 2")
    flushed(store)
    write_lines(store, "SET a 3")
    store.begin_flush()
    write_lines(store, "FLUSHALL", "SET c 5")
    store.end_flush(saved=False)

    assert flushed(store) == [
        Slice(Table.KEY, (), (), clear=True),
        Slice(Table.KEY, [(b"c", 5, 0, b"5")], []),
    ]


def test_flush_when_over_keeps_nothing(store: KeyValueStore) -> None:
    """What was kept aside goes with the flush: a store that is not flushed keeps no second copy."""
    for saved in (True, False):
        write_lines(store, "SET a 1", "SET b 2")
        flush = store.begin_flush()
        write_lines(store, "SET a 3")
        assert flush.keys._kept
        store.end_flush(saved=saved)
        write_lines(store, "SET b 4")
        assert flush.keys._kept.keys() == {b"a"}


def test_store_and_flush_make_nothing_that_the_garbage_collector_must_look_at(
    store: KeyValueStore,
) -> None:
    """Else it walks through all keys, under the store lock: a tenth of a second for a million."""
    write_lines(store, "SET a 1", "SET b 2 PX 5000", "SET c 3", "DEL c")
    flush = store.begin_flush()
    loaded = KeyValueStore.load(4, NOW, [(b"a", 1, 0, b"1"), (b"b", 2, NOW + 5000, b"2")])

    for each in (store, loaded):
        for table in (each._values, each._versions, each._deadlines):
            assert table
            assert not gc.is_tracked(table)
    assert not gc.is_tracked(flush.keys.keys)


# ---- A store made of rows ----------------------------------------------------------------------


def test_load_gives_the_state_back_with_all_that_is_derived_from_it(store: KeyValueStore) -> None:
    """Hash, memory, deadlines that are due: as if the log had been applied."""
    write_lines(
        store, "SET a 1", "SET b 2 PX 50", "SET c 3 PX 20", "APPEND c 33", "SET d 4", "DEL d"
    )
    rows = Rows()
    for part in flushed(store):
        rows.write(part)

    loaded = rows.load(store.applied_index, store.last_stamp_ms)
    assert state(loaded) == state(store)
    assert loaded.memory_bytes == store.memory_bytes
    assert loaded.due(NOW + 100, 9) == [(b"c", NOW + 20), (b"b", NOW + 50)]
    assert flushed(loaded) == []
    for both in (loaded, store):
        write_lines(both, "INCR a", "PERSIST b", "GETDEL c")
    assert state(loaded) == state(store)


def test_load_gives_sessions_back_in_the_order_of_their_last_use(
    store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that goes next is not the one with the first row."""
    monkeypatch.setattr(kv_client_sessions, "SESSIONS_MAX", 3)
    write_lines(store, *["SESSION OPEN"] * 3, "SESSION DO 1 1 1 DEL a")
    rows = state(store)[4].values()
    for order in (rows, reversed(rows)):
        loaded = KeyValueStore.load(4, NOW, [], order)
        write_lines(loaded, "SESSION OPEN", "SESSION OPEN")
        assert [*loaded.sessions._sessions] == [1, 5, 6]


_SERIAL = st.integers(1, 6)
# Which of the sessions, the one used longest ago first; beyond: another is opened, or one closed.
_PICK = st.integers(0, 4)
OPEN, CLOSE = 3, 4
Step = tuple[int, int, int, list[bytes], int]
_SESSION_STEPS = st.lists(
    st.tuples(_PICK, _SERIAL, _SERIAL, COMMANDS, st.integers(NOW, NOW + 30)),
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(_SESSION_STEPS, _SESSION_STEPS)
def test_load_gives_sessions_back_that_go_on_and_end_as_they_would_have(
    before: list[Step], after: list[Step]
) -> None:
    """In which order they were used, and when, decides who goes next: on every node the same."""
    flushing = Flushing()
    with patch.multiple(kv_client_sessions, SESSIONS_MAX=3, SESSION_TTL_MS=8):
        for step in before:
            flushing.in_session(*step)
        flushing.begin()
        flushing.save()
        rows = flushing.disk.copy()
        rows.sessions = dict(reversed(rows.sessions.items()))  # in no order of importance
        store, loaded = flushing.store, rows.load(*flushing.saved[:2])
        for step in after:
            for flushing.store in (store, loaded):
                flushing.in_session(*step)
            assert state(store) == state(loaded)
            assert store.memory_bytes == loaded.memory_bytes


def test_load_knows_no_hash_from_before(store: KeyValueStore) -> None:
    """A follower that is compared at an older index says that it does not know."""
    for _ in range(3):
        write_lines(store, "INCR a")
    loaded = KeyValueStore.load(3, NOW, [(b"a", 3, 0, b"3")])

    assert [loaded.hash_at(index) for index in range(5)] == [None] * 3 + [store.state_hash, None]
    for _ in range(HISTORY_ENTRIES):
        loaded.skip(loaded.applied_index + 1)
    assert loaded.hash_at(3) is None
    assert loaded.hash_at(4) == store.state_hash


@pytest.mark.parametrize(
    "row",
    [(None, 1, 0, b""), (b"a", "1", 0, b""), (b"a", -1, 0, b""), (b"a", 1, 2**64, b""), (b"a",)],
)
def test_load_when_a_row_is_no_row_is_refused(row: KeyRow) -> None:
    """Nothing that a damaged file can hold gets past the hash."""
    with pytest.raises((TypeError, ValueError, struct.error)):
        KeyValueStore.load(1, NOW, [row])


# ---- Any history -------------------------------------------------------------------------------

_COMMAND = st.tuples(st.just("command"), COMMANDS, st.integers(NOW, NOW + 12))
_IN_SESSION = st.tuples(
    st.just("in_session"), _PICK, _SERIAL, _SERIAL, COMMANDS, st.integers(NOW, NOW + 12)
)
_STEPS = st.lists(
    st.one_of(
        _COMMAND,
        _COMMAND,
        _COMMAND,
        st.just(("command", [b"FLUSHALL"], NOW)),
        st.just(("command", [b"SESSION", b"OPEN"], NOW)),
        _IN_SESSION,
        _IN_SESSION,
        st.tuples(st.sampled_from(["begin", "take", "take", "save", "fail", "restart"])),
    ),
    max_size=60,
)


class Flushing:
    """A store that is changed and flushed in turns, and the table that it is flushed to."""

    def __init__(self) -> None:
        self.store = KeyValueStore()
        self.disk = Rows()
        self.saved = state(self.store)  # what the disk must hold
        self.flush: Flush | None = None
        self.slices: Iterator[Slice] = iter(())
        self.begun: State = self.saved
        self.unsaved = Rows()

    def command(self, argv: list[bytes], stamp_ms: int) -> None:
        write(self.store, *argv, stamp_ms=stamp_ms)

    def in_session(
        self, pick: int, serial: int, first: int, argv: list[bytes], stamp_ms: int
    ) -> None:
        sessions = [*self.store.sessions._sessions]
        if not sessions or pick == OPEN:
            write(self.store, b"SESSION", b"OPEN", stamp_ms=stamp_ms)
            return
        numbers = (sessions[pick % len(sessions)], max(serial, first), min(serial, first))
        words = [b"SESSION", b"DO", *(b"%d" % number for number in numbers), *argv]
        if pick == CLOSE:
            words = [b"SESSION", b"CLOSE", words[2]]
        write(self.store, *words, stamp_ms=stamp_ms)

    def begin(self) -> None:
        if self.flush is None:
            self.begun = state(self.store)
            self.flush = self.store.begin_flush()
            self.slices = self.flush.slices(UNLOCKED, rows_max=1)
            self.unsaved = self.disk.copy()

    def take(self) -> None:
        part = next(self.slices, None)
        if part is not None:
            self.unsaved.write(part)

    def save(self) -> None:
        if self.flush is None:
            return
        for part in self.slices:
            self.unsaved.write(part)
        self.store.end_flush(saved=True)
        self.disk, self.saved = self.unsaved, self.begun
        flush, self.flush = self.flush, None
        index, stamp_ms, state_hash, rows, sessions = self.saved
        assert (self.disk.keys, self.disk.sessions) == (rows, sessions)
        assert (flush.applied_index, flush.last_stamp_ms) == (index, stamp_ms)
        assert (flush.state_hash, flush.key_count) == (state_hash, len(rows))

    def fail(self) -> None:
        if self.flush is not None:
            self.store.end_flush(saved=False)
            self.flush, self.slices = None, iter(())

    def restart(self) -> None:
        index, stamp_ms, *_ = self.saved
        self.store = self.disk.load(index, stamp_ms)
        self.flush, self.slices = None, iter(())
        assert state(self.store) == self.saved


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(_STEPS)
def test_flush_when_given_any_history_hands_out_the_state_at_its_begin(
    steps: list[tuple[object, ...]],
) -> None:
    """Commands between slices, FLUSHALL, flushes that fail, restarts: the disk is never a mix.

    Sessions come and go among them: opened, closed, expired, crowded out.
    """
    flushing = Flushing()
    with patch.multiple(kv_client_sessions, SESSIONS_MAX=3, SESSION_TTL_MS=8):
        for name, *arguments in steps:
            getattr(flushing, str(name))(*arguments)

        flushing.begin()
        flushing.save()
        flushing.begin()
        flushing.save()
        assert flushing.saved == state(flushing.store)
        flushing.restart()
