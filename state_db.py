"""The applied state on disk: one sqlite database, its snapshots for followers, and backups.

Rule 1: one transaction holds the rows that changed, the index they are the state of, membership
and state hash. A crash leaves the state of one index or that of another, nothing between.
Rule 2: what ``save`` or ``load`` has returned for is synced in ``state.db`` itself; only then may
the log behind it be dropped. ``state.db-wal`` holds nothing but a transaction under way.
Rule 3: nothing that comes from a disk or a peer is believed: whoever loads a state computes its
hash anew. A state that does not match is refused, with words that say what to do.
Rule 4: ``state.db`` is created and replaced whole, by renaming a file that is complete and synced.
Rule 5: while a node serves, sqlite is asked for much in few calls. It lets go of the interpreter's
lock during each, and under load may wait milliseconds to get that back.

Beside the log in a member's data directory:

    state.db        sqlite: header (one row), key, session (a row for each)
    new.db          the same while it is created; incoming.db while a snapshot is received;
    outgoing.db     while one is copied, which then has no name any more

A snapshot, and a backup, is a copy of the database and after it a seal:

    seal            magic, format version, bytes of the database (big-endian), BLAKE2b of those

One thread at a time works with the database, the others wait: ``state-flusher`` saves, the threads
that send or receive a snapshot open or install one. docs/adr/0008 says why sqlite, and why so.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from hashlib import blake2b
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from kv_store import Flush, KeyRow, KeyValueStore, SessionRow, Slice, Table

_FORMAT_VERSION: Final = 1
_APPLICATION_ID: Final = 0x4B565354  # "KVST", which file(1) can show

# Values go through sqlite in statements of about this size. 999 is the least bound of variables
# that any sqlite has, and a row has four.
_STATEMENT_ROWS_MAX: Final = 200
_STATEMENT_BYTES_MAX: Final = 1 << 20
# Rows are sorted in groups of this many, so that neighbours in the index are written together: a
# million new keys in random order take half the time. The sort itself takes 3 ms.
_SORT_ROWS: Final = 10_000
# A page that one flush changes in several places is then written once. Measured with a million new
# keys in random order: the index that finds them by key takes 30 MB.
_CACHE_KIB: Final = 64 << 10
_COPY_BYTES: Final = 1 << 20

_WHAT_TO_DO: Final = (
    "This node does not start on a damaged state. While the others are a majority: move its data "
    "directory away and start it again by the same command; it comes back as a new member and "
    "copies the data from them. If there are no others, restore a backup. Never delete single "
    "files: the node would forget its promises."
)
_TAKE_ANOTHER: Final = "This copy is refused, and nothing was changed. Take it again, or another."

# Rows are found by key through an index of its own: a table ordered by key (WITHOUT ROWID) puts
# what is longer than a quarter of a page into pages of its own, three times the space for 1 KB.
_SCHEMA: Final = """
CREATE TABLE header(
    only INTEGER PRIMARY KEY CHECK (only = 1),
    applied_index INTEGER NOT NULL, applied_term INTEGER NOT NULL,
    membership BLOB NOT NULL, membership_index INTEGER NOT NULL,
    state_hash TEXT NOT NULL, last_stamp_ms INTEGER NOT NULL, keys INTEGER NOT NULL,
    checksum BLOB NOT NULL);
CREATE TABLE key(
    key BLOB NOT NULL UNIQUE,
    version INTEGER NOT NULL, deadline_ms INTEGER NOT NULL, value BLOB NOT NULL);
CREATE TABLE session(id INTEGER PRIMARY KEY, data BLOB NOT NULL);
"""
_KEY_COLUMN: Final = {Table.KEY: "key", Table.SESSION: "id"}
_OTHER_COLUMNS: Final = {Table.KEY: ("version", "deadline_ms", "value"), Table.SESSION: ("data",)}


def failpoint(name: str) -> None:
    """Marks a step at which the process may die and nothing be lost. Tests put its death here."""


# ---- Errors ------------------------------------------------------------------------------------


class StateDbError(Exception):
    """The state can't be used; the message says why, and what to do."""

    def __init__(self, path: Path, reason: str, what_to_do: str = _WHAT_TO_DO) -> None:
        super().__init__(f"{path}: {reason}. {what_to_do}")
        self.path = path
        self.reason = reason


