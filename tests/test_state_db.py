"""The state on disk: what it keeps and gives back, whatever step a process dies at; snapshots."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import state_db
from kv_store import KeyValueStore, Slice, Table
from state_db import StateDb, StateHeader, verify_stream
from tests.states import (
    NOW,
    State,
    copy_directory,
    flush,
    header_of,
    load,
    open_db,
    read_all,
    snapshot,
    state,
    write,
    write_lines,
    write_numbered,
)
from tests.test_kv_store_model import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
UNLOCKED = nullcontext()
NOTHING = state(KeyValueStore())


@pytest.fixture
def store() -> KeyValueStore:
    """A few keys of each kind, some that went, and a session."""
    store = KeyValueStore()
    write_lines(store, "SET a 1", "SET b 2 PX 5000", "SET c 3", "DEL c", "INCR n", "SESSION OPEN")
    write_lines(store, "SESSION DO 6 1 1 INCR n", "SESSION DO 6 2 1 SET n 5 NX")
    return store


@pytest.fixture
def failpoints(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[str], object]]]:
    """What is called at each failpoint, with its name."""
    hooks: list[Callable[[str], object]] = []

    def run(name: str) -> None:
        for hook in hooks:
            hook(name)

    monkeypatch.setattr(state_db, "failpoint", run)
    yield hooks
    hooks.clear()


@pytest.fixture(autouse=True, scope="module")
def small_groups() -> Iterator[None]:
    """Let a few rows make many steps of a save."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_db, "_SORT_ROWS", 1)
        yield


Failpoints = list[Callable[[str], object]]


# ---- Keeping -----------------------------------------------------------------------------------


def test_open_when_directory_is_new_then_the_state_is_that_before_the_first_entry(
    tmp_path: Path,
) -> None:
    """A new member has a state too: nothing, at index 0."""
    with open_db(tmp_path) as db:
        header, store = db.load()

    assert header == StateHeader(0, 0, b"", 0, 0, 0, 0)
    assert state(store) == NOTHING
    assert state(load(tmp_path)) == NOTHING


def test_load_when_states_were_saved_then_the_last_one_is_back(
    tmp_path: Path, store: KeyValueStore
) -> None:
    """Rows, index, term, membership and the time survive a restart, and only changes are saved."""
    with open_db(tmp_path) as db:
        flush(store, db)
        write_lines(store, "SET a 5", "PERSIST b", "SESSION DO 6 3 2 SET d 8", "SESSION OPEN")
        flush(store, db)

    assert state(load(tmp_path)) == state(store)
    with open_db(tmp_path) as db:
        header, loaded = db.load()
        assert header == header_of(store)
        write_lines(loaded, "DEL d", "SET e 11", "SESSION CLOSE 6")
        flush(loaded, db)
    assert state(load(tmp_path)) == state(loaded)


def test_load_when_keys_and_values_are_any_bytes_then_they_are_back(tmp_path: Path) -> None:
    """Empty, binary, long; the highest index and the latest deadline that an int64 holds."""
    store = KeyValueStore.load(2**63 - 10, 2**62, [])
    for key in (b"", b"\0", b"\xff\0\xfe", b"k" * 5000, "\u00e9".encode()):
        write(store, b"SET", key, key * 7)
    write(store, b"SET", b"empty", b"")
    write(store, b"SET", b"long", os.urandom(3 << 20))
    write(store, b"SET", b"late", b"", b"PXAT", b"%d" % (2**63 - 1))
    with open_db(tmp_path) as db:
        flush(store, db)

    assert state(load(tmp_path)) == state(store)


