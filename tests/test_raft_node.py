"""The driver: real threads, sockets and disks around the core (see ``trio.py``)."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from kv_errors import (
    BadRequestError,
    BusyError,
    KVError,
    NoPrimaryError,
    NotPrimaryError,
    OutcomeUnknownError,
)
from kv_members import change_members
from raft_core import TooMuchUncommittedError, TransferUnderWayError
from raft_frames import FrameError
from raft_status import NodeConfig, NodeRole, Pending
from raft_types import AppendReply, Entry, HashReport, Member, Membership, SnapshotChunk, new_id
from tests.trio import PATIENCE_S, QUICK, Server, Trio, command, eventually, in_thread

pytestmark = pytest.mark.slow

T = TypeVar("T")

# Nothing but evidence of death can cause an election within the patience of a test.
NEVER = NodeConfig(2.0, 60.0, 90.0)
# How much later than its due time a busy machine may do something.
SLACK_S = 1.0


# ---- Writes and reads --------------------------------------------------------------------------


def test_propose_when_a_majority_runs_then_it_replies_and_all_nodes_apply(
    shared_trio: Trio,
) -> None:
    """Promise G6: equal applied index means equal state."""
    leader = shared_trio.leader()

    index = leader.set("a", "1")

    shared_trio.await_applied(index)
    assert [server.holds("a") for server in shared_trio.servers] == [b"1"] * 3
    assert len({server.status.state_hash for server in shared_trio.servers}) == 1


def test_propose_when_given_several_commands_then_replies_stand_in_their_order(
    shared_trio: Trio,
) -> None:
    """A batch has one run of indexes; an error of one command is its reply, and stops no other."""
    leader = shared_trio.leader()

    done = leader.node.propose(
        [command("SET", "n", "5"), command("INCRBY", "n", "2"), command("APPEND", "n", "x")]
    )
    after = leader.node.propose([command("INCR", "n"), command("DEL", "n")])

    assert done.replies == ["OK", 7, 2]
    assert done.last == done.first + 2
    assert after.first > done.last
    not_a_number, deleted = after.replies
    assert isinstance(not_a_number, BadRequestError)
    assert deleted == 1


def test_propose_when_many_threads_write_then_each_gets_its_own_reply(shared_trio: Trio) -> None:
    """Replies are matched by log index, however writes were batched."""
    leader = shared_trio.leader()
    leader.node.propose([command("DEL", "count")])

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(leader.node.propose, [command("INCR", "count")]) for _ in range(320)]
    done = sorted((future.result() for future in futures), key=lambda one: one.first)

    assert [one.replies for one in done] == [[n] for n in range(1, 321)]


def test_propose_when_the_node_is_a_secondary_then_it_names_the_primary(shared_trio: Trio) -> None:
    """Nothing was proposed, so the error is definite and says where to go."""
    leader = shared_trio.leader()
    for follower in shared_trio.others(leader):
        with pytest.raises(NotPrimaryError) as refused:
            follower.node.propose([command("SET", "k", "v")])
        with pytest.raises(NotPrimaryError):
            follower.node.read_barrier()

        told = refused.value
        assert (told.node_id, told.port) == (leader.member.node_id, leader.member.port)


def test_propose_when_no_primary_is_known_then_it_is_refused(
    make_trio: Callable[..., Trio],
) -> None:
    """Definite as well: no primary, no proposal."""
    trio = make_trio(NEVER)

    for server in trio.servers:
        with pytest.raises(NoPrimaryError):
            server.node.propose([command("SET", "k", "v")])
        with pytest.raises(NoPrimaryError):
            server.node.read_barrier()
        assert server.node.wait_for_primary(0.02) is None
        assert server.status.role is NodeRole.SECONDARY


def test_read_barrier_when_it_returns_then_every_acknowledged_write_is_seen(
    shared_trio: Trio,
) -> None:
    """Thesis 6.4: the read index is at least the commit index when the read arrived."""
    leader = shared_trio.leader()

    def write_and_read(number: int) -> None:
        for i in range(50):
            leader.set(f"own{number}", str(i))
            assert leader.get(f"own{number}") == str(i).encode()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_read, range(4)))


def test_upkeep_when_the_leaders_store_wants_something_then_it_is_replicated(
    shared_trio: Trio,
) -> None:
    """Expiry goes through the log: only the primary proposes it (raft-traps on TTLs)."""
    leader = shared_trio.leader()
    index = leader.set("old", "1")
    shared_trio.await_applied(index)
    for server in shared_trio.servers:
        server.upkeep = [command("DEL", "old")]

    eventually(lambda: not leader.upkeep, "the leader was asked")

    shared_trio.await_applied(index + 1)
    assert [server.holds("old") for server in shared_trio.servers] == [None] * 3
    for follower in shared_trio.others(leader):
        assert follower.upkeep, "a secondary proposes nothing"
        follower.upkeep = []


@pytest.mark.parametrize("error", [TooMuchUncommittedError, TransferUnderWayError])
def test_upkeep_when_the_core_refuses_it_then_the_node_lives_on(
    shared_trio: Trio, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Expiry can wait: what is due is due the next time, too."""
    leader = shared_trio.leader()
    core, refused = leader.node._core, threading.Event()
    propose = core.propose

    def refuse(payloads: Sequence[bytes]) -> int:
        if payloads == [command("DEL", "old")] and not refused.is_set():
            refused.set()
            raise error
        return propose(payloads)

    monkeypatch.setattr(core, "propose", refuse)
    leader.upkeep = [command("DEL", "old")]
    assert refused.wait(PATIENCE_S)
    leader.upkeep = [command("DEL", "old")]

    eventually(lambda: not leader.upkeep, "the applier asks again")
    assert not leader.fatal


