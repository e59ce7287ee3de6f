"""What must have happened before what, in the driver and where it moves states.

Each of these was found missing by a mutant that no other test noticed (see ``mutant_table.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from kv_store import Flush, KeyValueStore, Slice
from raft_snapshots import StateKeeper, fit_log, found_cluster, restore_backup
from raft_transport import PeerLink
from raft_types import (
    AppendReply,
    HardState,
    MemberId,
    Membership,
    Message,
    Snapshot,
    SnapshotChunk,
    SnapshotOutcome,
    VoteReply,
    VoteRequest,
)
from replication_log import ReplicationLog
from state_db import StateDb, StateHeader
from tests.log_files import VOTE, entry, open_log
from tests.raft_servers import member
from tests.states import TERM, flush, open_db, snapshot, state, write, write_lines
from tests.trio import QUICK, Server, Trio


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Trio]:
    """Three nodes that have not started."""
    trio = Trio(tmp_path, QUICK)
    yield trio
    trio.stop()
    assert not any(server.fatal for server in trio.servers)


# ---- The driver: disk, then messages (fault-model I9) ------------------------------------------


def _broken_promise(server: Server, message: Message) -> str:
    """What the message says that the disk of its sender does not hold; "" if it holds all."""
    saved, held = server.disk._hard_state, server.disk.last_index
    if isinstance(message, VoteRequest | VoteReply) and message.pre_vote:
        return ""
    if message.term > saved.term:
        return f"term {message.term}, on disk {saved.term}"
    if isinstance(message, AppendReply) and message.success and message.match_index > held:
        return f"match {message.match_index}, on disk {held}"
    votes = isinstance(message, VoteReply) and message.granted
    if votes and message.term == saved.term and saved.voted_for != message.to:
        return f"a vote for {message.to}, on disk {saved.voted_for}"
    return ""


@pytest.mark.slow
def test_message_when_it_leaves_then_what_it_says_is_on_the_disk(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms, votes and entries, at the instant of each message. Source: thesis 3.8; T1, T4."""
    broken: list[str] = []
    seen: set[type[Message]] = set()
    post = PeerLink.post

    def checked(server: Server, link: PeerLink, message: Message) -> None:
        seen.add(type(message))
        if flaw := _broken_promise(server, message):
            broken.append(f"{type(message).__name__}: {flaw}")
        post(link, message)

    servers: dict[MemberId, Server] = {s.member.member_id: s for s in trio.servers}
    monkeypatch.setattr(
        PeerLink, "post", lambda link, message: checked(servers[message.sender], link, message)
    )

    trio.start()
    leader = trio.leader()
    for number in range(50):
        index = leader.set("k", str(number))
    trio.await_applied(index)

    assert not broken
    assert seen >= {AppendReply, VoteReply, VoteRequest}


# ---- States: what is old, repeated or not saved ------------------------------------------------


@pytest.mark.slow
def test_install_when_the_node_has_got_further_by_itself_then_nothing_is_changed(
    trio: Trio,
) -> None:
    """A state that was under way for long must not take the node back (raft-traps T39)."""
    server = trio.start().leader()
    server.set("k", "v")
    old = Snapshot(1, 1, server.node.membership, 1)

    def rename() -> None:
        raise AssertionError("it was put in place")

    assert not server.node.install(old, KeyValueStore(), rename)
    assert server.get("k") == b"v"


def test_log_when_the_state_is_of_a_later_term_then_it_begins_anew_in_that_term(
    tmp_path: Path,
) -> None:
    """What others hold on a majority may be applied, and saved, before the own log has it.

    A crash then leaves a state of a term that the log has not heard of.
    """
    with open_log(tmp_path) as log:
        log.append(HardState(2, "b" * 16), [entry(index, 2) for index in range(1, 4)])

        assert fit_log(log, Snapshot(6, 3, Membership(), 0))

    with open_log(tmp_path) as log:
        assert (log.first_index, log.last_index, log.term_at(6)) == (7, 6, 3)
        assert log.hard_state == HardState(3, None)
        assert not fit_log(log, Snapshot(6, 3, Membership(), 0))