def test_save_when_there_are_more_rows_than_a_statement_takes_then_all_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups by count and by size, for rows and for deletions, have no seams."""
    monkeypatch.setattr(state_db, "_SORT_ROWS", 10_000)
    store, chance = KeyValueStore(), random.Random(1)
    for number in range(25_000):
        write(store, b"SET", b"%d" % number, b"x" * chance.choice((0, 9, 90)))
    for number in range(30):
        write(store, b"SET", b"%d" % number, b"x" * chance.choice((9, 300_000, 2_000_000)))
    with open_db(tmp_path) as db:
        flush(store, db)
        assert state(db.load()[1]) == state(store)
        for number in range(12_345):
            write(store, b"DEL", b"%d" % number)
        flush(store, db)

    assert state(load(tmp_path)) == state(store)


def test_save_when_the_state_was_cleared_then_nothing_from_before_is_left(
    tmp_path: Path, store: KeyValueStore
) -> None:
    """FLUSHALL, in the database too."""
    with open_db(tmp_path) as db:
        flush(store, db)
        write_lines(store, "FLUSHALL", "SET b 8")
        flush(store, db)
        assert state(db.load()[1]) == state(store)
        write_lines(store, "FLUSHALL")
        flush(store, db)

    assert state(load(tmp_path)) == state(store)


def test_save_takes_the_slices_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes before a clearing is cleared, what comes after it is not."""
    monkeypatch.setattr(state_db, "_SORT_ROWS", 10_000)
    expected = KeyValueStore.load(9, NOW, [(b"b", 2, 0, b"")])
    with open_db(tmp_path) as db:
        slices = [
            Slice(Table.KEY, [(b"a", 1, 0, b""), (b"b", 1, 0, b"old")], []),
            Slice(Table.KEY, [], [], clear=True),
            Slice(Table.KEY, [(b"b", 2, 0, b""), (b"c", 3, 0, b"")], []),
            Slice(Table.KEY, [], [b"c", b"d"]),
        ]
        db.save(header_of(expected), slices)

    assert state(load(tmp_path)) == state(expected)


def test_save_leaves_nothing_beside_the_state(tmp_path: Path, store: KeyValueStore) -> None:
    """What is in state.db needs no other file: the -wal is empty while nothing is saved."""
    with open_db(tmp_path) as db:
        flush(store, db)
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        assert sizes.pop("state.db-wal") == 0
        assert sizes.keys() == {"state.db"}
        copy = copy_directory(tmp_path, tmp_path / "copy")
    (copy / "state.db-wal").unlink()

    assert state(load(copy)) == state(store)
    assert {path.name for path in tmp_path.iterdir()} == {"state.db", "copy"}


def test_save_when_the_index_goes_back_is_refused(tmp_path: Path, store: KeyValueStore) -> None:
    """A flush of a store that an installed snapshot has replaced must not mix with it."""
    with open_db(tmp_path) as db:
        flush(store, db)
        with pytest.raises(AssertionError):
            db.save(header_of(store)._replace(applied_index=store.applied_index - 1), [])

    assert state(load(tmp_path)) == state(store)


_IN_SESSIONS = st.one_of(
    st.just([b"SESSION", b"OPEN"]),
    # Of the first entries some open one.
    st.tuples(st.integers(1, 5), st.integers(1, 9), COMMANDS).map(
        lambda made: [b"SESSION", b"DO", b"%d" % made[0], b"%d" % made[1], b"1", *made[2]]
    ),
    st.integers(1, 5).map(lambda session: [b"SESSION", b"CLOSE", b"%d" % session]),
)
_HISTORIES = st.lists(
    st.one_of(
        st.tuples(COMMANDS, st.integers(NOW, NOW + 12)),
        st.tuples(_IN_SESSIONS, st.just(NOW)),
        st.sampled_from(["flush", "fail", "restart"]),
    ),
    max_size=40,
)


