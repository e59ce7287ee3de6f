"""The keeper of the state by itself: what it does when the disk takes no snapshot, in or out."""

from __future__ import annotations

import errno
import io
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

import raft_snapshots
from kv_members import backup
from kv_store import KeyValueStore, Slice
from raft_snapshots import StateKeeper
from raft_types import (
    Entry,
    EntryKind,
    HardState,
    Identity,
    Member,
    MemberId,
    Membership,
    Message,
    Snapshot,
    SnapshotChunk,
    SnapshotOutcome,
    SnapshotReply,
)
from replication_log import ReplicationLog
from state_db import SnapshotReader, StateDb, StateHeader
from tests.cluster import eventually

CHUNK = SnapshotChunk("leader", "me", 1, 5, 0, bytes(100), False)


def no_room(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "no room")


class FullFile(io.RawIOBase):
    """Takes nothing: what is buffered for it is tried again when it is closed."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        no_room()


class FakeHost:
    """A node that notes what it is to send."""

    is_suspect = False

    def __init__(self) -> None:
        self.posted: list[Message] = []
        self.dropped: list[int] = []
        self.ended: list[tuple[MemberId, int | None]] = []
        self.while_installing: Callable[[], None] = lambda: None
        self.answers: list[SnapshotOutcome] = []

    def begin_flush(self) -> tuple[StateHeader, Iterator[Slice]]:
        return StateHeader(), iter(())

    def end_flush(self, *, saved: bool) -> None:
        pass

    def drop_log(self, index: int) -> None:
        self.dropped.append(index)

    def snapshot_ended(self, member_id: MemberId, index: int | None) -> None:
        self.ended.append((member_id, index))

    def post(self, message: Message) -> None:
        self.posted.append(message)

    def answer_chunk(
        self, chunk: SnapshotChunk, received_bytes: int, outcome: SnapshotOutcome
    ) -> None:
        self.answers.append(outcome)

    def install(
        self, snapshot: Snapshot, received: KeyValueStore, make_durable: Callable[[], None]
    ) -> bool:
        self.while_installing()
        return True


class Kept:
    """A keeper with files of its own."""

    def __init__(self, directory: Path) -> None:
        self.disk = ReplicationLog(directory)
        self.disk.save_identity(Identity("c", "me", "node1"))
        self.state = StateDb(directory)
        self.host = FakeHost()
        self.keeper = StateKeeper("me", self.disk, self.state, self.host, 0, 1 << 20)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path)
    yield kept
    kept.state.close()
    kept.disk.close()


def test_sending_when_the_disk_has_no_room_for_the_copy_then_it_is_tried_again(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread lives on, and with it the primary; the follower gets its state later."""
    monkeypatch.setattr(raft_snapshots, "RETRY_S", 0.05)
    monkeypatch.setattr(raft_snapshots, "POLL_S", 0.01)
    kept.keeper.lead(1)
    kept.keeper.want("follower", 0)
    thread = threading.Thread(target=kept.keeper.run)
    with monkeypatch.context() as patch:
        patch.setattr(kept.state, "open_snapshot", no_room)
        thread.start()
        eventually(lambda: caplog.text.count("a snapshot can't be sent") > 1, "it fails, twice")

    eventually(lambda: kept.host.posted, "it is sent")

    kept.keeper.lead(0)
    kept.keeper.stop()
    thread.join()