class UnknownStateVersionError(StateDbError):
    """The file was written by a version of this program with another file format."""

    def __init__(self, path: Path, version: int) -> None:
        super().__init__(
            path,
            f"format version {version}, and this program reads only version {_FORMAT_VERSION}",
            "Start the version of the program that wrote it.",
        )


# sqlite's primary result codes for which the file is not to blame.
_ERRNO_OF: Final = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_READONLY: errno.EROFS,
}


@contextmanager
def _sqlite_errors_told(path: Path, what_to_do: str = _WHAT_TO_DO) -> Iterator[None]:
    """Turns an error of sqlite's into OSError or StateDbError."""
    try:
        yield
    except UnicodeDecodeError as error:  # in sqlite's message, which quotes what is damaged
        raise StateDbError(path, f"sqlite: {error.object!r}", what_to_do) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:  # not sqlite's own but of the module around it: a fault of ours
            raise
        code &= 0xFF
        if code in _ERRNO_OF:
            raise OSError(_ERRNO_OF[code], f"sqlite: {error}", str(path)) from error
        if code == sqlite3.SQLITE_BUSY:
            busy = "it is used by another process"
            raise StateDbError(path, busy, "Stop that process first.") from error
        raise StateDbError(path, f"sqlite: {error}", what_to_do) from error


# ---- The header --------------------------------------------------------------------------------


class StateHeader(NamedTuple):
    """What a saved state is the state of."""

    applied_index: int = 0
    applied_term: int = 0  # of the entry applied_index
    membership: bytes = b""  # Membership.encode(), the latest one up to applied_index
    membership_index: int = 0
    state_hash: int = 0
    last_stamp_ms: int = 0
    keys: int = 0

    @classmethod
    def of(
        cls, flush: Flush, applied_term: int, membership: bytes, membership_index: int
    ) -> StateHeader:
        """The header for what ``flush`` hands out."""
        return cls(
            flush.applied_index,
            applied_term,
            membership,
            membership_index,
            flush.state_hash,
            flush.last_stamp_ms,
            flush.key_count,
        )


_pack_numbers = struct.Struct(">QQQQQQ").pack


def _checksum(header: StateHeader) -> bytes:
    """Over the header alone: the rows have the state hash."""
    index, term, membership, membership_index, *numbers = header
    packed = _pack_numbers(index, term, membership_index, *numbers)
    return blake2b(packed + membership, digest_size=8).digest()


def _write_header(connection: sqlite3.Connection, header: StateHeader) -> None:
    index, term, membership, membership_index, state_hash, *numbers = header
    connection.execute(
        "INSERT OR REPLACE INTO header VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?)",
        # Text, for sqlite's integers end at 2^63.
        (
            *(index, term, membership, membership_index, f"{state_hash:016x}"),
            *(*numbers, _checksum(header)),
        ),
    )


def _read_header(connection: sqlite3.Connection, path: Path, what_to_do: str) -> StateHeader:
    """Raises StateDbError if it is not as it was written."""
    found = connection.execute("SELECT * FROM header").fetchall()
    try:
        ((_only, index, term, membership, membership_index, state_hash, *numbers, checksum),) = (
            found
        )
        header = StateHeader(
            index, term, membership, membership_index, int(state_hash, 16), *numbers
        )
        if checksum != _checksum(header):
            raise ValueError("a wrong checksum")
    except (ValueError, TypeError, struct.error) as error:
        raise StateDbError(path, f"the header is damaged ({error})", what_to_do) from error
    return header