class _BrokenOffError(Exception):
    pass


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(_HISTORIES, st.randoms(use_true_random=False))
def test_save_when_given_any_history_keeps_the_state_at_the_begin_of_the_flush(
    tmp_path_factory: pytest.TempPathFactory,
    history: list[tuple[list[bytes], int] | str],
    chance: random.Random,
) -> None:
    """Commands between slices, flushes that fail halfway, restarts: what is loaded is exact."""
    directory = tmp_path_factory.mktemp("history")
    store, saved = KeyValueStore(), NOTHING
    db = StateDb(directory, fsync=False)
    commands = [step for step in history if not isinstance(step, str)]

    def slices(is_to_fail: bool) -> Iterator[Slice]:
        for part in store.begin_flush().slices(UNLOCKED, rows_max=1):
            yield part
            if is_to_fail and chance.random() < 0.3:
                raise _BrokenOffError
            argv, stamp_ms = chance.choice(commands or [([b"FLUSHALL"], NOW)])
            write(store, *argv, stamp_ms=stamp_ms)
        if is_to_fail:
            raise _BrokenOffError

    for step in [*history, "flush", "restart"]:
        if step == "restart":
            db.close()
            db = StateDb(directory, fsync=False)
            _header, store = db.load()
            assert state(store) == saved
        elif isinstance(step, str):
            begun = state(store)
            try:
                db.save(header_of(store), slices(step == "fail"))
            except _BrokenOffError:
                store.end_flush(saved=False)
            else:
                saved = begun
                store.end_flush(saved=True)
        else:
            argv, stamp_ms = step
            write(store, *argv, stamp_ms=stamp_ms)
    db.close()


# ---- Killed at any step ------------------------------------------------------------------------


def killed_at_each_failpoint(
    failpoints: Failpoints, directory: Path, copies: Path
) -> list[tuple[str, Path]]:
    """From now on: each failpoint that is passed, and what it leaves if the process dies there."""
    seen: list[tuple[str, Path]] = []

    def copy(name: str) -> None:
        seen.append((name, copy_directory(directory, copies / f"{len(seen)}-{name}")))

    failpoints.append(copy)
    return seen


def test_create_when_killed_at_any_step_then_a_new_state_or_none(
    tmp_path: Path, failpoints: Failpoints
) -> None:
    """A file under the name state.db is complete from the start."""
    directory = tmp_path / "node"
    directory.mkdir()
    seen = killed_at_each_failpoint(failpoints, directory, tmp_path)
    with open_db(directory):
        failpoints.clear()

    assert [name for name, _copy in seen] == ["create-synced", "create-renamed"]
    assert [(copy / "state.db").exists() for _name, copy in seen] == [False, True]
    for _name, copy in seen:
        assert state(load(copy)) == NOTHING
        assert [path.name for path in copy.iterdir()] == ["state.db"]


@pytest.mark.parametrize("loses_wal", [False, True])
def test_save_when_killed_at_any_step_then_the_old_or_the_new_state(
    tmp_path: Path, store: KeyValueStore, failpoints: Failpoints, loses_wal: bool
) -> None:
    """Nothing between; the new one for sure once ``save`` has returned, though the -wal be lost.

    Source: fault-model F10, raft-traps T10.
    """
    directory = tmp_path / "node"
    directory.mkdir()
    with open_db(directory) as db:
        flush(store, db)
        old = state(store)
        write_lines(store, "DEL a", "SET b 9", "SET d 4", "SESSION DO 6 3 3 SET n 5")
        seen = killed_at_each_failpoint(failpoints, directory, tmp_path)
        flush(store, db)
        failpoints.clear()

    found: dict[str, State] = {}
    for name, copy in seen:
        if loses_wal:
            (copy / "state.db-wal").unlink(missing_ok=True)
        found[name] = state(load(copy))
    assert [name for name, _copy in seen].count("save-rows-written") == 5
    before = ("save-begun", "save-rows-written", "save-header-written")
    assert found == dict.fromkeys(before, old) | {
        "save-committed": old if loses_wal else state(store),
        "save-synced": state(store),
    }