def test_sending_when_the_follower_is_silent_for_long_then_it_is_given_up(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who died, and was removed meanwhile, would keep a copy of the state and the log for ever."""
    kept.keeper.lead(1)
    kept.keeper._begin_sending("follower")
    assert kept.keeper.progress()

    kept.keeper._resend_late()
    assert kept.host.ended == []
    monkeypatch.setattr(raft_snapshots, "SILENCE_S", -1.0)
    kept.keeper._resend_late()

    assert kept.host.ended == [("follower", None)]
    assert not kept.keeper.progress()


def test_sending_when_the_leadership_ends_then_it_is_over(kept: Kept) -> None:
    """Nobody answers a former leader: its copies of the state would stay open for ever."""
    kept.keeper.lead(1)
    kept.keeper._begin_sending("follower")
    reader = kept.keeper._outgoing["follower"].reader

    kept.keeper.lead(0)

    assert not kept.keeper.progress()
    thread = threading.Thread(target=kept.keeper.run)
    thread.start()
    try:
        eventually(lambda: _is_closed(reader), "the copy is closed")
    finally:
        kept.keeper.stop()
        thread.join()


def _is_closed(reader: SnapshotReader) -> bool:
    try:
        reader.read(0, 1)
    except OSError:
        return True
    return False


def test_follower_when_it_needs_a_state_again_at_once_then_it_is_named(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    """To install one takes longer than the log behind it lasts: it would go on for ever (T43)."""
    follower = Member("follower", "node2", "127.0.0.1", 1, 2, voter=True)
    members = Membership((follower,))
    kept.keeper.lead(1)
    kept.keeper.want("follower", 0)
    kept.keeper._begin_sending("follower")
    assert kept.keeper.troubles(members) == []
    (chunk,) = kept.host.posted
    assert isinstance(chunk, SnapshotChunk)
    installed = SnapshotOutcome.INSTALLED
    kept.keeper.on_reply(SnapshotReply("follower", "me", 1, chunk.snapshot_id, 0, installed))

    kept.keeper.want("follower", 1)  # it had gone on before it fell behind anew
    assert kept.keeper.troubles(members) == []
    kept.keeper.want("follower", 0)

    assert kept.keeper.troubles(members) == [
        "node2 can't keep up with the log: give more --max-log"
    ]
    assert "can't keep up" in caplog.text


def test_log_behind_a_state_just_installed_is_kept_for_a_while(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between "installed" and the first append a save must not drop what comes next."""
    kept.keeper.lead(1)
    kept.keeper._begin_sending("follower")
    (chunk,) = kept.host.posted
    assert isinstance(chunk, SnapshotChunk)
    installed = SnapshotOutcome.INSTALLED
    kept.keeper.on_reply(SnapshotReply("follower", "me", 1, chunk.snapshot_id, 0, installed))
    kept.disk.append(HardState(1, None), [Entry(i, 1, EntryKind.NOOP, b"") for i in range(1, 30)])
    monkeypatch.setattr(raft_snapshots, "TAIL_ENTRIES_MAX", 5)
    kept.keeper._saved_index = 29

    kept.keeper._drop_log()
    assert kept.host.dropped == []
    monkeypatch.setattr(raft_snapshots, "PINNED_AFTER_S", 0.0)
    kept.keeper._drop_log()

    assert kept.host.dropped == [25]  # the tail is bounded in entries, however small they are


def test_saves_of_nodes_whose_logs_grow_alike_are_due_at_different_moments(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all saved at once, no majority would be free to answer clients meanwhile."""
    log_bytes = 0
    monkeypatch.setattr(ReplicationLog, "size_bytes", property(lambda _: log_bytes))
    monkeypatch.setattr(random, "uniform", lambda low, _: low)
    kept.keeper.save()
    due_at = (1 << 20) / 2 * raft_snapshots.SAVE_SHARE_MIN  # of the fixture's log

    log_bytes = int(due_at)
    assert not kept.keeper._is_save_due()
    log_bytes += 1
    assert kept.keeper._is_save_due()
    monkeypatch.setattr(random, "uniform", lambda _, high: high)
    kept.keeper.save()
    log_bytes += int(due_at) + 1
    assert not kept.keeper._is_save_due(), "another one's save would be due by now"
    log_bytes += int(due_at)
    assert kept.keeper._is_save_due()


def test_transfers_when_many_followers_need_one_then_few_run_at_a_time(kept: Kept) -> None:
    """Each is a copy of the state on this node's disk (T42)."""
    kept.keeper.lead(1)
    for name in "abcd":
        kept.keeper.want(name, 0)
    with kept.keeper._lock:
        assert len(kept.keeper._may_begin_locked()) == 2
    kept.keeper._begin_sending("a")
    with kept.keeper._lock:
        assert len(kept.keeper._may_begin_locked()) == 1


def test_reader_when_closed_then_reads_no_more(kept: Kept, tmp_path: Path) -> None:
    """The descriptor's number may be another file's by then: its bytes are not to be sent."""
    reader = kept.state.open_snapshot()
    reader.close()
    with (tmp_path / "another").open("wb"), pytest.raises(OSError, match="Bad file descriptor"):
        reader.read(0, 100)

    reader.close()


class Meddled:
    """A lock, of which another thread always makes use just before."""

    def __init__(self, lock: threading.Lock, before: Callable[[], None]) -> None:
        self._lock, self._before, self._is_before = lock, before, False

    def __enter__(self) -> None:
        if not self._is_before:
            self._is_before = True
            self._before()
            self._is_before = False
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def test_last_chunk_when_the_installer_looks_at_any_moment_then_it_installs_once(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was whole for the installer before it was handed over, and was then handed over again."""
    donor = kept.state.open_snapshot()
    data = donor.read(0, donor.size_bytes)
    donor.close()
    kept.keeper.on_chunk(SnapshotChunk("leader", "me", 1, 5, 0, data[:10], False))
    meddled = Meddled(kept.keeper._lock, kept.keeper._install_received)
    monkeypatch.setattr(kept.keeper, "_lock", meddled)

    kept.keeper.on_chunk(SnapshotChunk("leader", "me", 1, 5, 10, data[10:], True))
    kept.keeper._install_received()

    assert kept.host.answers == [SnapshotOutcome.MORE, SnapshotOutcome.INSTALLED]


def test_backup_while_a_state_is_installed_waits_for_it(kept: Kept) -> None:
    """To save in between would write rows of one state under the index of another."""
    donor = kept.state.open_snapshot()
    data = donor.read(0, donor.size_bytes)
    donor.close()
    backed_up: list[bool] = []

    def back_up() -> None:
        kept.keeper.open_backup().close()
        backed_up.append(True)

    thread = threading.Thread(target=back_up)

    def while_installing() -> None:
        thread.start()
        thread.join(timeout=0.2)
        assert not backed_up

    kept.host.while_installing = while_installing
    kept.keeper.on_chunk(SnapshotChunk("leader", "me", 1, 5, 0, data, True))
    kept.keeper._install_received()
    thread.join()

    assert backed_up


def test_backup_when_the_disk_has_no_room_for_the_copy_then_it_is_refused(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason, where a connection that just ends would leave the manager to guess."""
    monkeypatch.setattr(kept.state, "open_snapshot", no_room)

    slots = threading.Semaphore(1)
    for _ in range(2):  # what is refused takes no slot
        (line,) = backup(kept.keeper, slots)  # type: ignore[arg-type]  # which the node would ask

        answer = json.loads(line)
        assert (answer["status"], answer["code"]) == ("ERROR", "NO_SPACE")
        assert "no room" in answer["message"]


def test_backup_when_as_many_as_may_be_are_under_way_then_another_is_refused(kept: Kept) -> None:
    """Each holds a copy of the state on the disk, however slowly its client reads."""
    slots = threading.Semaphore(1)
    first = backup(kept.keeper, slots)  # type: ignore[arg-type]
    assert json.loads(next(first))["status"] == "OK"

    (line,) = backup(kept.keeper, slots)  # type: ignore[arg-type]

    assert json.loads(line)["code"] == "BUSY"
    first.close()  # its client has gone
    again = backup(kept.keeper, slots)  # type: ignore[arg-type]
    assert json.loads(next(again))["status"] == "OK"
    again.close()


def test_receiving_when_no_file_can_be_made_then_the_leader_is_told(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal, so that it comes again later, instead of the end of this process."""
    with monkeypatch.context() as patch:
        patch.setattr(kept.state, "receive_snapshot", no_room)
        kept.keeper.on_chunk(CHUNK)

    kept.keeper.on_chunk(CHUNK)

    assert kept.host.answers == [SnapshotOutcome.REFUSED, SnapshotOutcome.MORE]


def test_receiving_when_the_disk_fills_up_then_the_leader_is_told(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Closing a file writes what is left of it: that it can't is no news, and ends nothing."""
    full = kept.state.receive_snapshot()
    full._file.close()
    full._file = io.BufferedWriter(FullFile())
    with monkeypatch.context() as patch:
        patch.setattr(kept.state, "receive_snapshot", lambda: full)
        kept.keeper.on_chunk(CHUNK)

    assert kept.host.answers == [SnapshotOutcome.REFUSED]
    assert not (tmp_path / "incoming.db").exists()
    kept.keeper.on_chunk(CHUNK)
    assert kept.host.answers[-1] is SnapshotOutcome.MORE