def test_restore_when_one_of_a_later_term_was_interrupted_then_an_older_backup_can_be_taken(
    tmp_path: Path,
) -> None:
    """No term may come again, and the founder's entry is of the one that was reached."""
    store, backup = KeyValueStore(), tmp_path / "backup"
    write_lines(store, "SET k v")
    with open_db(tmp_path) as db:
        flush(store, db)
        backup.write_bytes(snapshot(db))
    with open_log(tmp_path) as log, open_db(tmp_path) as db:
        log.append(HardState(TERM + 2, None), [])
        log.reset(50, TERM + 2)

        restore_backup(backup, log, db)
        found_cluster(log, member("a"))

        assert (log.last_index, log.term_at(log.last_index)) == (2, TERM + 2)


def test_log_when_it_differs_from_the_state_then_it_begins_anew_behind_it(tmp_path: Path) -> None:
    """A crash came between the state's arrival and the reset of a log that it contradicts.

    What follows an entry that was never committed was not committed either (raft-traps T39).
    """
    with open_log(tmp_path) as log:
        log.append(HardState(2, None), [entry(index) for index in range(1, 6)])

        assert fit_log(log, Snapshot(3, 2, Membership(), 0))

        assert (log.first_index, log.last_index, log.term_at(3)) == (4, 3, 2)


def test_log_when_it_agrees_with_the_state_then_it_is_kept(tmp_path: Path) -> None:
    """What follows may be committed (raft-traps T39)."""
    with open_log(tmp_path) as log:
        log.append(HardState(2, None), [entry(index) for index in range(1, 6)])

        assert not fit_log(log, Snapshot(3, 1, Membership(), 0))

        assert (log.first_index, log.last_index) == (1, 5)


class FakeHost:
    """The node, as its state keeper sees it: a store, and what was asked of it."""

    def __init__(self, disk: ReplicationLog) -> None:
        self.store = KeyValueStore()
        self.is_suspect = False
        self.did: list[str] = []
        self.answers: list[tuple[int, SnapshotOutcome]] = []
        self.answered: list[int] = []  # which transfers
        self.installed: KeyValueStore | None = None
        self._disk = disk

    def begin_flush(self) -> tuple[StateHeader, Iterator[Slice]]:
        begun: Flush = self.store.begin_flush()
        header = StateHeader.of(begun, 1, Membership().encode(), 0)
        return header, begun.slices(nullcontext())

    def end_flush(self, *, saved: bool) -> None:
        self.store.end_flush(saved=saved)
        self.did.append("saved" if saved else "not saved")

    def drop_log(self, index: int) -> None:
        self.did.append("log dropped")
        self._disk.drop_before(index)

    def snapshot_ended(self, member_id: MemberId, index: int | None) -> None:
        """No transfer begins here."""

    def post(self, message: Message) -> None:
        """Nobody listens."""

    def answer_chunk(
        self, chunk: SnapshotChunk, received_bytes: int, outcome: SnapshotOutcome
    ) -> None:
        self.answers.append((received_bytes, outcome))
        self.answered.append(chunk.snapshot_id)

    def install(
        self, snapshot: Snapshot, received: KeyValueStore, make_durable: Callable[[], None]
    ) -> bool:
        self.installed = received
        return False


@pytest.fixture
def log(tmp_path: Path) -> Iterator[ReplicationLog]:
    """Thirty entries in many segments, of which most may go once they are in the state."""
    with open_log(tmp_path, segment_bytes_max=300) as log:
        log.append(VOTE, [])
        for index in range(1, 31):
            log.append(None, [entry(index)])
        yield log


def keeper_of(host: FakeHost, log: ReplicationLog, db: StateDb) -> StateKeeper:
    return StateKeeper("a" * 16, log, db, host, saved_index=0, log_bytes_max=1000)


