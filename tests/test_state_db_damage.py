"""Damaged states and snapshots: refused with words that help, and never taken for another state."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest

import state_db
from kv_store import KeyValueStore
from state_db import StateDbError, UnknownStateVersionError, verify_stream
from tests.states import (
    State,
    copy_directory,
    flush,
    load,
    open_db,
    snapshot,
    state,
    write,
    write_lines,
)

FLIPS = (0x01, 0x80, 0xFF)
PAGE_BYTES = 4096


@pytest.fixture
def store() -> KeyValueStore:
    """Enough for every kind of page: leaves, an index, a long value's overflow, free ones."""
    store = KeyValueStore()
    for number in range(40):
        write(store, b"SET", b"key%d" % number, b"%d" % number * 9)
    write(store, b"SET", b"long", b"0123456789" * 450, b"PX", b"5000")
    write_lines(store, "SESSION OPEN", "SESSION DO 42 1 1 APPEND key39 9", "SESSION OPEN")
    return store


def save(directory: Path, store: KeyValueStore) -> bytes:
    """Save twice, so that there are free pages; the bytes of state.db."""
    with open_db(directory) as db:
        flush(store, db)
        write(store, b"SET", b"long", b"0123456789" * 30)
        for number in range(20):
            write(store, b"DEL", b"key%d" % number)
        flush(store, db)
    return (directory / "state.db").read_bytes()


def worth_a_flip(data: bytes) -> Iterable[int]:
    """Every byte that says something, and some of those between, which are zeros."""
    return (at for at in range(len(data)) if data[at] or any(data[at - 4 : at]) or at % 61 == 0)


def found_in(directory: Path) -> State | None:
    """What a restart finds; None if it refuses to start, with words that say what to do."""
    try:
        return state(load(directory))
    except UnknownStateVersionError as error:
        assert "Start the version of the program that wrote it" in str(error)
    except StateDbError as error:
        assert str(directory / "state.db") in str(error)
        assert "start it again by the same command" in str(error)
    return None


# ---- state.db ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_load_when_any_byte_is_flipped_then_refused_or_the_same(
    tmp_path: Path, store: KeyValueStore
) -> None:
    """Not one wrong byte passes; where nothing is stored, a flip does no harm, then or later."""
    data, intact = save(tmp_path, store), state(store)
    refused = 0

    for at in worth_a_flip(data):
        damaged = bytearray(data)
        damaged[at] ^= FLIPS[at % 3]
        (tmp_path / "state.db").write_bytes(damaged)
        found = found_in(tmp_path)
        assert found in (None, intact), at
        refused += found is None
        if found is not None and at % 5 == 0:
            later = go_on(tmp_path)
            assert found_in(tmp_path) in (None, later), at
        (tmp_path / "state.db-wal").unlink(missing_ok=True)

    assert refused > 2000


def go_on(directory: Path) -> State:
    """Change every key, and add some for the free pages."""
    with open_db(directory) as db:
        _header, store = db.load()
        for key in [*store._values]:
            write(store, b"APPEND", key, b"more")
        write(store, b"SET", b"longer", b"9876543210" * 2000)
        flush(store, db)
    return state(store)


def test_load_when_the_file_is_cut_then_refused(tmp_path: Path, store: KeyValueStore) -> None:
    """Unless it was free space that was cut off; an empty file is no new state either."""
    data, intact = save(tmp_path, store), state(store)
    last_page = len(data) - PAGE_BYTES
    assert not any(data[last_page : last_page + 4])  # free: no other free page follows it

    for length in [*range(0, len(data), 512), *range(last_page - 20, last_page + 20)]:
        (tmp_path / "state.db").write_bytes(data[:length])
        found = found_in(tmp_path)
        assert found is None if length <= last_page else found in (None, intact), length


def test_load_when_the_file_is_another_then_refused(tmp_path: Path) -> None:
    """Not a database; another program's database."""
    path = tmp_path / "state.db"
    path.write_bytes(b"something else" * 1000)
    assert found_in(tmp_path) is None
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE key(key, value)")
    with pytest.raises(StateDbError, match="not a state of this program"):
        load(tmp_path)


def test_open_when_the_state_is_missing_though_its_wal_is_there_then_refused(
    tmp_path: Path,
) -> None:
    """sqlite would take what is left for a part of the new file."""
    (tmp_path / "state.db-wal").write_bytes(b"left over")

    with pytest.raises(StateDbError, match=r"it is missing, though there is state\.db-wal"):
        load(tmp_path)
    (tmp_path / "state.db-wal").write_bytes(b"")
    load(tmp_path)