# ---- A database --------------------------------------------------------------------------------


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection that every thread may use, one at a time; text comes as bytes."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}",
        uri=True,
        timeout=0,  # whoever else is in there will stay
        isolation_level=None,  # transactions begin and end where it is written
        check_same_thread=False,
    )
    # A damaged text must be compared, not decoded.
    connection.text_factory = bytes
    # What a database from elsewhere defines must not run.
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _check_format(connection: sqlite3.Connection, path: Path, what_to_do: str) -> None:
    """Raises StateDbError unless this is a state of this program's version."""
    if connection.execute("PRAGMA application_id").fetchone() != (_APPLICATION_ID,):
        raise StateDbError(path, "not a state of this program", what_to_do)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != _FORMAT_VERSION:
        raise UnknownStateVersionError(path, version)
    if _schema(connection) != _expected_schema():
        raise StateDbError(path, "its tables are not those of a state", what_to_do)


def _schema(connection: sqlite3.Connection) -> list[object]:
    return connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()


@cache
def _expected_schema() -> list[object]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.text_factory = bytes
        connection.executescript(_SCHEMA)
        return _schema(connection)


def _initialise(connection: sqlite3.Connection) -> None:
    """Make an empty database the state before the first entry."""
    connection.executescript(_SCHEMA)
    _write_header(connection, StateHeader())
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {_FORMAT_VERSION}")


def _load(
    connection: sqlite3.Connection, path: Path, what_to_do: str = _WHAT_TO_DO
) -> tuple[StateHeader, KeyValueStore]:
    """The state in a database. Raises StateDbError if it is not exactly what was saved."""
    _check_format(connection, path, what_to_do)
    header = _read_header(connection, path, what_to_do)
    # The hash sees all rows. This sees what no row shows and the next save would stumble over, with
    # the log gone by then: the index, the free pages. It takes a third of the time, a second of
    # three for a million keys.
    flaws = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if flaws != [(b"ok",)]:
        raise StateDbError(path, f"sqlite finds {flaws[0][0]!r}", what_to_do)
    keys = connection.execute("SELECT key, version, deadline_ms, value FROM key")
    sessions = connection.execute("SELECT id, data FROM session")
    try:
        store = KeyValueStore.load(header.applied_index, header.last_stamp_ms, keys, sessions)
    except (TypeError, ValueError, struct.error) as error:
        raise StateDbError(path, f"a row is damaged ({error})", what_to_do) from error
    if (store.state_hash, len(store)) != (header.state_hash, header.keys):
        reason = (
            f"{len(store)} keys with the hash {store.state_hash:016x} were found, "
            f"where {header.keys} with {header.state_hash:016x} were saved"
        )
        raise StateDbError(path, reason, what_to_do)
    return header, store


# ---- Rows into the database --------------------------------------------------------------------


def _gathered(slices: Iterable[Slice]) -> Iterator[Slice]:
    """The same in fewer and larger slices."""
    table = Table.KEY
    rows: list[KeyRow | SessionRow] = []
    gone: list[bytes | int] = []
    for part in slices:
        if part.table != table or part.clear or len(rows) + len(gone) >= _SORT_ROWS:
            yield Slice(table, rows, gone)
            table, rows, gone = part.table, [], []
        if part.clear:
            yield part
        else:
            rows += part.rows
            gone += part.gone
    yield Slice(table, rows, gone)


def _write_slice(connection: sqlite3.Connection, part: Slice) -> None:
    if part.clear:
        connection.execute(f"DELETE FROM {part.table}")
    for rows in _statements(sorted(part.rows, key=itemgetter(0))):
        connection.execute(_upsert(part.table, len(rows)), list(chain.from_iterable(rows)))
    for start in range(0, len(part.gone), _STATEMENT_ROWS_MAX):
        gone = part.gone[start : start + _STATEMENT_ROWS_MAX]
        connection.execute(_delete(part.table, len(gone)), gone)