def test_status_when_the_cluster_is_level_then_the_leader_sees_no_lag(shared_trio: Trio) -> None:
    """Match index and lag are known where the node leads, and only there."""
    leader = shared_trio.leader()
    leader.set("level", "1")

    def is_level() -> bool:
        return all(m.lag == 0 for m in leader.status.members)

    eventually(is_level, "all have what the leader has")
    status = leader.status
    assert (status.role, status.voters, status.failures_tolerated) == (NodeRole.PRIMARY, 3, 1)
    assert [m.is_primary for m in status.members].count(True) == 1
    for follower in shared_trio.others(leader):
        assert all(m.lag is None and m.match_index is None for m in follower.status.members)


# ---- A leader that is cut off ------------------------------------------------------------------


def test_propose_when_the_leader_is_cut_off_then_the_outcome_is_unknown(
    make_trio: Callable[..., Trio],
) -> None:
    """Promise G4: what was proposed never gets a definite error; here it is rolled back."""
    trio = make_trio()
    old = trio.leader()
    began_s = trio.isolate(old)

    with pytest.raises(OutcomeUnknownError):
        old.set("lost", "1")

    assert time.monotonic() - began_s < QUICK.election_timeout_max_s + SLACK_S
    eventually(lambda: old.step_downs, "its clients' connections are closed")
    new = trio.leader(among=trio.others(old))
    index = new.set("kept", "1")
    trio.heal()
    trio.await_applied(index)
    assert old.holds("lost") is None
    assert old.holds("kept") == b"1"


def test_read_barrier_when_the_leader_is_cut_off_then_the_error_is_definite(
    make_trio: Callable[..., Trio],
) -> None:
    """A read that was not answered did nothing, whatever happened."""
    trio = make_trio()
    old = trio.leader()
    trio.isolate(old)

    reads = [in_thread(old.node.read_barrier) for _ in range(5)]

    for read in reads:
        error = read.exception(timeout=PATIENCE_S)
        assert isinstance(error, NoPrimaryError | NotPrimaryError)


def test_leader_when_cut_off_then_it_stops_answering_within_an_election_timeout(
    make_trio: Callable[..., Trio],
) -> None:
    """Check-quorum (thesis 6.2), promise G3; and from the cut on no read passes (6.4)."""
    trio = make_trio()
    old = trio.leader()
    began_s = trio.isolate(old)

    with pytest.raises((NoPrimaryError, NotPrimaryError)):
        old.node.read_barrier()
    eventually(lambda: not old.node.is_primary, "it steps down")

    assert time.monotonic() - began_s < QUICK.election_timeout_max_s + SLACK_S
    with pytest.raises(NoPrimaryError):
        old.node.propose([command("SET", "k", "v")])