# ---- The -wal that a killed process leaves -----------------------------------------------------


@pytest.fixture
def killed(
    tmp_path: Path, store: KeyValueStore, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, State, State]:
    """A directory whose last save is in the -wal only; the state without it, and with it."""
    (tmp_path / "node").mkdir()
    copy = tmp_path / "killed"

    def kill(name: str) -> None:
        if name == "save-committed":
            copy_directory(tmp_path / "node", copy)

    save(tmp_path / "node", store)
    with open_db(tmp_path / "node") as db:
        _header, loaded = db.load()
        old = state(loaded)
        write_lines(loaded, "SET key30 new", "DEL key31", "SET another 1")
        monkeypatch.setattr(state_db, "failpoint", kill)
        flush(loaded, db)
    return copy, old, state(loaded)


@pytest.mark.slow
def test_load_when_any_byte_of_the_wal_is_flipped_then_refused_or_old_or_new(
    tmp_path: Path, killed: tuple[Path, State, State]
) -> None:
    """What was not yet promised may be lost, but as a whole; the log still has it."""
    directory, old, new = killed
    data = (directory / "state.db-wal").read_bytes()
    assert found_in(copy_directory(directory, tmp_path / "copy")) == new
    found = []

    for at in worth_a_flip(data):
        copy = copy_directory(directory, tmp_path / "copy")
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        (copy / "state.db-wal").write_bytes(damaged)
        found.append(found_in(copy))
        assert found[-1] in (None, old, new), at
    assert found.count(old) > 1000


def test_load_when_the_wal_is_cut_or_missing_then_the_old_state_or_the_new(
    tmp_path: Path, killed: tuple[Path, State, State]
) -> None:
    """As after a power loss that came before the sync."""
    directory, old, new = killed
    data = (directory / "state.db-wal").read_bytes()

    for length in range(0, len(data) + 1, 103):
        copy = copy_directory(directory, tmp_path / "copy")
        (copy / "state.db-wal").write_bytes(data[:length])
        assert found_in(copy) in (old, new), length
    copy = copy_directory(directory, tmp_path / "copy")
    (copy / "state.db-wal").unlink()
    assert found_in(copy) == old


def test_load_when_the_wal_is_lost_while_it_was_moved_then_refused(
    tmp_path: Path, killed: tuple[Path, State, State]
) -> None:
    """Some pages of the old state and some of the new: whichever they are, it is noticed."""
    directory, _old, new = killed
    wal = (directory / "state.db-wal").read_bytes()
    frames = [wal[at : at + 24 + PAGE_BYTES] for at in range(32, len(wal), 24 + PAGE_BYTES)]
    assert len(frames) == 3  # header, rows, index

    for moved in range(1, 8):
        copy = copy_directory(directory, tmp_path / "copy")
        (copy / "state.db-wal").unlink()
        with (copy / "state.db").open("r+b") as file:
            for number, frame in enumerate(frames):
                if moved >> number & 1:
                    file.seek((int.from_bytes(frame[:4], "big") - 1) * PAGE_BYTES)
                    file.write(frame[24:])
        assert found_in(copy) == (new if moved == 7 else None), moved


# ---- Snapshots and backups ---------------------------------------------------------------------


@pytest.fixture
def backup(tmp_path: Path, store: KeyValueStore) -> Path:
    (tmp_path / "node").mkdir()
    save(tmp_path / "node", store)
    with open_db(tmp_path / "node") as db:
        path = tmp_path / "backup"
        path.write_bytes(snapshot(db))
    return path


@pytest.mark.slow
def test_stream_when_any_byte_is_flipped_or_the_end_is_cut_then_refused(backup: Path) -> None:
    """End to end: from the sender's file to the receiver's."""
    data = backup.read_bytes()

    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        check_refused(backup, damaged)
    for length in [*range(0, len(data), 97), *range(len(data) - 40, len(data))]:
        check_refused(backup, data[:length])
    check_refused(backup, data + b"\0")
    backup.write_bytes(data)
    verify_stream(backup)


def check_refused(path: Path, data: bytes | bytearray) -> None:
    path.write_bytes(data)
    with pytest.raises(StateDbError, match=r"Take it again|Start the version"):
        verify_stream(path)