def _statements(rows: Sequence[KeyRow | SessionRow]) -> Iterator[Sequence[KeyRow | SessionRow]]:
    """The rows in groups, each for one statement."""
    start = size_bytes = 0
    for end, row in enumerate(rows):
        # The last column is the long one. sqlite copies what it is given before it writes it.
        size_bytes += len(row[-1])
        if end - start == _STATEMENT_ROWS_MAX or (
            size_bytes > _STATEMENT_BYTES_MAX and end > start
        ):
            yield rows[start:end]
            start, size_bytes = end, len(row[-1])
    if start < len(rows):
        yield rows[start:]


@cache
def _upsert(table: Table, count: int) -> str:
    key, others = _KEY_COLUMN[table], _OTHER_COLUMNS[table]
    row = f"({', '.join('?' * (1 + len(others)))})"
    changes = ", ".join(f"{name} = excluded.{name}" for name in others)
    return (
        f"INSERT INTO {table} ({', '.join((key, *others))}) VALUES {', '.join([row] * count)} "
        f"ON CONFLICT ({key}) DO UPDATE SET {changes}"
    )


@cache
def _delete(table: Table, count: int) -> str:
    return f"DELETE FROM {table} WHERE {_KEY_COLUMN[table]} IN ({', '.join('?' * count)})"


# ---- Snapshots and backups ---------------------------------------------------------------------

_SEAL = struct.Struct(">4sIQ16s")  # magic, format version, bytes before it, BLAKE2b of those
_SEAL_MAGIC: Final = b"KVSS"


def _digest(fd: int, size_bytes: int) -> bytes:
    """BLAKE2b of the first ``size_bytes`` of a file."""
    digest = blake2b(digest_size=16)
    offset = 0
    while data := os.pread(fd, min(_COPY_BYTES, size_bytes - offset), offset):
        digest.update(data)
        offset += len(data)
    return digest.digest()


def _check_seal(fd: int, path: Path) -> int:
    """How many bytes the database takes in a snapshot. Raises StateDbError for a wrong seal."""
    size_bytes = os.fstat(fd).st_size - _SEAL.size
    if size_bytes < 0:
        raise StateDbError(path, "it is no snapshot, or was cut short", _TAKE_ANOTHER)
    magic, version, sealed_bytes, digest = _SEAL.unpack(os.pread(fd, _SEAL.size, size_bytes))
    if magic != _SEAL_MAGIC:
        raise StateDbError(path, "it is no snapshot, or was cut short", _TAKE_ANOTHER)
    if version != _FORMAT_VERSION:
        raise UnknownStateVersionError(path, version)
    if sealed_bytes != size_bytes or digest != _digest(fd, size_bytes):
        raise StateDbError(path, "its checksum is wrong", _TAKE_ANOTHER)
    return size_bytes


def _load_copy(path: Path) -> tuple[StateHeader, KeyValueStore]:
    """The state in a database that is nobody's yet, and that is not changed by this."""
    with (
        _sqlite_errors_told(path, _TAKE_ANOTHER),
        closing(_connect(path, "mode=ro&immutable=1")) as connection,
    ):
        return _load(connection, path, _TAKE_ANOTHER)


def verify_stream(path: Path) -> StateHeader:
    """What the backup in a file is the state of, checked to the last byte.

    Raises StateDbError, or OSError. Takes seconds, and the memory of the state.
    """
    with path.open("rb") as file:
        _check_seal(file.fileno(), path)
    return _load_copy(path)[0]