@pytest.mark.slow
def test_save_when_the_process_is_killed_anywhere_then_no_saved_state_is_lost(
    tmp_path: Path,
) -> None:
    """Inside of sqlite's own steps too, where most of the time goes with values this long."""
    program = """
import pathlib, sys
from state_db import StateDb
from tests.states import flush, write_numbered
db = StateDb(pathlib.Path(sys.argv[1]))
store = db.load()[1]
while True:
    write_numbered(store, 10)
    flush(store, db)
    print(store.applied_index, flush=True)
"""
    chance, index = random.Random(5), 0
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for _ in range(chance.randrange(1, 4)):
                index = int(process.stdout.readline())
            with suppress(subprocess.TimeoutExpired):  # any moment of what it does next
                process.wait(chance.random() * 0.1)
            process.kill()
            index = max(index, *map(int, process.stdout.read().split()), 0)

        store, expected = load(tmp_path), KeyValueStore()
        assert index <= store.applied_index <= index + 10
        write_numbered(expected, store.applied_index)
        assert state(store) == state(expected)


def test_load_when_killed_after_a_commit_then_the_next_kill_needs_no_wal(
    tmp_path: Path, store: KeyValueStore, failpoints: Failpoints
) -> None:
    """What ``load`` has returned is in state.db, so the log behind it may go (Rule 2)."""
    directory = tmp_path / "node"
    directory.mkdir()
    with open_db(directory) as db:
        seen = killed_at_each_failpoint(failpoints, directory, tmp_path)
        flush(store, db)
        failpoints.clear()
    copy = dict(seen)["save-committed"]
    assert (copy / "state.db-wal").stat().st_size > 0
    with open_db(copy) as db:
        db.load()
        assert (copy / "state.db-wal").stat().st_size == 0


def test_install_when_killed_at_any_step_then_the_old_or_the_new_state(
    tmp_path: Path, store: KeyValueStore, failpoints: Failpoints
) -> None:
    """A snapshot counts from its rename on, whole; what else is left of it is removed.

    Source: fault-model F6, raft-traps T37.
    """
    (tmp_path / "leader").mkdir()
    with open_db(tmp_path / "leader") as db:
        flush(store, db)
        data = snapshot(db)
    directory = tmp_path / "follower"
    directory.mkdir()
    other = KeyValueStore()
    write_lines(other, "SET x 1")
    with open_db(directory) as db:
        flush(other, db)
        seen = killed_at_each_failpoint(failpoints, directory, tmp_path)
        writer = db.receive_snapshot()
        for start in range(0, len(data), 1000):
            writer.write(data[start : start + 1000])
        state_db.failpoint("received")
        writer.finish()
        writer.install()
        failpoints.clear()
        assert state(db.load()[1]) == state(store)

    assert [(name, state(load(copy)) == state(store)) for name, copy in seen] == [
        ("received", False),
        ("snapshot-received", False),
        ("snapshot-synced", False),
        ("install-closed", False),
        ("install-renamed", True),
        ("install-synced", True),
    ]
    for name, copy in seen:
        assert state(load(copy)) in (state(other), state(store)), name
        assert [path.name for path in copy.iterdir()] == ["state.db"]