def test_silent_links_when_nobody_died_then_the_election_waits_for_the_timeout(
    make_trio: Callable[..., Trio],
) -> None:
    """Silence is no evidence of death: a hang or a partition takes the election timeout."""
    trio = make_trio()
    old = trio.leader()
    began_s = trio.isolate(old)

    new = trio.leader(among=trio.others(old))

    elapsed_s = time.monotonic() - began_s
    # The timeout runs from the last heartbeat, at most one interval before the cut.
    assert elapsed_s > QUICK.election_timeout_min_s - QUICK.heartbeat_interval_s
    trio.heal()
    trio.await_applied(new.set("k", "v"))
    assert new.node.is_primary, "the one that returns disturbs nobody (pre-vote, thesis 9.6)"


def test_follower_when_cut_off_and_back_then_the_term_stays(make_trio: Callable[..., Trio]) -> None:
    """Pre-vote (thesis 9.6): who could not win an election does not start one."""
    trio = make_trio()
    leader = trio.leader()
    term = leader.status.term
    follower = trio.others(leader)[0]
    trio.isolate(follower)
    eventually(lambda: follower.status.role is NodeRole.CANDIDATE, "it misses the leader")

    trio.heal()
    trio.await_applied(leader.set("k", "v"))

    assert leader.status.term == term
    assert leader.node.is_primary


# ---- Death -------------------------------------------------------------------------------------


def test_dead_leader_when_its_ports_refuse_then_a_new_one_leads_long_before_the_timeout(
    make_trio: Callable[..., Trio],
) -> None:
    """Promise G7: within a second of the process' death, with any timers."""
    trio = make_trio(NodeConfig(0.5, 4.0, 5.0))
    old = trio.leader()
    index = old.set("k", "v")
    trio.await_applied(index)

    began_s = time.monotonic()
    old.stop()
    new = trio.leader(among=trio.others(old))

    assert time.monotonic() - began_s < 1.0 + SLACK_S
    assert new.get("k") == b"v"


def test_restart_when_all_nodes_stopped_then_the_log_rebuilds_the_same_state(
    make_trio: Callable[..., Trio],
) -> None:
    """Promise G1: the log is the state; a restart applies it again."""
    trio = make_trio()
    leader = trio.leader()
    for i in range(20):
        index = leader.set(f"k{i}", str(i))
    trio.await_applied(index)
    state_hash = leader.status.state_hash
    trio.stop()

    trio.start()

    leader = trio.leader()
    trio.await_applied(index)
    assert {server.status.state_hash for server in trio.servers} == {state_hash}
    assert leader.get("k19") == b"19"


def test_client_thread_that_meets_a_bug_of_the_node_takes_the_process_with_it(
    tmp_path: Path,
) -> None:
    """An assertion is no less true for being looked at on a client's thread (raft-traps T71)."""
    trio = Trio(tmp_path, QUICK, count=1).start()
    server = trio.leader()

    def fail(*args: object) -> int:
        raise AssertionError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.node._core, "propose", fail)
        with pytest.raises(AssertionError):
            server.set("k", "v")
    assert [str(error) for error in server.fatal] == ["a bug"]

    with pytest.raises(AssertionError):
        server.node._settle([fail])  # what a push does, say
    assert [str(error) for error in server.fatal] == ["a bug", "a bug"]
    trio.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("during", ["apply", "append", "upkeep"])