def test_receive_when_the_stream_is_damaged_then_the_state_stays(
    tmp_path: Path, backup: Path
) -> None:
    """Nothing is installed that is not whole, and the next try begins anew."""
    data, intact = backup.read_bytes(), state(load(tmp_path / "node"))
    with open_db(tmp_path / "node") as db:
        for damaged in (data[:-1], data[1:], data[:5000] + data[4999:], b""):
            writer = db.receive_snapshot()
            writer.write(damaged)
            with pytest.raises(StateDbError, match="Take it again"):
                writer.finish()
            writer.abort()
            assert not (tmp_path / "node" / "incoming.db").exists()
            assert state(db.load()[1]) == intact
        writer = db.receive_snapshot()
        writer.write(data)
        assert state(writer.finish()[1]) == intact


def tampered(path: Path, change: str) -> None:
    """The backup after a statement of SQL, sealed as if it came from a node."""
    path.write_bytes(path.read_bytes()[: -state_db._SEAL.size])
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(change)
    fd = os.open(path, os.O_RDWR)
    state_db.SnapshotReader(state_db.StateHeader(), fd).close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE key SET value = 'x' WHERE key = CAST('key30' AS BLOB)", "keys with the hash"),
        ("UPDATE key SET version = version + 1 WHERE rowid = 30", "keys with the hash"),
        ("UPDATE key SET deadline_ms = 7 WHERE rowid = 30", "keys with the hash"),
        ("DELETE FROM key WHERE rowid = 30", "keys with the hash"),
        ("INSERT INTO key VALUES (x'00', 1, 0, x'')", "keys with the hash"),
        ("UPDATE key SET version = -1 WHERE rowid = 30", "a row is damaged"),
        ("UPDATE key SET value = 5 WHERE rowid = 30", "a row is damaged"),
        ("UPDATE header SET applied_index = applied_index + 1", "the header is damaged"),
        ("UPDATE header SET applied_term = 1", "the header is damaged"),
        ("UPDATE header SET membership = x'5b5d'", "the header is damaged"),
        ("UPDATE header SET membership_index = 1", "the header is damaged"),
        ("UPDATE header SET last_stamp_ms = 1", "the header is damaged"),
        ("UPDATE header SET keys = keys + 1", "the header is damaged"),
        ("UPDATE header SET state_hash = 'none'", "the header is damaged"),
        ("DELETE FROM header", "the header is damaged"),
        ("DELETE FROM session", "keys with the hash"),  # fault-model M12
        ("DELETE FROM session WHERE id = 44", "keys with the hash"),
        ("UPDATE session SET id = 43 WHERE id = 44", "keys with the hash"),
        ("UPDATE session SET data = substr(data, 1, 8)", "keys with the hash"),
        ("UPDATE session SET data = zeroblob(8) WHERE id = 44", "keys with the hash"),
        ("UPDATE session SET data = substr(data, 1, 50)", "a row is damaged"),
        ("UPDATE session SET data = substr(data, 1, 55)", "a row is damaged"),
        ("INSERT INTO session VALUES (1, x'00')", "a row is damaged"),
        ("INSERT INTO session VALUES (1, 'text')", "a row is damaged"),
        ("INSERT INTO session VALUES (-1, zeroblob(8))", "a row is damaged"),
        ("CREATE TRIGGER t AFTER INSERT ON key BEGIN DELETE FROM key; END", "its tables are not"),
        ("DROP TABLE session", "its tables are not"),
        ("PRAGMA application_id = 1", "not a state of this program"),
        ("PRAGMA user_version = 2", "format version 2, and this program reads only version 1"),
    ],
)
def test_stream_when_what_is_sealed_is_not_a_state_then_refused(
    backup: Path, change: str, reason: str
) -> None:
    """A sender's own disk may be the damaged one: the seal alone proves nothing."""
    tampered(backup, change)

    with pytest.raises(StateDbError, match=reason):
        verify_stream(backup)


def test_stream_when_sealed_by_another_version_then_refused(backup: Path) -> None:
    """A clear word instead of a wrong guess."""
    data = bytearray(backup.read_bytes())
    data[-state_db._SEAL.size + 7] = 2
    backup.write_bytes(data)

    with pytest.raises(UnknownStateVersionError, match="format version 2"):
        verify_stream(backup)
