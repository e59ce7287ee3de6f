"""The driver and its disk: full, read-only, hanging, read from (see ``trio.py``)."""

from __future__ import annotations

import errno
import functools
import threading
import time
from collections.abc import Callable, Sequence

import pytest

import raft_node
import raft_snapshots
from kv_errors import NoSpaceError, NotPrimaryError, OutcomeUnknownError
from kv_types import Reply
from raft_log import RaftLog
from raft_status import NodeRole
from raft_types import AppendEntries, Entry, HardState, Ready, Room, Snapshot
from raft_watch import DISK_FLOOR_BYTES
from replication_log import ReplicationLog
from replication_log_format import DiskRefusesError
from tests.trio import PATIENCE_S, Server, Trio, command, eventually, in_thread

pytestmark = pytest.mark.slow


def test_disk_when_full_then_writes_are_refused_and_reads_go_on(
    shared_trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A definite refusal before it is quite full, so that what was accepted still fits (T18)."""
    leader = shared_trio.leader()
    leader.set("k", "before")

    with monkeypatch.context() as patch:
        patch.setattr(leader.disk, "bytes_free", lambda: DISK_FLOOR_BYTES - 1)
        eventually(lambda: _refuses_for_space(leader), "it notices")
        assert leader.get("k") == b"before"
        assert "disk" in leader.status.trouble

    eventually(lambda: not _refuses_for_space(leader), "there is room again")
    assert not leader.status.trouble


def test_disks_when_a_majority_has_no_room_then_writes_are_refused_though_the_primary_has(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both secondaries would run into the end of theirs, and nothing would be served."""
    trio = make_trio()
    leader = trio.leader()
    leader.set("k", "before")

    with monkeypatch.context() as patch:
        for other in trio.others(leader):
            patch.setattr(other.disk, "bytes_free", lambda: DISK_FLOOR_BYTES - 1)
        eventually(lambda: _refuses_for_space(leader), "it hears of it")
        assert leader.get("k") == b"before"
        assert "a majority's disks are almost full" in leader.status.trouble
        assert all("almost full" in other.status.trouble for other in trio.others(leader))

    eventually(lambda: not _refuses_for_space(leader), "there is room again")
    assert not leader.status.trouble


def test_disk_when_a_secondarys_is_full_then_it_names_the_primary_to_who_writes(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own room is nothing to a write that the primary does: a refusal would be no redirect."""
    trio = make_trio()
    leader = trio.leader()
    victim = trio.others(leader)[0]

    monkeypatch.setattr(victim.disk, "bytes_free", lambda: DISK_FLOOR_BYTES - 1)
    eventually(lambda: victim.node.room is Room.NONE, "it notices")

    with pytest.raises(NotPrimaryError) as told:
        victim.set("k", "v")
    assert told.value.node_id == leader.status.identity.node_id
    leader.set("k", "v")


def test_disk_when_it_takes_nothing_then_the_node_waits_and_goes_on_by_itself(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full at once, or read-only: the others go on, and there is nothing to be started again."""
    trio = make_trio()
    leader = trio.leader()
    victim = trio.others(leader)[0]

    def refuse(hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        if hard_state is not None or entries:
            raise DiskRefusesError(errno.EROFS, "read-only")

    with monkeypatch.context() as patch:
        patch.setattr(victim.disk, "append", refuse)
        index = leader.set("k", "v")
        eventually(lambda: "read-only" in victim.status.trouble, "it says so")
        index = leader.set("k", "w")
        assert victim.status.applied_index < index

    trio.await_applied(index)
    assert not victim.status.trouble


def test_disk_when_a_lone_node_s_hangs_then_reads_go_on(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else could lead; and what is read is in memory."""
    trio = make_trio(count=1)
    server = trio.leader()
    server.set("k", "v")

    def refuse(hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        raise DiskRefusesError(errno.ENOSPC, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(server.disk, "append", refuse)
        write = in_thread(lambda: server.set("k", "w"))
        eventually(lambda: server.node._disk_watch.hangs, "it has waited for long")
        assert server.get("k") == b"v"
        assert "full" in server.status.trouble
        assert server.node.is_primary

    assert write.result(timeout=PATIENCE_S)
    assert server.get("k") == b"w"


def test_state_of_a_later_term_when_it_takes_the_place_of_the_log_then_the_term_is_saved_first(
    make_trio: Callable[..., Trio],
) -> None:
    """A log can't begin in a term that it has not heard of.

    (A disk that had hung while the leadership changed left a node that could not start again.)
    """
    trio = make_trio()
    server = trio.others(trio.leader())[0]
    trio.isolate(server)
    node, core = server.node, server.node._core
    term = core.term + 5

    def restored() -> Ready | None:
        with node._lock:
            if core.is_writing:
                return None  # another thread has a Ready, and there is one at a time
            core.step(AppendEntries("f" * 16, core.member_id, term, 0, 0, (), 0, 0))
            core.restore(Snapshot(1000, term, core.membership, 1))
            server.store.applied_index = node._applied_index = 1000
            return core.ready()

    ready = eventually(restored, "its disk has nothing to do")
    assert ready.hard_state is not None and ready.log_base is not None

    node._write(ready)

    assert server.disk.hard_state.term == term
    assert server.disk.first_index == 1001


def test_disk_when_the_primarys_hangs_then_another_leads(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its heartbeats still flow; when its disk answers again it follows (raft-traps T23)."""
    trio = make_trio()
    old = trio.leader()
    answers, append = threading.Event(), old.disk.append

    def hang(hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        answers.wait()
        append(hard_state, entries)

    monkeypatch.setattr(old.disk, "append", hang)
    writer = threading.Thread(target=lambda: _refuses_for_space(old), daemon=True)
    writer.start()

    new = trio.leader(among=trio.others(old))
    assert "hangs" in old.status.trouble
    index = new.set("k", "after")

    answers.set()
    writer.join(PATIENCE_S)
    trio.await_applied(index)
    eventually(lambda: not old.status.trouble, "it notices that the disk answers again")
    assert old.status.role is NodeRole.SECONDARY


def test_follower_when_its_own_disk_hangs_then_it_does_not_doubt_its_leader(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the leader has sent meanwhile may lie unread in its socket (raft-traps T23)."""
    trio = make_trio()
    leader = trio.leader()
    slow = trio.others(leader)[0]
    core, append = slow.node._core, slow.disk.append
    answers, hangs = threading.Event(), threading.Event()

    def hang(hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        hangs.set()
        answers.wait()
        append(hard_state, entries)

    monkeypatch.setattr(slow.disk, "append", hang)
    index = leader.set("k", "v")
    hangs.wait()
    ticks: list[None] = []
    looks: list[None] = []
    monkeypatch.setattr(core, "tick", lambda: ticks.append(None))
    monkeypatch.setattr(core, "check_invariants", lambda: looks.append(None))

    eventually(lambda: len(looks) > 20, "the timer runs")

    assert ticks == []
    answers.set()
    eventually(lambda: ticks, "it ages again")
    monkeypatch.undo()
    trio.await_applied(index)


def test_follower_when_it_applies_from_disk_then_only_what_its_disk_holds(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others have committed what it has yet to write, its disk may hold something else."""
    trio = make_trio()
    leader = trio.leader()
    late = trio.others(leader)[0]
    for number in range(20):
        leader.set(f"k{number}", "v")
    trio.await_applied(leader.status.last_index)
    monkeypatch.setattr(late.node._keeper, "save", lambda: None)  # it will have all to apply
    late.stop()
    index = leader.set("k", "last")
    monkeypatch.setattr(
        raft_snapshots, "RaftLog", lambda last, runs, _, **base: RaftLog(last, runs, (), **base)
    )
    monkeypatch.setattr(raft_node, "APPLY_BYTES_MAX", 1)  # one entry at a time
    has_read = threading.Event()
    append, read = ReplicationLog.append, ReplicationLog.read
    beyond: list[int] = []

    def hang(disk: ReplicationLog, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        if disk is late.disk and entries:
            has_read.wait()
        append(disk, hard_state, entries)

    def noted(disk: ReplicationLog, first: int, last: int, bytes_max: int) -> list[Entry]:
        if disk is late.disk:
            eventually(lambda: late.node._core.commit_index == index, "it hears of the commit")
            beyond.extend(range(disk.last_index + 1, last + 1))
            if first == 10:
                has_read.set()
        return read(disk, first, last, bytes_max)

    monkeypatch.setattr(ReplicationLog, "append", hang)
    monkeypatch.setattr(ReplicationLog, "read", noted)
    late.start()

    trio.await_applied(index)
    assert beyond == []


def _refuses_for_space(server: Server) -> bool:
    try:
        server.set("k", "before")
    except NoSpaceError:
        return True
    except OutcomeUnknownError:
        pass
    return False


def test_follower_when_far_behind_the_leaders_memory_then_it_catches_up_from_disk(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window of recent entries is bounded; the log on disk is not."""
    monkeypatch.setattr(
        raft_snapshots, "RaftLog", functools.partial(RaftLog, window_bytes_max=4096)
    )
    trio = make_trio()
    leader = trio.leader()
    late = trio.others(leader)[0]
    late.stop()
    for start in range(0, 2000, 100):
        keys = [f"k{i}" for i in range(start, start + 100)]
        done = leader.node.propose([command("SET", key, "x" * 100) for key in keys])

    late.start()

    trio.await_applied(done.last)
    assert late.holds("k0") == late.holds("k1999") == b"x" * 100
    assert late.status.state_hash == leader.status.state_hash


def test_applying_when_it_takes_long_then_the_threads_that_hear_peers_leave_it(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is deaf meanwhile is taken for dead, or takes the others for that."""
    trio = make_trio()
    leader = trio.leader()
    leader.set("k", "before")
    by: dict[str, list[str]] = {"quick": [], "slow": [], "large": []}
    term, apply = leader.status.term, leader.store.apply

    def slow(index: int, data: bytes) -> Reply:
        (key,) = [key for key in by if key.encode() in data] or ["quick"]
        by[key].append(threading.current_thread().name)
        if key == "slow":
            time.sleep(2 * raft_node.QUICK_S)
        return apply(index, data)

    monkeypatch.setattr(leader.store, "apply", slow)
    for _ in range(5):
        leader.node.propose([command("SET", "quick", "1")])
    leader.node.propose([command("SET", "slow", "1")] * 20)
    leader.node.propose([command("SET", "large", "1" * (2 * raft_node.QUICK_BYTES_MAX))])

    assert set(by["slow"][1:]) == set(by["large"]) == {"raft-applier"}
    assert len(by["slow"]) == 20
    assert set(by["quick"]) != {"raft-applier"}  # which is what makes them quick
    assert leader.status.term == term