def test_thread_that_dies_then_takes_the_process_with_it(tmp_path: Path, during: str) -> None:
    """Rule 3: better no node than one that lacks a thread (raft-traps T24), or a disk (T17)."""
    trio = Trio(tmp_path, QUICK, count=1).start()
    server = trio.leader()
    failure = OSError("broken on purpose")

    def fail(*args: object) -> Sequence[bytes]:
        raise failure

    with pytest.MonkeyPatch.context() as patch:
        if during == "apply":
            server.store.failure = failure
        elif during == "append":
            patch.setattr(server.disk, "append", fail)
        else:
            patch.setattr(server.node, "_upkeep", fail)
        threading.Thread(target=lambda: _try_to_set(server), daemon=True).start()

        eventually(lambda: server.fatal, "the process is told to end")
        assert failure in server.fatal
    trio.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_core_when_it_contradicts_itself_then_the_process_ends(tmp_path: Path) -> None:
    """A node with a bug, or bad memory, says so and ends before it spoils others (raft-traps T71)."""
    trio = Trio(tmp_path, QUICK, count=1).start()
    server = trio.leader()
    core = server.node._core

    with server.node._lock:
        core.commit_index = core.log.last_index + 1

    eventually(lambda: server.fatal, "the process is told to end")
    assert isinstance(server.fatal[0], AssertionError)
    trio.stop()


def _try_to_set(server: Server) -> None:
    with contextlib.suppress(KVError, OSError):
        server.set("k", "v")