def test_install_and_create_sync_the_file_then_rename_it_then_sync_the_directory(
    tmp_path: Path, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power loss could leave the name of a file that is not there (raft-traps T7, T37)."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(fd: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def watched_replace(old: Path, new: Path) -> None:
        calls.append((old.name, new.name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    directory = tmp_path / "node"
    directory.mkdir()
    with closing(StateDb(directory)) as db:
        flush(store, db)
        assert calls == [("fsync", "new.db"), ("new.db", "state.db"), ("fsync", "node")]
        calls.clear()
        writer = db.receive_snapshot()
        writer.write(snapshot(db))
        assert calls == [("fsync", "incoming.db")]  # each piece, for all at once would take long
        calls.clear()
        writer.finish()
        writer.install()
        assert calls == [("fsync", "incoming.db"), ("incoming.db", "state.db"), ("fsync", "node")]
    calls.clear()
    with closing(StateDb(directory)):
        assert calls == [("fsync", "node")]  # a crash may have come just before the last one


def test_open_snapshot_when_it_is_done_then_saves_are_synced_as_before(
    tmp_path: Path, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is not synced, for it does not outlive the process; the state is, also if that fails."""
    with closing(StateDb(tmp_path)) as db:
        flush(store, db)
        db.open_snapshot().close()
        assert db._connection.execute("PRAGMA synchronous").fetchone() == (1,)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no more files"):
            patch.setattr(os, "open", _no_more_files)
            db.open_snapshot()
        assert db._connection.execute("PRAGMA synchronous").fetchone() == (1,)


def _no_more_files(*_: object) -> NoReturn:
    raise OSError(errno.EMFILE, "no more files")


# ---- Disks that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pragma", "undo", "number"),
    [
        ("max_page_count = 1", "max_page_count = 1000000", errno.ENOSPC),
        ("query_only = ON", "query_only = OFF", errno.EROFS),
    ],
)
def test_save_when_the_disk_takes_no_more_then_it_says_so_and_later_goes_on(
    tmp_path: Path, store: KeyValueStore, pragma: str, undo: str, number: int
) -> None:
    """A full disk costs nothing but time: the old state stays, and the next flush has it all."""
    with open_db(tmp_path) as db:
        flush(store, db)
        old = state(store)
        write(store, b"SET", b"long", b"x" * 100_000)
        db._connection.execute(f"PRAGMA {pragma}")
        with pytest.raises(OSError, match=r"state\.db") as caught:
            flush(store, db)
        store.end_flush(saved=False)
        assert caught.value.errno == number
        assert state(load(copy_directory(tmp_path, tmp_path / "copy"))) == old
        write_lines(store, "SET a 9")
        db._connection.execute(f"PRAGMA {undo}")
        flush(store, db)

    assert state(load(tmp_path)) == state(store)


def test_snapshot_when_the_disk_is_full_then_nothing_of_it_stays(
    tmp_path: Path, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a file nor an open one, whether the copy or its seal found no room."""

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    with open_db(tmp_path) as db:
        flush(store, db)
        before = len(os.listdir("/proc/self/fd")), sorted(os.listdir(tmp_path))
        monkeypatch.setattr(os, "pwrite", no_room)
        with pytest.raises(OSError, match="no room"):
            db.open_snapshot()
        assert (len(os.listdir("/proc/self/fd")), sorted(os.listdir(tmp_path))) == before


def test_save_when_the_rows_end_in_an_error_then_the_old_state_stays(
    tmp_path: Path, store: KeyValueStore
) -> None:
    """Half a flush is none."""

    def broken_off() -> Iterator[Slice]:
        for key in (b"half", b"more", b"most"):
            yield Slice(Table.KEY, [(key, 9, 0, b"")], [b"a"])
        raise _BrokenOffError

    with open_db(tmp_path) as db:
        flush(store, db)
        with pytest.raises(_BrokenOffError):
            db.save(header_of(store)._replace(applied_index=99), broken_off())
        assert state(db.load()[1]) == state(store)


def test_open_when_another_process_has_the_state_then_it_says_so(
    tmp_path: Path, store: KeyValueStore
) -> None:
    """The log's lock forbids it already; a person with sqlite3 at hand may have got in all the same."""
    with open_db(tmp_path) as db:
        flush(store, db)
        program = "import sys, pathlib, state_db; state_db.StateDb(pathlib.Path(sys.argv[1]))"
        other = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
        )

    assert other.returncode != 0
    assert "it is used by another process. Stop that process first." in other.stderr


# ---- Snapshots ---------------------------------------------------------------------------------


def test_snapshot_stays_as_it_was_while_saves_go_on(tmp_path: Path, store: KeyValueStore) -> None:
    """A follower gets one state, however long it takes; nobody waits for it, nothing piles up."""
    with open_db(tmp_path) as db:
        flush(store, db)
        begun, header = state(store), header_of(store)
        reader = db.open_snapshot()
        first = reader.read(0, 5000)
        write_lines(store, "FLUSHALL", "SET z 1")
        flush(store, db)
        assert {path.name for path in tmp_path.iterdir()} == {"state.db", "state.db-wal"}
        data = first + b"".join(
            reader.read(offset, 777) for offset in range(len(first), reader.size_bytes, 777)
        )
        # After an interruption the rest is asked for again, from anywhere.
        assert reader.read(3000, 100) == data[3000:3100]
        assert reader.read(len(data), 100) == b""
        assert (reader.size_bytes, reader.header) == (len(data), header)
        reader.close()

        writer = db.receive_snapshot()
        writer.write(data)
        assert writer.received_bytes == len(data)
        received, found = writer.finish()
        writer.abort()
    assert (received, state(found)) == (header, begun)
    assert [path.name for path in tmp_path.iterdir()] == ["state.db"]
    assert state(load(tmp_path)) == state(store)


def test_snapshot_when_installed_takes_the_place_of_the_state(
    tmp_path: Path, store: KeyValueStore
) -> None:
    """Saving goes on from it, with the store that ``finish`` has made."""
    (tmp_path / "leader").mkdir()
    (tmp_path / "follower").mkdir()
    with open_db(tmp_path / "leader") as leader, open_db(tmp_path / "follower") as db:
        flush(store, leader)
        other = KeyValueStore()
        write_lines(other, "SET old 1")
        flush(other, db)
        writer = db.receive_snapshot()
        writer.write(snapshot(leader))
        header, found = writer.finish()
        assert state(db.load()[1]) == state(other)
        writer.install()
        assert db.load()[0] == header == header_of(store)
        write_lines(found, "SET new 2", "DEL a")
        flush(found, db)
        assert snapshot(db) == snapshot(db)

    assert state(load(tmp_path / "follower")) == state(found)
    assert b"old" not in found._values


def test_snapshot_is_a_database_that_any_sqlite_reads(tmp_path: Path, store: KeyValueStore) -> None:
    """Whoever is left with nothing but a backup can still get at the data."""
    with open_db(tmp_path) as db:
        flush(store, db)
        (tmp_path / "backup").write_bytes(snapshot(db))

    with closing(sqlite3.connect(tmp_path / "backup")) as connection:
        rows = connection.execute("SELECT key, value FROM key ORDER BY key").fetchall()
    assert rows == [(b"a", b"1"), (b"b", b"2"), (b"n", b"2")]


def test_verify_stream_tells_what_a_backup_holds(tmp_path: Path, store: KeyValueStore) -> None:
    """Checked without a node, and without changing the file."""
    with open_db(tmp_path) as db:
        flush(store, db)
        data = snapshot(db)
    path = tmp_path / "a backup ?#%.kvs"
    path.write_bytes(data)
    path.chmod(0o400)

    assert verify_stream(path) == header_of(store)
    assert path.read_bytes() == data


def test_receive_when_it_begins_anew_then_what_came_before_is_forgotten(
    tmp_path: Path, store: KeyValueStore
) -> None:
    """A transfer that broke off is no part of the next one."""
    with open_db(tmp_path) as db:
        flush(store, db)
        db.receive_snapshot().write(b"half of something")
        writer = db.receive_snapshot()
        writer.write(snapshot(db))
        assert state(writer.finish()[1]) == state(store)
        writer.install()
        db.receive_snapshot().write(b"half of something else")
        assert state(db.load()[1]) == state(store)

    with open_db(tmp_path):
        assert not (tmp_path / "incoming.db").exists()


@pytest.mark.slow
def test_snapshots_while_another_thread_saves_are_whole(tmp_path: Path) -> None:
    """Copies and saves take turns: each copy is of one index, and checks."""
    store, stop = KeyValueStore(), threading.Event()
    with open_db(tmp_path) as db:

        def save() -> None:
            chance = random.Random(1)
            while not stop.is_set():
                for _ in range(50):
                    write(store, b"SET", b"%d" % chance.randrange(3000), os.urandom(50))
                flush(store, db)

        thread = threading.Thread(target=save, name="saving")
        thread.start()
        try:
            for number in range(20):
                with closing(db.open_snapshot()) as reader:
                    (tmp_path / "copy").write_bytes(read_all(reader))
                    assert verify_stream(tmp_path / "copy") == reader.header, number
        finally:
            stop.set()
            thread.join()
    assert state(load(tmp_path)) == state(store)
