"""States and their files: a store to write to, what is in it, and flushes to a database."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kv_commands import encode_payload
from kv_store import KeyRow, KeyValueStore, SessionRow, Slice, Table
from state_db import SnapshotReader, StateDb, StateHeader

NOW = 1_700_000_000_000
MEMBERSHIP = b'[{"node_id": "node1"}]'
TERM = 7

# Index, stamp, hash, and the rows of both tables.
State = tuple[int, int, int, dict[bytes, KeyRow], dict[int, SessionRow]]


def write(store: KeyValueStore, *argv: bytes, stamp_ms: int = NOW) -> object:
    """Apply a command as the next entry."""
    return store.apply(store.applied_index + 1, encode_payload(stamp_ms, argv))


def write_lines(store: KeyValueStore, *lines: str) -> None:
    """The same for lines of words."""
    for line in lines:
        write(store, *line.encode().split())


def write_numbered(store: KeyValueStore, count: int) -> None:
    """Apply the next entries of a history in which the index says what an entry does.

    The values are long: half a megabyte and more.
    """
    for _ in range(count):
        index = store.applied_index + 1
        key = b"%d" % (index % 23)
        if index % 50 == 0:
            write(store, b"FLUSHALL")
        elif index % 7 == 0:
            write(store, b"DEL", key)
        else:
            write(store, b"SET", key, b"%d," % index * 150_000)


def state(store: KeyValueStore) -> State:
    """All that a state on disk must give back."""
    rows = {
        key: (key, store._versions[key], store._deadlines.get(key, 0), value)
        for key, value in store._values.items()
    }
    sessions = {row[0]: row for row in map(store.sessions.row, store.sessions._sessions) if row}
    assert store.state_hash == store.recompute_state_hash()
    return store.applied_index, store.last_stamp_ms, store.state_hash, rows, sessions


def header_of(store: KeyValueStore) -> StateHeader:
    index, stamp_ms, state_hash, rows, _ = state(store)
    return StateHeader(index, TERM, MEMBERSHIP, index // 2, state_hash, stamp_ms, len(rows))


def flush(store: KeyValueStore, db: StateDb) -> None:
    """Save all changes, undisturbed, in as many slices as there are rows."""
    header, begun = header_of(store), store.begin_flush()
    assert StateHeader.of(begun, TERM, MEMBERSHIP, header.membership_index) == header
    db.save(header, begun.slices(nullcontext(), rows_max=1))
    store.end_flush(saved=True)


@contextmanager
def open_db(directory: Path) -> Iterator[StateDb]:
    with closing(StateDb(directory, fsync=False)) as db:
        yield db


def load(directory: Path) -> KeyValueStore:
    """What a restart finds."""
    with open_db(directory) as db:
        header, store = db.load()
        # A new directory has the header of nothing.
        assert header in (header_of(store), StateHeader())
        return store


def copy_directory(directory: Path, to: Path) -> Path:
    """What a process that is killed now leaves behind: every byte it gave to the kernel."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(directory, to)
    return to


def read_all(reader: SnapshotReader, bytes_max: int = 1 << 20) -> bytes:
    data = b""
    while more := reader.read(len(data), bytes_max):
        data += more
    return data


def snapshot(db: StateDb) -> bytes:
    """The state on disk as the bytes of a snapshot."""
    with closing(db.open_snapshot()) as reader:
        return read_all(reader)


class Rows:
    """Tables that slices are written to, as simply as can be."""

    def __init__(self) -> None:
        self.keys: dict[bytes, KeyRow] = {}
        self.sessions: dict[int, SessionRow] = {}

    def write(self, part: Slice) -> None:
        is_key = part.table == Table.KEY
        table: dict[Any, Any] = self.keys if is_key else self.sessions
        if part.clear:
            table.clear()
        for row in part.rows:
            assert len(row) == (4 if is_key else 2)
            table[row[0]] = row
        for key in part.gone:
            assert isinstance(key, bytes if is_key else int)
            table.pop(key, None)

    def copy(self) -> Rows:
        other = Rows()
        other.keys, other.sessions = dict(self.keys), dict(self.sessions)
        return other

    def load(self, applied_index: int, last_stamp_ms: int) -> KeyValueStore:
        """The store that is made of them."""
        rows = self.keys.values(), self.sessions.values()
        return KeyValueStore.load(applied_index, last_stamp_ms, *rows)
