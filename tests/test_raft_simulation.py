"""The simulated cluster over many seeds, and the proof that it sees what it is there to see.

A failure names its seed and the command that prints its history. What a run does is told in
``sim_cluster.py``, what is checked in ``sim_invariants.py`` and ``sim_clients.py``.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any, cast

import pytest

from kv_client_sessions import ClientSessions, Write
from kv_commands import Once
from kv_store import Flush, KeyValueStore, Slice, _TableFlush
from kv_types import Reply
from raft_core import MembershipChangeRefusedError, RaftCore
from raft_log import MembershipLog, RaftLog
from raft_members import Followers
from raft_progress import Progress
from raft_types import (
    AppendEntries,
    AppendReply,
    Entry,
    HardState,
    MemberId,
    Membership,
    Message,
    Ready,
    Role,
    SnapshotChunk,
    SnapshotOutcome,
    VoteRequest,
)
from tests.raft_servers import SimDisk, SimState, StoredRows
from tests.sim_cluster import SimServer, Simulation
from tests.simulator import BROKEN, first_violation, run

ROOT = Path(__file__).resolve().parent.parent
SEEDS = range(200)
MUTANT_SEEDS = range(600)  # until the first that shows it; today the last one does after 153

Mutant = Callable[[pytest.MonkeyPatch], None]
Verdict = tuple[str | None, bool]  # what it was caught with, and whether it is itself broken

# What a history must be able to do to a cluster; a sum of 0 would mean that nothing tests it.
EXPECTED = {
    "elections": 400,
    "lulls": 200,
    "leaders lost in the calm": 100,
    "lulls of a mere majority": 80,
    **{f"away: {way}": 20 for way in ("alone", "deaf", "down", "mute")},
    "steps down": 150,
    "truncated": 50,
    "crashes": 800,
    "pauses": 300,
    "write lost": 30,
    "write kept in part": 30,
    "write torn": 20,
    "write torn, but whole": 8,
    "disk errors": 10,
    "disks lost": 30,
    "way given for a disk": 20,
    "lost": 1000,
    "duplicated": 1000,
    "evidence": 250,
    "answers": 20_000,
    "asked again": 1500,
    "answered as the first time": 100,
    "reads": 6000,
    "purges": 100,
    "reads that purge": 30,
    "sessions closed": 30,
    "registers linearizable": 300,
    "counters checked": 80,
    "expiring keys checked": 200,
    "TooMuchUncommittedError": 80,
    "TransferUnderWayError": 50,
    "entries on disk": 3000,
    "read in vain": 50,
    "applied from disk": 800,
    "reads by lease": 3000,
    "old leases waited for": 3000,
    "leaders mistaken for dead": 15,
    "states compared": 3000,
    "differing states found": 80,
    "differing states found in the calm": 60,
    "stopped by a majority that differs": 5,
    "states saved": 3000,
    "flushes given up": 5,
    "logs compacted": 2000,
    "chunks": 400,
    "snapshots installed": 100,
    "snapshots given up": 10,
    "logs emptied": 60,
    "logs kept": 1,
    "crash with a state received": 4,
    "crash with a state in place": 4,
    "crash with a log to empty": 1,
    "joins": 100,
    "change refused": 200,
    "removals": 30,
    "removals heard": 30,
    "leader removes itself": 5,
    "learners dropped": 10,
    "addresses mistyped": 10,
    "moves": 30,
    "transfers": 40,
    "transfers refused": 150,
    "transfers to the dead": 1,
    **{f"cut: {shape}": 20 for shape in ("ring", "chain", "split", "swizzle", "bridge", "one way")},
    **{f"cut: {shape}": 15 for shape in ("deaf", "mute", "one alone")},
}


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    """One a processor: a history needs nothing but time."""
    # Not spawned: that would leave a process which follows up shared memory until pytest ends.
    with multiprocessing.get_context("fork").Pool() as pool:
        yield pool


def test_simulation_of_a_few_seeds_breaks_no_invariant() -> None:
    """I1 to I16 hold (the quick look; the long one follows)."""
    for seed in range(3):
        run(seed)


@pytest.mark.slow
def test_simulation_of_many_seeds_breaks_no_invariant(processes: Pool) -> None:
    """Whatever the faults do, figure 3 of the paper holds, and clients see one store."""
    happened: Counter[str] = Counter()
    for counts in processes.imap(run, SEEDS):
        happened += counts

    assert {
        what: happened[what] for what, least in EXPECTED.items() if happened[what] < least
    } == {}


@pytest.mark.parametrize("seed", [5, 161])
def test_simulation_of_one_seed_gives_one_history(seed: int) -> None:
    """A failure can be replayed, by another process too: no choice hangs on a set's order."""
    command = [sys.executable, "-m", "tests.simulator", "--seed", str(seed)]
    histories = {
        subprocess.check_output(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        for hash_seed in ("1", "4")
    }

    assert len(histories) == 1


# ---- Mutants: each is a mistake that was made somewhere (fault-model, raft-traps) --------------


def vote_not_persisted(patch: pytest.MonkeyPatch) -> None:
    """M1: the term is saved, the vote is not."""
    write = SimDisk.write

    def forget_vote(
        disk: SimDisk,
        state: HardState | None,
        entries: Sequence[Entry],
        log_base: tuple[int, int] | None = None,
    ) -> None:
        write(disk, state and state._replace(voted_for=None), entries, log_base)

    patch.setattr(SimDisk, "write", forget_vote)


def sent_before_synced(patch: pytest.MonkeyPatch) -> None:
    """M3: answers leave while the disk still works."""
    write = Simulation._write

    def send_at_once(simulation: Simulation, server: SimServer) -> None:
        before = server.unsynced
        write(simulation, server)
        if server.unsynced is not None and server.unsynced is not before:
            for message in server.unsynced.messages:
                simulation._send(server, message)

    def sync_only(simulation: Simulation, server: SimServer, ready: Ready) -> None:
        if server.up:
            server.disk.write(ready.hard_state, ready.entries, ready.log_base)
            server.unsynced = None
            simulation._advance(server, ready)

    patch.setattr(Simulation, "_write", send_at_once)
    patch.setattr(Simulation, "_synced", sync_only)


def own_copy_counted_unsynced(patch: pytest.MonkeyPatch) -> None:
    """T4: the leader counts itself before its disk has the entry."""

    def advance_commit(core: RaftCore) -> None:
        match = {member: progress.match_index for member, progress in core.progress.items()}
        match[core.member_id] = core.log.last_index
        index = core.membership.majority_index(match)
        if index >= core._term_first_index:
            core._commit_to(index)

    patch.setattr(RaftCore, "_advance_commit", advance_commit)


def old_term_committed_by_counting(patch: pytest.MonkeyPatch) -> None:
    """M4: figure 8."""

    def advance_commit(core: RaftCore) -> None:
        match = {member: progress.match_index for member, progress in core.progress.items()}
        match[core.member_id] = core.log.stable_index
        core._commit_to(core.membership.majority_index(match))

    patch.setattr(RaftCore, "_advance_commit", advance_commit)


def read_before_own_commit(patch: pytest.MonkeyPatch) -> None:
    """M5: a new leader trusts its commit index."""
    patch.setattr(
        RaftCore, "committed_in_own_term", property(lambda core: core.role is Role.LEADER)
    )
    patch.setattr(
        RaftCore,
        "_may_change_membership",
        property(lambda core: core.commit_index >= core._term_first_index and not _pending(core)),
    )


def read_without_a_round(patch: pytest.MonkeyPatch) -> None:
    """M6: a leader that may have been deposed answers by itself."""
    patch.setattr(RaftCore, "confirmed_round", property(lambda core: core.round))


def read_given_though_deposed(patch: pytest.MonkeyPatch) -> None:
    """M7: nobody looks at the term again when the round is over."""
    become_follower = RaftCore._become_follower

    def release(core: RaftCore, term: int, leader_id: MemberId | None) -> None:
        released = (core._read_index, core._reads_in_round)
        become_follower(core, term, leader_id)
        core._reads_done.append(released)

    patch.setattr(RaftCore, "_become_follower", release)


def truncated_always(patch: pytest.MonkeyPatch) -> None:
    """M8: what follows the previous entry goes, whether it conflicts or not."""

    def merge(core: RaftCore, entries: Sequence[Entry]) -> None:
        if entries and entries[0].index <= core.log.last_index:
            core._truncate_from(entries[0].index)
        core._append_entries(entries)

    patch.setattr(RaftCore, "_merge", merge)


def commit_not_bounded_by_the_message(patch: pytest.MonkeyPatch) -> None:
    """M9: bounded by the end of the log instead of by what was verified."""
    on_append = RaftCore._on_append

    def commit_all(core: RaftCore, message: AppendEntries) -> None:
        on_append(core, message)
        if core.log.matches(message.prev_index, message.prev_term):
            core._commit_to(min(message.commit_index, core.log.last_index))

    patch.setattr(RaftCore, "_on_append", commit_all)


def match_goes_back(patch: pytest.MonkeyPatch) -> None:
    """M10: the last answer counts, not the highest."""
    matched = Progress.matched

    def believe(progress: Progress, index: int, present_round: int) -> bool:
        advanced = matched(progress, index, present_round)
        progress.match_index = index
        return advanced

    patch.setattr(Progress, "matched", believe)


def votes_counted_by_message(patch: pytest.MonkeyPatch) -> None:
    """M11: a repeated vote counts as another one."""
    count_vote = RaftCore._count_vote

    def count(core: RaftCore, voter: MemberId, granted: bool) -> None:
        unheard = [v for v in core.membership.voters if v not in core._votes]
        count_vote(core, unheard[0] if voter in core._votes and unheard else voter, granted)

    patch.setattr(RaftCore, "_count_vote", count)


def _pending(core: RaftCore) -> bool:
    return core._memberships.latest_index > core.commit_index


def membership_changed_before_own_commit(patch: pytest.MonkeyPatch) -> None:
    """M14: the single-server bug."""
    patch.setattr(RaftCore, "_may_change_membership", property(lambda core: not _pending(core)))


def membership_changed_twice_at_once(patch: pytest.MonkeyPatch) -> None:
    """T61: two changes under way."""
    patch.setattr(
        RaftCore, "_may_change_membership", property(lambda core: core.committed_in_own_term)
    )


def membership_not_rolled_back(patch: pytest.MonkeyPatch) -> None:
    """T62: a truncated change stays in force."""

    def truncate_from(core: RaftCore, index: int) -> None:
        core.truncated_count += core.log.last_index - index + 1
        core.log.truncate_from(index)

    patch.setattr(RaftCore, "_truncate_from", truncate_from)


def stale_append_reply_accepted(patch: pytest.MonkeyPatch) -> None:
    """M18: an answer to an earlier leadership moves the match index of this one."""
    answer_older_term = RaftCore._answer_older_term

    def accept(core: RaftCore, message: Message) -> None:
        if isinstance(message, AppendReply) and core.role is Role.LEADER:
            core._on_append_reply(message)
        answer_older_term(core, message)

    patch.setattr(RaftCore, "_answer_older_term", accept)


def old_round_answered_in_the_new_term(patch: pytest.MonkeyPatch) -> None:
    """T30: the refusal of a delayed append repeats its round, and its sender leads again."""

    def refuse(core: RaftCore, message: Message) -> None:
        if isinstance(message, AppendEntries):
            core._refuse_append(message, 0, 0)

    patch.setattr(RaftCore, "_answer_older_term", refuse)


def pre_vote_without_log_check(patch: pytest.MonkeyPatch) -> None:
    """M20: liveness is asked for, the log is not."""
    on_vote_request = RaftCore._on_vote_request

    def grant(core: RaftCore, message: VoteRequest) -> None:
        if message.pre_vote:
            core._answer_vote(message, granted=message.term > core.term)
        else:
            on_vote_request(core, message)

    patch.setattr(RaftCore, "_on_vote_request", grant)


def no_pre_vote(patch: pytest.MonkeyPatch) -> None:
    """T17: a server that was cut off comes back with a higher term."""
    campaign = RaftCore._campaign

    def stand(core: RaftCore, *, pre_vote: bool, transfer: bool = False) -> None:
        campaign(core, pre_vote=False, transfer=transfer)

    patch.setattr(RaftCore, "_campaign", stand)


def vote_forgotten_within_the_term(patch: pytest.MonkeyPatch) -> None:
    """T3: stepping down clears the vote."""
    become_follower = RaftCore._become_follower

    def forget(core: RaftCore, term: int, leader_id: MemberId | None) -> None:
        become_follower(core, term, leader_id)
        core.voted_for = None

    patch.setattr(RaftCore, "_become_follower", forget)


def entries_left_out_of_a_ready(patch: pytest.MonkeyPatch) -> None:
    """T36: what is in the log and what was written part ways."""
    ready = RaftCore.ready

    def lose_last(core: RaftCore) -> Ready | None:
        given = ready(core)
        if given is not None and len(given.entries) > 1:
            given = core._ready_out = replace(given, entries=given.entries[:-1])
        return given

    patch.setattr(RaftCore, "ready", lose_last)


def base_term_forgotten(patch: pytest.MonkeyPatch) -> None:
    """T38: the term of the last entry that the state has."""
    compact = RaftLog.compact

    def forget(log: RaftLog, first_index: int) -> None:
        compact(log, first_index)
        log._run_terms[0] = 0

    patch.setattr(RaftLog, "compact", forget)


def membership_forgotten_with_its_entry(patch: pytest.MonkeyPatch) -> None:
    """T38, T64: the entry is gone from the log, and so is what it said."""

    def forget(log: MembershipLog, first_index: int) -> None:
        log._changes = [change for change in log._changes if change[0] >= first_index]

    patch.setattr(MembershipLog, "compact", forget)


def state_acknowledged_before_it_is_in_place(patch: pytest.MonkeyPatch) -> None:
    """T4 of states: received is not installed."""
    on_chunk = Simulation._on_chunk

    def acknowledge(simulation: Simulation, server: SimServer, chunk: SnapshotChunk) -> None:
        on_chunk(simulation, server, chunk)
        if chunk.is_last:
            server.core.answer_chunk(chunk, 0, SnapshotOutcome.INSTALLED)

    patch.setattr(Simulation, "_on_chunk", acknowledge)


def state_acknowledged_for_another(patch: pytest.MonkeyPatch) -> None:
    """T42, T44: what is installed was another leader's, which has got less far, or further."""
    on_chunk = Simulation._on_chunk

    def take_any(simulation: Simulation, server: SimServer, chunk: SnapshotChunk) -> None:
        if server.installing and chunk.term == server.core.term:
            server.last_chunk = chunk
        else:
            on_chunk(simulation, server, chunk)

    patch.setattr(Simulation, "_on_chunk", take_any)


def log_emptied_before_the_state_is_in_place(patch: pytest.MonkeyPatch) -> None:
    """T37: a crash in between leaves neither."""
    install = Simulation._install

    def empty_first(simulation: Simulation, server: SimServer, state: SimState) -> None:
        if server.up:
            server.core.restore(state.snapshot)
            simulation.invariants.on_restore(server, state)
            simulation.after(server)
        simulation.at(3, install, simulation, server, state)

    patch.setattr(Simulation, "_install", empty_first)


def log_dropped_before_the_state_is_saved(patch: pytest.MonkeyPatch) -> None:
    """T37, M16: what was applied is taken for what is saved."""
    save = Simulation._save

    def drop_first(simulation: Simulation, server: SimServer) -> None:
        if server.up and server.applied_index > server.disk.state.snapshot.index:
            first = min(server.applied_index, server.core.log.stable_index) + 1
            server.disk.drop_before(first)
        save(simulation, server)

    patch.setattr(Simulation, "_save", drop_first)


def removed_leader_counts_itself(patch: pytest.MonkeyPatch) -> None:
    """Thesis 4.2.2: it is not in the membership that it commits."""

    def advance_commit(core: RaftCore) -> None:
        match = {member: progress.match_index for member, progress in core.progress.items()}
        match[core.member_id] = core.log.stable_index
        held = {voter: match.get(voter, 0) for voter in core.membership.voters}
        held[core.member_id] = core.log.stable_index
        index = sorted(held.values(), reverse=True)[core.membership.quorum - 1]
        if index >= core._term_first_index:
            core._commit_to(index)
            if not core._has_vote and core._memberships.latest_index <= index:
                core._become_follower(core.term, None)

    patch.setattr(RaftCore, "_advance_commit", advance_commit)


def removed_leader_stays(patch: pytest.MonkeyPatch) -> None:
    """T65: it leads a cluster to which it does not belong."""

    def advance_commit(core: RaftCore) -> None:
        match = {member: progress.match_index for member, progress in core.progress.items()}
        match[core.member_id] = core.log.stable_index
        index = core.membership.majority_index(match)
        if index >= core._term_first_index:
            core._commit_to(index)

    patch.setattr(RaftCore, "_advance_commit", advance_commit)


def removal_believed_before_it_is_committed(patch: pytest.MonkeyPatch) -> None:
    """T62: it may be rolled back, and the server is gone."""
    patch.setattr(
        RaftCore,
        "is_removed",
        property(lambda core: core._memberships.is_removed(core.log.last_index)),
    )


def removed_server_is_not_told(patch: pytest.MonkeyPatch) -> None:
    """T65: it waits and asks for ever."""
    patch.setattr(RaftCore, "_tell_outsider", lambda *_: None)


def silent_learner_kept(patch: pytest.MonkeyPatch) -> None:
    """T63: a mistyped address is a member for ever."""
    follow = Followers.next_change

    def keep(
        followers: Followers, membership: Membership, last_index: int, now_ticks: int
    ) -> Membership | None:
        changed = follow(followers, membership, last_index, now_ticks)
        return changed if not followers._notices else None

    patch.setattr(Followers, "next_change", keep)


def sessions_left_out_of_the_state(patch: pytest.MonkeyPatch) -> None:
    """M12: what restarts, or is sent a state, does again what was done."""
    with_slices = StoredRows.with_slices

    def forget(rows: StoredRows, flush: Flush, slices: Iterable[Slice]) -> StoredRows:
        return with_slices(rows, flush, slices)._replace(sessions={})

    patch.setattr(StoredRows, "with_slices", forget)


def serial_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """T53: what is sent again is done again."""

    def do(
        sessions: ClientSessions,
        once: Once,
        write: Write,
        argv: Sequence[bytes],
        now_ms: int,
        index: int,
    ) -> tuple[Reply, int]:
        return write(argv, now_ms, index), 0

    patch.setattr(ClientSessions, "do_once", do)


def expired_by_the_readers_clock(patch: pytest.MonkeyPatch) -> None:
    """M19: one primary says that a key is gone, the next one's clock says that it is not."""

    def see(store: KeyValueStore, key: bytes, now_ms: int) -> bytes | None:
        deadline_ms = store._deadlines.get(key)
        return None if deadline_ms and deadline_ms <= now_ms else store._values.get(key)

    patch.setattr(KeyValueStore, "_seen", see)


def expired_never(patch: pytest.MonkeyPatch) -> None:
    """W6: a key is there for ever, whatever time it was given."""
    patch.setattr(KeyValueStore, "_seen", lambda store, key, _: store._values.get(key))
    patch.setattr(KeyValueStore, "due", lambda *_: [])


def purged_before_its_time(patch: pytest.MonkeyPatch) -> None:
    """W6: a key that is to expire goes when the primary looks after such keys next."""

    def due(store: KeyValueStore, now_ms: int, limit: int) -> list[tuple[bytes, int]]:
        return [*store._deadlines.items()][:limit]

    def purge(store: KeyValueStore, argv: Sequence[bytes], now_ms: int, index: int) -> Reply:
        for key in argv[1::2]:
            if key in store._deadlines:
                store._drop(key)
        return None

    init = KeyValueStore.__init__

    def begin(store: KeyValueStore, *args: object, **kwargs: object) -> None:
        init(store, *args, **kwargs)
        store._writes[b"PURGE"] = lambda *args: purge(store, *args)

    patch.setattr(KeyValueStore, "due", due)
    patch.setattr(KeyValueStore, "__init__", begin)


def other_value_read(patch: pytest.MonkeyPatch) -> None:
    """I11: a key that expires is read as nobody wrote it."""
    gets = KeyValueStore._gets

    def get(store: KeyValueStore, argv: Sequence[bytes], now_ms: int) -> Reply:
        reply = gets(store, argv, now_ms)
        if isinstance(reply, list) and argv[1] in store._deadlines:
            return [b"vnever", reply[1]]
        return reply

    patch.setattr(KeyValueStore, "_gets", get)


def flush_hands_out_what_is_there_now(patch: pytest.MonkeyPatch) -> None:
    """T40: rows of one index, and the next index's."""
    patch.setattr(_TableFlush, "keep", lambda *_: None)


def changed_while_leadership_is_handed_over(patch: pytest.MonkeyPatch) -> None:
    """Thesis 3.10: a learner is ready at this very moment. (It ended the leader's process once.)"""
    may_change = RaftCore._may_change_membership.fget  # type: ignore[attr-defined]
    propose = RaftCore._propose_membership

    def may(core: RaftCore) -> bool:
        target, core.transfer_target = core.transfer_target, None
        allowed: bool = may_change(core)
        core.transfer_target = target
        return allowed

    def refuse(core: RaftCore, changed: Membership) -> int:
        if core.transfer_target is not None:
            raise MembershipChangeRefusedError
        return propose(core, changed)

    patch.setattr(RaftCore, "_may_change_membership", property(may))
    patch.setattr(RaftCore, "_propose_membership", refuse)


def transfer_never_given_up(patch: pytest.MonkeyPatch) -> None:
    """Thesis 3.10: the target does not take over, and nothing is proposed any more."""
    tick_leader = RaftCore._tick_leader

    def wait(core: RaftCore) -> None:
        core._transfer_ticks = 0
        tick_leader(core)

    patch.setattr(RaftCore, "_tick_leader", wait)


def quorum_not_checked(patch: pytest.MonkeyPatch) -> None:
    """Thesis 6.2: a leader that hears nobody keeps those who hear it from electing another."""
    tick_leader = RaftCore._tick_leader

    def go_on(core: RaftCore) -> None:
        patched = cast(Any, core)
        patched._become_follower = lambda *_: None
        tick_leader(core)
        del patched._become_follower

    patch.setattr(RaftCore, "_tick_leader", go_on)


def election_timeout_not_random(patch: pytest.MonkeyPatch) -> None:
    """Paper 5.2: who times out together once does so for ever."""
    reset = RaftCore._reset_election_timer

    def reset_to_lowest(core: RaftCore) -> None:
        rng, core._rng = core._rng, _Lowest()
        reset(core)
        core._rng = rng

    patch.setattr(RaftCore, "_reset_election_timer", reset_to_lowest)


class _Lowest(random.Random):
    """No chance at all."""

    def randint(self, a: int, b: int) -> int:
        return a


def timer_runs_on_after_a_vote(patch: pytest.MonkeyPatch) -> None:
    """Paper 5.2: who has just given its vote stands against its candidate."""
    on_vote_request = RaftCore._on_vote_request

    def vote(core: RaftCore, message: VoteRequest) -> None:
        elapsed_ticks = core._election_elapsed_ticks
        on_vote_request(core, message)
        core._election_elapsed_ticks = elapsed_ticks

    patch.setattr(RaftCore, "_on_vote_request", vote)


def membership_of_a_state_not_taken(patch: pytest.MonkeyPatch) -> None:
    """T64: whoever is sent a state goes on with the members that it knew before."""
    patch.setattr(MembershipLog, "restore", lambda *_: None)


MUTANTS: list[Mutant] = [
    vote_not_persisted,
    sent_before_synced,
    own_copy_counted_unsynced,
    old_term_committed_by_counting,
    read_before_own_commit,
    read_without_a_round,
    read_given_though_deposed,
    truncated_always,
    commit_not_bounded_by_the_message,
    match_goes_back,
    votes_counted_by_message,
    membership_changed_before_own_commit,
    membership_changed_twice_at_once,
    membership_not_rolled_back,
    stale_append_reply_accepted,
    old_round_answered_in_the_new_term,
    pre_vote_without_log_check,
    no_pre_vote,
    vote_forgotten_within_the_term,
    entries_left_out_of_a_ready,
    base_term_forgotten,
    membership_forgotten_with_its_entry,
    state_acknowledged_before_it_is_in_place,
    state_acknowledged_for_another,
    log_emptied_before_the_state_is_in_place,
    log_dropped_before_the_state_is_saved,
    removed_leader_counts_itself,
    removed_leader_stays,
    removal_believed_before_it_is_committed,
    removed_server_is_not_told,
    silent_learner_kept,
    sessions_left_out_of_the_state,
    serial_not_looked_at,
    expired_by_the_readers_clock,
    expired_never,
    purged_before_its_time,
    other_value_read,
    flush_hands_out_what_is_there_now,
    changed_while_leadership_is_handed_over,
    transfer_never_given_up,
    quorum_not_checked,
    election_timeout_not_random,
    timer_runs_on_after_a_vote,
    membership_of_a_state_not_taken,
]


def _verdict(mutant: Mutant) -> Verdict:
    """Of a process that has nothing else patched."""
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        _, violation = first_violation(MUTANT_SEEDS)
    if violation is None:
        return None, False
    return str(violation), isinstance(violation.__cause__, BROKEN)


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, processes: Pool
) -> Mapping[Mutant, AsyncResult[Verdict]]:
    """Of the mutants that this run asks for, side by side: a few take most of the time."""
    chosen = [
        cast("Mutant", item.callspec.params["mutant"])
        for item in cast("list[pytest.Function]", request.session.items)
        if item.originalname == test_simulation_catches_the_mutant.__name__
    ]
    return {mutant: processes.apply_async(_verdict, (mutant,)) for mutant in chosen}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_simulation_catches_the_mutant(
    mutant: Mutant, verdicts: Mapping[Mutant, AsyncResult[Verdict]]
) -> None:
    """A harness that can't fail proves nothing: each mistake is seen within these seeds."""
    violation, is_broken = verdicts[mutant].get()

    assert violation is not None
    assert "replay: python tests/simulator.py --seed" in violation
    assert not is_broken, "it is the mutant that is broken, not the cluster"