class SnapshotReader:
    """The state at one index as bytes, whatever is saved meanwhile. Any thread may read."""

    def __init__(self, header: StateHeader, fd: int) -> None:
        """Takes over ``fd``, of a database without a seal."""
        self.header = header
        # Guards _fd, whose number may be another file's as soon as it is closed.
        self._lock = threading.Lock()
        self._fd = fd
        database_bytes = os.fstat(fd).st_size
        digest = _digest(fd, database_bytes)
        seal = _SEAL.pack(_SEAL_MAGIC, _FORMAT_VERSION, database_bytes, digest)
        os.pwrite(fd, seal, database_bytes)
        self.size_bytes = database_bytes + len(seal)

    def read(self, offset: int, bytes_max: int) -> bytes:
        """Bytes from ``offset``; none at the end. Raises OSError, also after ``close``."""
        with self._lock:
            return os.pread(self._fd, bytes_max, offset)

    def close(self) -> None:
        """Give the disk's space back."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class SnapshotWriter:
    """A snapshot that arrives: ``write`` all of it, ``finish``, ``install``; or ``abort``."""

    def __init__(self, db: StateDb, path: Path) -> None:
        self._db = db
        self._path = path
        self._file: BinaryIO = path.open("w+b")
        self.received_bytes = 0

    def write(self, data: bytes) -> None:
        """The next bytes. Raises OSError."""
        self._file.write(data)
        self._file.flush()
        # Piece by piece: to sync all of it in the end would hold up the log for as long as that takes.
        self._db.sync(self._file.fileno())
        self.received_bytes += len(data)

    def finish(self) -> tuple[StateHeader, KeyValueStore]:
        """The state that was received, checked to the last byte; the file is synced.

        Raises StateDbError if it is not what was sent, or OSError.
        """
        with self._file as file:
            failpoint("snapshot-received")
            file.truncate(_check_seal(file.fileno(), self._path))
            self._db.sync(file.fileno())
        failpoint("snapshot-synced")
        return _load_copy(self._path)

    def install(self) -> None:
        """Put what ``finish`` has checked in the place of the state on disk. Raises OSError."""
        self._db.replace_with(self._path)

    def abort(self) -> None:
        """Forget what was received."""
        with suppress(OSError):  # what a full disk has not taken is tried once more
            self._file.close()
        self._path.unlink(missing_ok=True)


# ---- The state on disk -------------------------------------------------------------------------


class StateDb:
    """The state of one member on disk; opening it makes it if there is none."""

    def __init__(self, directory: Path, *, fsync: bool = True) -> None:
        """``directory`` exists, and its log is open: that keeps other processes away.

        Raises StateDbError or OSError. ``fsync=False`` trusts the power supply (``--fsync no``).
        """
        self._directory = directory
        self._path = directory / "state.db"
        self._fsync = fsync
        self._synchronous = f"PRAGMA synchronous = {'NORMAL' if fsync else 'OFF'}"
        # Guards the connection. Held during disk I/O, for seconds, and while ``save`` asks for rows,
        # which takes the store lock: who holds that one does not call in here.
        self._lock = threading.Lock()
        for name in ("new.db", "incoming.db", "outgoing.db"):
            _remove(directory / name)
        if not self._path.exists():
            self._create()
        self._sync_directory()  # a crash may have come just before the last sync
        with _sqlite_errors_told(self._path):
            self._connection = self._open()

    # ---- Any thread; one works, the others wait ----

    def load(self) -> tuple[StateHeader, KeyValueStore]:
        """The state as it was last saved; of a new directory, that before the first entry.

        Raises StateDbError if it is not exactly that, or OSError.
        """
        with self._locked() as connection:
            found = _load(connection, self._path)
            # Whoever was killed after a commit has left it in the -wal, perhaps not synced.
            self._checkpoint()
            return found

    def saved_index(self) -> int:
        """The log index that the state on disk has reached. Raises StateDbError or OSError."""
        with self._locked() as connection:
            return _read_header(connection, self._path, _WHAT_TO_DO).applied_index

    def save(self, header: StateHeader, slices: Iterable[Slice]) -> None:
        """Bring the state up to date, in one transaction. On return it is on the disk.

        Raises OSError or StateDbError, and whatever ``slices`` raises: the state on disk is then
        the one from before, or the new one but not yet safe. Either way it can be tried again.
        """
        with self._locked() as connection:
            saved = _read_header(connection, self._path, _WHAT_TO_DO).applied_index
            assert header.applied_index >= saved, (header.applied_index, saved)
            failpoint("save-begun")
            connection.execute("BEGIN IMMEDIATE")
            try:
                for part in _gathered(slices):
                    _write_slice(connection, part)
                    failpoint("save-rows-written")
                _write_header(connection, header)
                failpoint("save-header-written")
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            failpoint("save-committed")
            self._checkpoint()
            failpoint("save-synced")

    def open_snapshot(self) -> SnapshotReader:
        """The state as it was last saved, as a copy of its own. Raises OSError, StateDbError.

        A copy, rather than a transaction that reads for as long as a follower takes: saving goes
        on meanwhile, and the -wal stays short.
        """
        path = self._directory / "outgoing.db"
        with self._locked() as connection:
            header = _read_header(connection, self._path, _WHAT_TO_DO)
            try:
                # It never outlives this process, and to sync it would hold up the log.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute("VACUUM INTO ?", (str(path.absolute()),))
                failpoint("snapshot-copied")
                fd = os.open(path, os.O_RDWR)
            finally:
                connection.execute(self._synchronous)
                _remove(path)
        try:
            return SnapshotReader(header, fd)
        except BaseException:
            os.close(fd)
            raise

    def receive_snapshot(self) -> SnapshotWriter:
        """A place for a snapshot that arrives. One at a time. Raises OSError."""
        return SnapshotWriter(self, self._directory / "incoming.db")

    def close(self) -> None:
        """Let go of the files. Nothing is left to be saved."""
        with self._lock:
            self._connection.close()

    # ---- For SnapshotWriter ----

    def sync(self, fd: int) -> None:
        """fsync, unless that is switched off."""
        if self._fsync:
            os.fsync(fd)

    def replace_with(self, path: Path) -> None:
        """Make the database at ``path``, which is complete and synced, the state."""
        with self._locked() as connection:
            # What is left in the -wal would be taken for a part of the new file.
            self._checkpoint()
            connection.close()
            try:
                _wal_of(self._path).unlink(missing_ok=True)
                failpoint("install-closed")
                os.replace(path, self._path)
                failpoint("install-renamed")
                self._sync_directory()
                failpoint("install-synced")
            finally:
                self._connection = self._open()

    # ---- Caller holds the lock, or is alone ----

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _sqlite_errors_told(self._path):
            yield self._connection

    def _open(self) -> sqlite3.Connection:
        connection = _connect(self._path, "mode=rw")
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # so no -shm file either
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            connection.execute("PRAGMA secure_delete = OFF")
            _check_format(connection, self._path, _WHAT_TO_DO)
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() != (b"wal",):
                raise OSError(errno.ENOTSUP, "sqlite can't use a -wal here", str(self._path))
            # NORMAL syncs the -wal before a checkpoint and the database after it. FULL would sync
            # the -wal at each commit too, right before: every save ends with a checkpoint.
            connection.execute(self._synchronous)
            connection.execute("PRAGMA wal_autocheckpoint = 0")
        except BaseException:
            connection.close()
            raise
        return connection

    def _checkpoint(self) -> None:
        """Move what is in the -wal to the database, synced, and leave the -wal empty."""
        (busy, _frames, _moved) = self._connection.execute(
            "PRAGMA wal_checkpoint(TRUNCATE)"
        ).fetchone()
        if busy:
            raise OSError(errno.EBUSY, "the -wal could not be moved to the state", str(self._path))

    def _create(self) -> None:
        """Make the state before the first entry."""
        wal = _wal_of(self._path)
        if wal.exists() and wal.stat().st_size > 0:
            # sqlite would take it for the -wal of the new file.
            raise StateDbError(self._path, f"it is missing, though there is {wal.name}")
        path = self._directory / "new.db"
        with closing(_connect(path, "mode=rwc")) as connection:
            _initialise(connection)
        with path.open("rb") as file:
            self.sync(file.fileno())
        failpoint("create-synced")
        os.replace(path, self._path)
        failpoint("create-renamed")

    def _sync_directory(self) -> None:
        """Make names durable that were created, renamed or removed (raft-traps T7)."""
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.sync(fd)
        finally:
            os.close(fd)


def _wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _remove(path: Path) -> None:
    """Remove a database of which nothing is needed any more, if it is there."""
    for suffix in ("", "-wal", "-journal"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