def never_doubting(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """For it no time passes: a leader does not step down though nobody answers."""
    monkeypatch.setattr(server.node._core, "tick", lambda: None)
    return server


def test_stop_when_a_write_waits_then_its_outcome_is_unknown(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is told, rather than left waiting for a node that has ended."""
    trio = make_trio()
    leader = never_doubting(trio.leader(), monkeypatch)
    trio.isolate(leader)
    last = leader.status.last_index
    write = in_thread(lambda: leader.set("k", "v"))
    eventually(lambda: leader.status.last_index > last, "it is proposed")
    assert not write.done()

    leader.stop()

    assert isinstance(write.exception(timeout=PATIENCE_S), OutcomeUnknownError)


def test_stop_when_a_read_waits_then_it_ends_once(make_trio: Callable[..., Trio]) -> None:
    """The core still holds it, and may yet have it confirmed.

    (Then it was answered twice, and the stop ended as a crash.)
    """
    trio = make_trio()
    leader = trio.leader()
    core = leader.node._core
    for other in trio.others(leader):
        trio.isolate(other)
    ended: list[Pending] = []
    leader.node.read_later(ended.append)
    leader.node.read_later(ended.append)
    answers = [
        AppendReply(other.member.member_id, core.member_id, core.term, True, 0, core.round)
        for other in trio.others(leader)
    ]

    leader.stop()
    leader.node.on_messages(answers)

    assert [type(pending.error) for pending in ended] == [NoPrimaryError, NoPrimaryError]


def test_peer_that_says_what_can_not_be_is_not_listened_to(make_trio: Callable[..., Trio]) -> None:
    """Its connection ends, not this process (promise G8); what it said before counts."""
    trio = make_trio()
    leader = trio.leader()
    liar = trio.others(leader)[0].member.member_id
    term = leader.status.term
    lie = AppendReply(liar, leader.member.member_id, term, True, 1 << 40, 0)

    with pytest.raises(FrameError, match="not sent"):
        leader.node.on_messages([lie])

    leader.set("k", "v")
    assert not leader.fatal


def test_append_that_takes_the_disk_is_left_to_the_links_thread(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever pushes must not wait for a disk: raft-timer least of all (raft-traps T24)."""
    trio = make_trio()
    leader = trio.leader()
    behind = trio.others(leader)[0]
    behind.stop()
    monkeypatch.setattr(leader.node._core.log, "_window_bytes_max", 0)
    for number in range(10):
        index = leader.set(f"k{number}", "v" * 400_000)  # more than goes into one append
    readers: set[str] = set()
    read = leader.disk.read

    def noted(*args: int) -> list[Entry]:
        readers.add(threading.current_thread().name)
        return read(*args)

    monkeypatch.setattr(leader.disk, "read", noted)
    behind.start()

    trio.await_applied(index)
    assert readers == {f"raft-peer-{behind.member.node_id}"}


def test_stop_then_no_thread_of_the_node_is_left(tmp_path: Path) -> None:
    """A process that stops in good order has nothing that still writes to the disk."""
    before = set(threading.enumerate())
    trio = Trio(tmp_path, QUICK).start()
    trio.leader().set("k", "v")

    trio.stop()

    def gone() -> bool:
        return not {t for t in threading.enumerate() if t.name.startswith("raft-")} - before

    eventually(gone, "every thread has ended", within_s=3.0)


# ---- The audit of states (promise G6) ----------------------------------------------------------


def test_audit_when_a_secondarys_state_differs_then_it_stops_serving_and_says_so(
    make_trio: Callable[..., Trio], caplog: pytest.LogCaptureFixture
) -> None:
    """The majority's state counts; who differs must not become primary with it."""
    trio = make_trio()
    leader = trio.leader()
    wrong = trio.others(leader)[0]
    wrong.store.is_wrong = True

    with caplog.at_level(logging.ERROR):
        leader.set("k", "right")
        eventually(lambda: wrong.status.trouble, "the difference is found")

    told = f"the state of {wrong.member.node_id} differs from the majority's"
    assert "this node's state differs from the majority's" in wrong.status.trouble
    eventually(lambda: leader.status.trouble == told, "the primary names it")
    with pytest.raises(NoPrimaryError, match="let it come back empty"):
        wrong.node.propose([command("SET", "k", "v")])
    with pytest.raises(OSError, match="let it come back empty"):
        wrong.node.open_backup()
    assert wrong.node.suspicion
    assert leader.get("k") == b"right"
    # Each says what it has found, once, however often they compare.
    audits = leader.node._next_audit_s
    eventually(lambda: leader.node._next_audit_s > audits + 1.0, "they compare again and again")
    assert caplog.text.count(told) == 1
    assert caplog.text.count("this node's state differs") == 1


def test_audit_when_the_primarys_state_differs_then_another_leads(
    make_trio: Callable[..., Trio],
) -> None:
    """It is told by the majority like any other, and does not come back as primary."""
    trio = make_trio()
    wrong = trio.leader()
    wrong.store.is_wrong = True
    wrong.set("k", "right")

    eventually(lambda: wrong.status.trouble, "the difference is found")

    new = trio.leader(among=trio.others(wrong))
    assert new.get("k") == b"right"
    eventually(lambda: wrong.step_downs, "its clients' connections are closed")
    with pytest.raises(NoPrimaryError):
        wrong.node.read_barrier()


def test_audit_when_the_troubled_node_restarts_then_it_serves_again(
    make_trio: Callable[..., Trio],
) -> None:
    """Its log was right all along."""
    trio = make_trio()
    leader = trio.leader()
    wrong = trio.others(leader)[0]
    wrong.store.is_wrong = True
    index = leader.set("k", "right")
    eventually(lambda: wrong.status.trouble, "the difference is found")

    wrong.stop()
    wrong.start()

    trio.await_applied(index)
    assert wrong.holds("k") == b"right"
    assert not wrong.status.trouble


# ---- Modes -------------------------------------------------------------------------------------

ASYNC = NodeConfig(0.2, 0.8, 1.2, async_replication=True)
# Long enough that a slow machine does not let a lease end before a test has used it.
LEASE = NodeConfig(0.3, 2.0, 3.0, lease_reads=True)


def test_async_when_a_write_is_blind_then_ok_comes_from_the_primarys_own_disk(
    make_trio: Callable[..., Trio], caplog: pytest.LogCaptureFixture
) -> None:
    """The mode's promise and its price: without a majority such a write is answered, and lost."""
    trio = make_trio(ASYNC)
    old = trio.leader()
    trio.isolate(old)

    done = old.node.propose([command("SET", "hasty", "1")], blind=True)

    assert not done.replies
    assert old.disk.read(done.first, done.first, 1024)[0].data == command("SET", "hasty", "1")
    new = trio.leader(among=trio.others(old))
    index = new.set("kept", "1")
    with caplog.at_level(logging.WARNING):
        trio.heal()
        trio.await_applied(index)
        eventually(lambda: "rolled back entries=" in caplog.text, "the loss is told")
    assert old.holds("hasty") is None


def test_async_when_a_replys_value_depends_on_the_state_then_it_waits_for_the_majority(
    make_trio: Callable[..., Trio],
) -> None:
    """INCR can't be answered before it is applied, and only what is committed is applied."""
    trio = make_trio(ASYNC)
    leader = trio.leader()
    assert leader.node.propose([command("INCR", "n")]).replies == [1]
    trio.isolate(leader)

    with pytest.raises(OutcomeUnknownError):
        leader.node.propose([command("INCR", "n")], blind=False)


def test_async_when_a_read_follows_a_write_then_it_sees_it(make_trio: Callable[..., Trio]) -> None:
    """OK came before the commit; the reader who was told so must find it all the same."""
    trio = make_trio(ASYNC)
    leader = trio.leader()

    for i in range(200):
        leader.node.propose([command("SET", "k", str(i))], blind=True)
        assert leader.get("k") == str(i).encode()


def test_async_when_a_write_is_not_committed_then_not_even_the_lease_answers_without_it(
    make_trio: Callable[..., Trio],
) -> None:
    """The read waits for the commit, which never comes here; an old value would be a lie."""
    trio = make_trio(replace(LEASE, async_replication=True))
    leader = _with_lease(trio)
    trio.await_applied(leader.set("k", "old"))
    trio.isolate(leader)
    leader.node.propose([command("SET", "k", "new")], blind=True)

    with pytest.raises((NoPrimaryError, NotPrimaryError)):
        leader.get("k")


def test_lease_when_it_is_valid_then_a_read_needs_no_round(make_trio: Callable[..., Trio]) -> None:
    """Thesis 6.4.1: nobody else can lead before the lease ends; after that no read passes."""
    trio = make_trio(LEASE)
    leader = _with_lease(trio)
    leader.set("k", "v")
    trio.isolate(leader)

    assert leader.get("k") == b"v", "answered though nobody else can be reached"

    eventually(lambda: _refuses_reads(leader), "the lease ends")
    eventually(lambda: not leader.node.is_primary, "it steps down")


def _with_lease(trio: Trio) -> Server:
    """The leader, just after a heartbeat round that all have answered."""
    leader = trio.leader()
    last = leader.status.last_index
    leader.set("lease", "1")
    trio.await_applied(last + 1)
    return leader


def _refuses_reads(server: Server) -> bool:
    try:
        server.node.read_barrier()
    except KVError:
        return True
    return False


def test_lease_when_a_new_leader_is_elected_then_it_waits_until_the_old_lease_has_run_out(
    make_trio: Callable[..., Trio],
) -> None:
    """A dead leader is replaced at once, so its lease may still run: nobody may write meanwhile."""
    trio = make_trio(LEASE)
    old = trio.leader()
    old.set("k", "v")
    others = trio.others(old)
    old.stop()
    new = eventually(lambda: next((s for s in others if s.node.is_primary), None), "one leads")
    elected_s = time.monotonic()

    with pytest.raises(NoPrimaryError, match="lease"):
        new.node.propose([command("SET", "k", "new")])
    with pytest.raises(NoPrimaryError, match="lease"):
        new.node.read_barrier()
    assert new.node.wait_for_primary(PATIENCE_S) == new.member

    # Elected at most one poll of this test earlier than seen.
    assert time.monotonic() - elected_s > 0.8 * LEASE.election_timeout_min_s
    assert new.get("k") == b"v"


# ---- Members -----------------------------------------------------------------------------------


def joining(member: Member, boot_id: str = "0" * 16) -> list[bytes]:
    """What a new node sends."""
    words = (member.node_id, member.member_id, member.host, member.port, member.peer_port)
    return [b"MEMBER", b"JOIN", *(str(word).encode() for word in words), boot_id.encode()]


def test_state_that_is_saved_has_the_membership_of_its_index(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that is under way may yet be rolled back (raft-traps T41)."""
    trio = make_trio()
    leader = never_doubting(trio.leader(), monkeypatch)
    founded = leader.node.membership
    trio.isolate(leader)
    in_thread(lambda: change_members(leader.node, joining(trio.place("n9"))))
    eventually(lambda: len(leader.node.membership.members) == 4, "it is proposed")

    header, _ = leader.node.begin_flush()
    leader.node.end_flush(saved=False)

    assert Membership.decode(header.membership) == founded


def test_messages_of_an_old_term_are_not_believed(
    make_trio: Callable[..., Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deposed leader's state, or its word on another's, is no longer of use."""
    trio = make_trio()
    leader = trio.leader()
    secondary, other = trio.others(leader)
    me, sender, term = secondary.member.member_id, other.member.member_id, leader.status.term
    chunks: list[SnapshotChunk] = []
    monkeypatch.setattr(secondary.node._keeper, "on_chunk", chunks.append)
    index, state_hash = leader.set("k", "v"), leader.status.state_hash
    trio.await_applied(index)
    audit = secondary.node._audit
    eventually(lambda: audit._own[0] >= index, "it was asked for its hash")

    secondary.node.on_messages(
        [
            SnapshotChunk(sender, me, term - 1, 7, 0, b"bytes", False),
            HashReport(sender, me, term - 1, audit._own[0], state_hash ^ 1, True),
        ]
    )

    assert chunks == []
    assert not secondary.status.trouble


def test_add_member_when_it_has_caught_up_then_it_votes(make_trio: Callable[..., Trio]) -> None:
    """Thesis 4.2.1: a learner until it has caught up; asked twice, it is added once."""
    trio = make_trio(count=1)
    leader = trio.leader()
    index = leader.set("k", "v")
    newcomer = Server(trio, trio.place("n9"), QUICK)

    change_members(leader.node, joining(newcomer.member))
    change_members(leader.node, joining(newcomer.member))

    assert len(leader.status.members) == 2
    assert leader.status.voters == 1, "it has no vote before it has the data"
    trio.servers.append(newcomer)
    newcomer.start()
    trio.await_applied(index)
    eventually(lambda: leader.status.voters == 2, "it is promoted by itself")
    eventually(lambda: newcomer.status.role is NodeRole.SECONDARY, "it knows that")
    assert newcomer.holds("k") == b"v"


def test_add_member_when_name_or_address_is_anothers_then_it_is_refused(shared_trio: Trio) -> None:
    """A new member under an old name has lost what the old one had voted and acknowledged (T12).

    While that one lives, there is nothing to take the place of.
    """
    leader = shared_trio.leader()
    taken = shared_trio.servers[0].member
    namesake = shared_trio.place(taken.node_id)
    neighbour = shared_trio.place("other")._replace(host=taken.host, port=taken.port)

    with pytest.raises(BadRequestError, match=f"name {taken.node_id} is taken"):
        change_members(leader.node, joining(namesake))
    with pytest.raises(BadRequestError, match="is taken by"):
        change_members(leader.node, joining(neighbour))
    with pytest.raises(NotPrimaryError):
        change_members(shared_trio.others(leader)[0].node, joining(shared_trio.place("late")))
    assert len(leader.status.members) == 3


@pytest.mark.parametrize(
    ("place", "word"),
    [
        (2, b"../n9"),
        (3, b"0123"),
        (4, b"127.0.0..4"),
        (4, b"a" * 64),
        (4, b"fe80::1::2"),
        (5, b"80000"),
        (6, b"0"),
        (6, b"x"),
    ],
)
def test_add_member_when_nobody_could_dial_it_then_it_is_refused(
    shared_trio: Trio, place: int, word: bytes
) -> None:
    """What is in the log every node dials, for ever: so it is looked at before (promise G8)."""
    leader = shared_trio.leader()
    argv = joining(shared_trio.place("n9"))
    argv[place] = word

    with pytest.raises(BadRequestError):
        change_members(leader.node, argv)

    assert len(leader.status.members) == 3


def test_add_member_when_its_change_is_not_committed_then_it_is_not_said_to_be_in(
    make_trio: Callable[..., Trio],
) -> None:
    """It may yet be taken back, and the newcomer would wait for a cluster that knows nothing."""
    trio = make_trio()
    leader = trio.leader()
    newcomer = joining(trio.place("n9"))
    for other in trio.others(leader):
        trio.isolate(other)
    first = in_thread(lambda: change_members(leader.node, newcomer))
    eventually(lambda: len(leader.status.members) == 4, "it is proposed")

    with pytest.raises(BusyError, match="under way"):
        change_members(leader.node, newcomer)

    assert isinstance(first.exception(timeout=PATIENCE_S), OutcomeUnknownError)


def test_change_of_members_when_they_are_others_meanwhile_then_it_is_not_made(
    make_trio: Callable[..., Trio],
) -> None:
    """Two operators at once: what the second had in mind was checked against other members."""
    trio = make_trio(count=1)
    leader = trio.leader()
    before = leader.node.settled_membership()
    change_members(leader.node, joining(trio.place("n9")))

    with pytest.raises(BusyError, match="have changed"):
        leader.node.change_members(before, lambda core: core.add_learner(trio.place("n8")))

    assert len(leader.status.members) == 2


def test_member_when_it_comes_back_at_another_address_then_all_follow_it_there(
    make_trio: Callable[..., Trio],
) -> None:
    """It says where it is when it dials; its peers must not go on dialling where it was."""
    trio = make_trio()
    leader = trio.leader()
    moved = trio.move(trio.others(leader)[0])
    index = leader.set("k", "v")

    moved.start()

    trio.await_applied(index)
    change_members(leader.node, joining(moved.member, moved.boot_id))
    trio.await_applied(leader.set("k", "w"))
    assert all(member.link in ("up", "") for member in leader.status.members)


def test_member_when_a_copy_of_it_starts_elsewhere_then_it_is_refused(
    make_trio: Callable[..., Trio], tmp_path: Path
) -> None:
    """A data directory that was copied: two processes would have one vote each under one name."""
    trio = make_trio()
    leader = trio.leader()
    real = trio.others(leader)[0]
    index = leader.set("k", "v")
    place = trio.place("elsewhere")
    copy = Server(trio, real.member._replace(port=place.port, peer_port=place.peer_port), QUICK)

    with pytest.raises(BadRequestError, match="runs already"):
        change_members(leader.node, joining(copy.member, new_id()))
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / real.member.node_id, copied / real.member.node_id)
    (copied / real.member.node_id / "lock").unlink()
    trio.directory = copied
    copy.start()

    eventually(lambda: len(_refusals(copy)) == 2, "no other node takes it in")
    assert leader.status.voters == 3
    trio.await_applied(leader.set("k", "w"))
    assert copy.status.applied_index <= index
    copy.stop()


def _refusals(server: Server) -> list[str]:
    return [m.link for m in server.status.members if "another process is member" in m.link]


def test_member_when_its_new_address_is_in_the_log_then_it_is_dialled_there(
    make_trio: Callable[..., Trio],
) -> None:
    """It need not be heard first: the others may only reach it, not be reached."""
    trio = make_trio()
    leader = trio.leader()
    moved = trio.move(trio.others(leader)[0])
    with socket.create_server(("127.0.0.1", moved.member.peer_port)) as there:
        there.settimeout(PATIENCE_S)
        change_members(leader.node, joining(moved.member))

        there.accept()[0].close()  # TimeoutError if nobody dials


def test_learner_when_promoted_before_the_log_knows_its_new_address_then_it_is_still_reached(
    make_trio: Callable[..., Trio],
) -> None:
    """The entry that promotes it repeats the old address, which is no news: it was found elsewhere."""
    trio = make_trio(count=1)
    leader = trio.leader()
    announced, here = trio.place("n9"), trio.place("n9")
    change_members(leader.node, joining(announced))
    newcomer = Server(trio, here._replace(member_id=announced.member_id), QUICK)
    trio.servers.append(newcomer)
    newcomer.start()

    def is_promoted() -> bool:
        # Again and again, as a node does: it lets go of a link to who is no member yet.
        newcomer.node.meet(leader.member)
        return leader.status.voters == 2

    eventually(is_promoted, "it is promoted by itself")
    trio.await_applied(leader.set("k", "v"))


def test_link_when_its_member_was_removed_then_ends(make_trio: Callable[..., Trio]) -> None:
    """Once it had the time to hear of it: a thread that dials for ever would be left each time."""
    others = set(threading.enumerate())
    trio = make_trio()
    leader = trio.leader()
    removed = trio.others(leader)[0]
    removed.stop()

    def links() -> list[str]:
        name = f"raft-peer-{removed.member.node_id}"
        return [t.name for t in threading.enumerate() if t.name == name and t not in others]

    assert len(links()) == 2
    change_members(leader.node, [b"MEMBER", b"REMOVE", removed.member.node_id.encode()])

    eventually(lambda: not links(), "nobody dials it any more")
    leader.set("k", "v")