def test_save_when_the_state_can_not_be_saved_then_the_log_stays_whole(
    tmp_path: Path, log: ReplicationLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the log says is dropped after it is on the disk elsewhere (fault-model M16, T37)."""
    host = FakeHost(log)
    for number in range(30):
        write(host.store, b"SET", b"key", b"%d" % number)

    def fail(header: StateHeader, slices: Iterator[Slice]) -> None:
        host.did.append("tried")
        raise OSError("no space")

    with open_db(tmp_path) as db:
        keeper = keeper_of(host, log, db)
        with monkeypatch.context() as patch:
            patch.setattr(db, "save", fail)
            keeper.save()
        assert host.did == ["tried", "not saved"]
        assert (log.first_index, keeper.trouble) == (1, "the state can't be saved: no space")
        keeper.save()

        assert host.did[2:] == ["saved", "log dropped"]
        assert log.first_index > 1
        assert db.load()[0].applied_index == 30


def stream_of(store: KeyValueStore, db: StateDb) -> bytes:
    """What a leader with this state would send."""
    begun = store.begin_flush()
    header = StateHeader.of(begun, 1, Membership().encode(), 0)
    db.save(header, begun.slices(nullcontext()))
    store.end_flush(saved=True)
    return snapshot(db)


def test_chunk_of_another_transfer_while_one_is_installed_gets_no_answer_yet(
    tmp_path: Path, log: ReplicationLog
) -> None:
    """ "Installed" is said of what was installed: to install takes seconds, and leaders change.

    Told that the follower has *its* state, a new leader would count on entries that are not there.
    """
    sent = KeyValueStore()
    write(sent, b"SET", b"key", b"value")
    with open_db(tmp_path) as db:
        data = stream_of(sent, db)
        host = FakeHost(log)
        keeper = keeper_of(host, log, db)

        keeper.on_chunk(SnapshotChunk("b" * 16, "a" * 16, 1, 7, 0, data, True))
        keeper.on_chunk(SnapshotChunk("b" * 16, "a" * 16, 1, 7, 0, data, True))
        keeper.on_chunk(SnapshotChunk("c" * 16, "a" * 16, 2, 8, 0, data[:100], False))
        assert host.answers == []
        keeper._install_received()
        keeper.on_chunk(SnapshotChunk("c" * 16, "a" * 16, 2, 8, 0, data[:100], False))

    assert host.answered == [7, 8]
    assert [outcome for _, outcome in host.answers] == [
        SnapshotOutcome.INSTALLED,
        SnapshotOutcome.MORE,
    ]


def test_chunk_of_another_transfer_begins_anew_and_the_old_one_is_refused(
    tmp_path: Path, log: ReplicationLog
) -> None:
    """Two leaders' states are two databases: their pieces do not fit together (raft-traps T42)."""
    store = KeyValueStore()
    with open_db(tmp_path) as db:
        chunks = []
        for number in (1, 2):
            write(store, b"SET", b"key", b"value %d" % number)
            data = stream_of(store, db)
            for start, end, is_last in ((0, 100, False), (100, None, True)):
                part = data[start:end]
                chunks.append(SnapshotChunk("b" * 16, "a" * 16, 1, number, start, part, is_last))
        first, first_rest, second, second_rest = chunks
        host = FakeHost(log)
        keeper = keeper_of(host, log, db)

        for chunk in (first, second, first_rest, second_rest):
            keeper.on_chunk(chunk)
        keeper._install_received()

    more, refused = SnapshotOutcome.MORE, SnapshotOutcome.REFUSED
    assert host.answers[:-1] == [(100, more), (100, more), (0, refused)]
    assert host.answered == [1, 2, 1, 2]
    assert host.installed is not None
    assert state(host.installed) == state(store)


def test_chunk_when_it_is_repeated_or_too_early_then_it_is_not_written(
    tmp_path: Path, log: ReplicationLog
) -> None:
    """The stream is put together in its order, whatever comes twice or too soon (raft-traps T42)."""
    sent = KeyValueStore()
    write(sent, b"SET", b"key", b"value")
    with open_db(tmp_path) as db:
        data = stream_of(sent, db)
        host = FakeHost(log)
        keeper = keeper_of(host, log, db)
        third = len(data) // 3
        first, second, last = (
            SnapshotChunk("b" * 16, "a" * 16, 1, 7, start, data[start:end], end is None)
            for start, end in ((0, third), (third, 2 * third), (2 * third, None))
        )

        for chunk in (second, first, first, last, second, first, second, last):
            keeper.on_chunk(chunk)
        keeper._install_received()

    more, refused = SnapshotOutcome.MORE, SnapshotOutcome.REFUSED
    assert host.answers[0] == (0, refused)
    got = [third, third, third, 2 * third, 2 * third, 2 * third]
    assert host.answers[1:-1] == [(received_bytes, more) for received_bytes in got]
    assert host.answers[-1] == (len(data), SnapshotOutcome.INSTALLED)
    assert host.installed is not None
    assert state(host.installed) == state(sent)
