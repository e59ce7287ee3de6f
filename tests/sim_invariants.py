"""What must hold in a simulated cluster after every step of every server.

Rule 1: it watches from outside: it sees all servers and disks at once, and changes nothing.
Rule 2: a broken invariant is reported at the step that broke it, by number or by section.

The paper's figure 3, and what it rests on:
I1   at most one leader a term, elected by the synced votes of a majority
I2   log matching: an index and a term name one entry, and the same entry before it
I3   leader completeness: what is committed is in the log of every later leader
I4   state machine safety: one entry an index, wherever it is committed or applied
I5   term and commit index of a server, match index of a leadership: never back
I6   one vote a term and server, across restarts too
I7   applied <= committed <= last index; terms in a log never decrease
I8   a leader only appends
I9   what a message promises is on its sender's disk when it leaves
I10  what a leader commits is on the disks of a majority at that instant
I13  equal applied index, equal state hash, on all servers that ever apply it
I14  what changes a key gives it the entry's index as its version
Besides these: paper 5.4.1, 5.4.2 and section 7 (a state holds what was committed up to its index,
no more, no less), thesis 4.1 (membership) and 6.4 (reads).

Called by ``sim_cluster.py``. What clients may see is checked by ``sim_clients.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from kv_commands import decode_payload
from kv_store import KeyRow, _key_row
from raft_core import RaftCore
from raft_types import (
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    HashReport,
    MemberId,
    Membership,
    Message,
    Role,
    SnapshotOutcome,
    SnapshotReply,
    VoteReply,
    VoteRequest,
)
from tests.raft_servers import SimDisk, SimState, describe_entry

EVERYTHING_BYTES = 1 << 30
ACKNOWLEDGED_LOOKED_AT = 20


class ViolationError(AssertionError):
    """The cluster did what Raft forbids."""

    step = 0  # of the history


class InvalidRunError(Exception):
    """Too little happened: the history proves nothing, neither that a cluster works nor that it fails."""


class Watched:
    """One run of one server, from start to crash, as it was after its last step."""

    def __init__(self, name: MemberId, core: RaftCore, disk: SimDisk) -> None:
        self.name = name
        self.core = core
        self.disk = disk
        # What the core's log holds, in memory or not, and what came before it: followed step by step.
        self.log = disk.found()
        self.term = core.term
        self.role = core.role
        self.commit_index = core.commit_index
        self.applied = list(disk.state.entries)  # what has led to the store's state
        self.store = disk.state.rows.load(disk.state.snapshot.index)
        # Of the keys that are named by what is being applied.
        self.rows_before: dict[bytes, KeyRow | None] = {}
        self.vote = (core.term, core.voted_for)
        self.voted_at_ticks = 0
        self.has_evidence = False  # that a leader is dead, so it need not wait for a timeout
        self.truncated_count = 0
        self.match: dict[MemberId, int] = {}

    def membership_at(self, index: int) -> tuple[int, Membership]:
        """What the log says up to ``index``, and where it says so."""
        for entry in reversed(self.log[:index]):
            if entry.kind is EntryKind.MEMBERSHIP:
                return entry.index, Membership.decode(entry.data)
        return 0, Membership()

    @property
    def applied_index(self) -> int:
        """How far the state machine is."""
        return len(self.applied)


def _named_rows(server: Watched, entry: Entry) -> dict[bytes, KeyRow | None]:
    """The row of every key that the command may name: any of its words may be one."""
    _, argv, _ = decode_payload(entry.data)
    store = server.store
    return {w: _key_row(store._values, store._versions, store._deadlines, w) for w in argv[1:]}


# Who votes, and how many are a majority, not by the code that is under test.


def voters_of(membership: Membership) -> list[MemberId]:
    """Its members, but for the learners."""
    return [member.member_id for member in membership.members if member.voter]


def is_majority(names: Iterable[MemberId], membership: Membership) -> bool:
    """Whether these are more than half of its voters."""
    voters = voters_of(membership)
    return 2 * len(set(voters).intersection(names)) > len(voters)


class Cluster(Protocol):
    """Who is up now; the invariants need no more of the simulation."""

    def running(self) -> list[Watched]:
        """The servers that are up."""

    def disk_of(self, member_id: MemberId) -> SimDisk | None:
        """The disk of this server, whether it is up or not; None: there is no such server."""


class Invariants:
    """What is known of the whole cluster since the beginning."""

    def __init__(
        self, cluster: Cluster, founders: Iterable[MemberId], counts: Counter[str]
    ) -> None:
        self._cluster = cluster
        self.counts = counts
        self.committed: list[Entry] = []
        self.removed: set[MemberId] = set()  # by a committed change
        self._members = set(founders)  # by the last one
        self._committed_in: list[int] = []  # the term of the leader that committed it
        self._leader_of: dict[int, MemberId] = {}
        self._vote_of: dict[tuple[MemberId, int], MemberId] = {}
        # By (index, term): the entry, and the term of the entry before it.
        self._known: dict[tuple[int, int], tuple[Entry, int]] = {}
        # Requests that came with a log as good as the receiver's, and were not granted yet.
        self._grantable: Counter[tuple[MemberId, MemberId, int, bool]] = Counter()
        self._sent: dict[int, tuple[Entry, ...]] = {}  # led to the state, by the transfer's id
        self._hashes: dict[int, int] = {}  # of the state after each entry
        self._timeouts_ticks: list[int] = []  # as drawn by whoever has just begun to stand
        self._reads: dict[int, int] = {}  # committed anywhere when it was asked, by token
        self._served_index = 0  # the furthest that any client may have seen

    @staticmethod
    def require(holds: bool, broken: str) -> None:
        """Raise ViolationError unless the fact holds."""
        if not holds:
            raise ViolationError(broken)

    # ---- After each step of a server -----------------------------------------------------------

    def observe(self, server: Watched) -> None:
        """Compare the server with what it was before this step."""
        core = server.core
        core.check_invariants()  # I7 and what a server can see of itself
        self.require(core.term >= server.term, f"I5: {server.name}'s term went back")
        self._follow_log(server)
        if core.role is Role.LEADER:
            self._observe_leader(server)
        self._follow_commit(server)
        if core.is_removed:
            self.require(server.name in self.removed, f"{server.name} believes that it was removed")
            self.require(
                core.role is not Role.LEADER, f"4.2.2: {server.name} leads, though removed"
            )
        self._follow_vote(server)
        server.term, server.role = core.term, core.role

    def _follow_vote(self, server: Watched) -> None:
        core, ticks = server.core, server.core._now_ticks
        stands = core.role is Role.PRE_CANDIDATE and server.role is Role.FOLLOWER
        waited_ticks = ticks - server.voted_at_ticks
        if stands and not server.has_evidence:
            self._timeouts_ticks.append(core._election_timeout_ticks)
        if stands and server.voted_at_ticks and not server.has_evidence:
            self.require(
                waited_ticks >= core.config.election_ticks_min,
                f"paper 5.2: {server.name} stands {waited_ticks} ticks after it gave its vote",
            )
        if core.voted_for not in (None, server.name) and server.vote != (core.term, core.voted_for):
            server.vote, server.voted_at_ticks = (core.term, core.voted_for), ticks

    def check_timeouts(self) -> None:
        """At the end: chance keeps apart who would else stand together for ever."""
        are_many = len(self._timeouts_ticks) >= 10
        is_random = len(set(self._timeouts_ticks)) > 1
        self.require(is_random or not are_many, "paper 5.2: election timeouts are not random")

    def _follow_log(self, server: Watched) -> None:
        core, log = server.core, server.log
        cut = core.truncated_count - server.truncated_count
        if cut:
            led = server.role is Role.LEADER and core.role is Role.LEADER
            self.require(not led, f"I8: leader {server.name} cut its own log")
            del log[len(log) - cut :]
            server.truncated_count = core.truncated_count
            self.counts["truncated"] += cut
        changes = cut > 0
        if core.log.last_index > len(log):
            new = core.log.entries(len(log) + 1, EVERYTHING_BYTES)
            assert new is not None
            for entry in new:
                self._learn(server, entry)
                log.append(entry)
                changes |= entry.kind is EntryKind.MEMBERSHIP
        self.require(core.log.last_index == len(log), f"I8: {server.name} lost entries unseen")
        if changes:
            self._check_membership(server)
        if log and log[-1].index >= core.log.first_index:
            middle = log[(core.log.first_index + len(log) - 1) // 2]
            self.require(core.log.term_at(middle.index) == middle.term, "I7: term_at is wrong")

    def _check_membership(self, server: Watched) -> None:
        _, last = server.membership_at(len(server.log))
        is_same = server.core.membership == last
        self.require(is_same, f"thesis 4.1: {server.name} has not the membership of its log")

    def _learn(self, server: Watched, entry: Entry) -> None:
        before = server.log[-1].term if server.log else 0
        self.require(before <= entry.term <= server.core.term, "I7: terms in a log decrease")
        key = (entry.index, entry.term)
        known = self._known.setdefault(key, (entry, before))
        if known != (entry, before):
            other = describe_entry(known[0])
            raise ViolationError(f"I2: {server.name} has {describe_entry(entry)}, another {other}")
        led = server.core.role is Role.LEADER and server.core.term == entry.term
        if entry.kind is EntryKind.MEMBERSHIP and led:
            commit = server.core.commit_index
            own = commit > 0 and server.log[commit - 1].term == entry.term
            pending = [e for e in server.log[commit:] if e.kind is EntryKind.MEMBERSHIP]
            self.require(own, "thesis 4.1: membership changed before an own entry was committed")
            self.require(not pending, "thesis 4.1: two changes of membership under way")

    def _observe_leader(self, server: Watched) -> None:
        core = server.core
        if server.role is not Role.LEADER or server.term != core.term:
            first = self._leader_of.setdefault(core.term, server.name)
            self.require(first == server.name, f"I1: {first} and {server.name} led {core.term}")
            if server.disk.hard_state == (core.term, server.name):
                self._on_vote(server, core.term, server.name)  # alone, it asked no one
            voters = voters_of(core.membership)
            votes = [v for v in voters if self._vote_of.get((v, core.term)) == server.name]
            self.require(
                is_majority(votes, core.membership), f"paper 5.2: {server.name} leads by {votes}"
            )
            for entry, term in zip(self.committed, self._committed_in, strict=True):
                # Votes may be slow: a later leader may have committed more by now.
                has = server.log[entry.index - 1 : entry.index] == [entry]
                if not has and term <= core.term:
                    raise ViolationError(f"I3: {server.name} lacks {describe_entry(entry)}")
            server.match = {}
            self.counts["elections"] += 1
        before, server.match = server.match, {}
        for member, progress in core.progress.items():
            server.match[member] = progress.match_index
            held = progress.match_index >= before.get(member, 0)
            self.require(held, f"I5: match of {member} went back")
            self.require(progress.acked_round <= core.round, "thesis 6.4: an answer from before")

    def _follow_commit(self, server: Watched) -> None:
        core = server.core
        before, server.commit_index = server.commit_index, core.commit_index
        self.require(core.commit_index >= before, f"I5: {server.name}'s commit index went back")
        if core.commit_index == before:
            return
        # It may have ended its leadership by this very commit (thesis 4.2.2).
        led = server.role is Role.LEADER and server.term == core.term
        if led or core.role is Role.LEADER:
            last = server.log[core.commit_index - 1]
            self.require(last.term == core.term, "paper 5.4.2: committed an old term by counting")
            holders = [v for v in voters_of(core.membership) if self._has_synced(v, last)]
            self.require(
                is_majority(holders, core.membership),
                f"I10: {describe_entry(last)} committed, but synced only on {holders}",
            )
        for entry in server.log[before : core.commit_index]:
            if entry.index > len(self.committed):
                self.require(
                    led or core.role is Role.LEADER,
                    f"I4: {server.name} commits what no leader did",
                )
                self._commit_first(server, entry)
            if self.committed[entry.index - 1] != entry:
                others = describe_entry(self.committed[entry.index - 1])
                raise ViolationError(
                    f"I4: {server.name} commits {describe_entry(entry)}, others {others}"
                )

    def _commit_first(self, server: Watched, entry: Entry) -> None:
        term = server.core.term
        self.committed.append(entry)
        if entry.kind is EntryKind.MEMBERSHIP:
            members = {m.member_id for m in Membership.decode(entry.data).members}
            self.removed |= self._members - members
            self._members = members
        self._committed_in.append(term)
        for other in self._cluster.running():
            leads_later = other.core.role is Role.LEADER and other.core.term > term
            if leads_later and other.log[entry.index - 1 : entry.index] != [entry]:
                lacking = describe_entry(entry)
                raise ViolationError(f"I3: later leader {other.name} lacks {lacking}")

    def _has_synced(self, member_id: MemberId, entry: Entry) -> bool:
        disk = self._cluster.disk_of(member_id)
        return disk is not None and disk.found_at(entry.index) == entry

    # ---- What goes in and out ------------------------------------------------------------------

    def before_step(self, server: Watched, message: Message) -> None:
        """A message is about to be taken in; for what its answer will be held against."""
        if isinstance(message, VoteRequest):
            mine = (server.log[-1].term, server.log[-1].index) if server.log else (0, 0)
            if (message.last_term, message.last_index) >= mine:
                key = (message.sender, server.name, message.term, message.pre_vote)
                self._grantable[key] += 1

    def on_send(self, server: Watched, message: Message) -> None:
        """A message leaves, so what it promises must be on disk at this instant (I9)."""
        if isinstance(message, HashReport):
            return  # which promises nothing
        saved = server.disk.hard_state
        asks = isinstance(message, VoteRequest | VoteReply) and message.pre_vote
        self.require(
            asks or message.term <= saved.term,
            f"I9: {server.name} speaks in term {message.term}, its disk says {saved.term}",
        )
        match message:
            case AppendEntries():
                leader = self._leader_of.get(message.term)
                self.require(leader == server.name, f"I1: {server.name} is no leader of its term")
            case AppendReply(success=True):
                self._on_acknowledge(server, message)
            case SnapshotReply(outcome=SnapshotOutcome.INSTALLED):
                self.counts["snapshots installed"] += 1
                held, index = server.disk.found_last_index(), len(self._sent[message.snapshot_id])
                self.require(
                    held >= index, f"I9: {server.name} says it has {index}, its disk ends at {held}"
                )
            case VoteRequest(pre_vote=False):
                self._on_vote(server, message.term, message.sender)
            case VoteReply(granted=True):
                key = (message.to, server.name, message.term, message.pre_vote)
                self.require(
                    self._grantable[key] > 0,
                    f"paper 5.4.1, thesis 9.6: {server.name} would vote for a log behind its own",
                )
                self._grantable[key] -= 1
                if not message.pre_vote:
                    self._on_vote(server, message.term, message.to)

    def _on_vote(self, server: Watched, term: int, candidate: MemberId) -> None:
        saved = server.disk.hard_state
        # In a later term the earlier vote can't be given again, so it need not be remembered.
        self.require(
            saved.term > term or saved == (term, candidate),
            f"I9: {server.name} votes for {candidate} in {term}, its disk says {saved}",
        )
        first = self._vote_of.setdefault((server.name, term), candidate)
        self.require(first == candidate, f"I6: {server.name} votes for {first} and {candidate}")

    def _on_acknowledge(self, server: Watched, message: AppendReply) -> None:
        if server.disk.hard_state.term > message.term:
            return  # since replaced by a later leader, who can only be one that has what counts
        count, disk = message.match_index, server.disk
        held = disk.found_last_index()
        self.require(
            held >= count,
            f"I9: {server.name} acknowledges {count}, its disk ends at {held}",
        )
        leader = next((s for s in self._cluster.running() if s.name == message.to), None)
        if leader and leader.core.role is Role.LEADER and leader.core.term == message.term:
            # Of a long log not everything each time: what is further back was looked at before.
            recent = range(max(0, count - ACKNOWLEDGED_LOOKED_AT), count)
            self.require(
                all(disk.found_at(place + 1) == leader.log[place] for place in recent),
                f"I9: what {server.name} acknowledges is not the leader's log",
            )

    def on_start(self, server: Watched) -> None:
        """A server has loaded its state."""
        if server.applied_index:
            self._compare_hash(server, server.applied_index, server.store.state_hash)

    def before_apply(self, server: Watched, entry: Entry) -> None:
        """An entry is about to reach a state machine."""
        self.require(entry.index == server.applied_index + 1, "I7: applied out of order")
        self.require(self.committed[entry.index - 1] == entry, f"I4: {server.name} applies another")
        self.require(entry.index <= server.core.commit_index, "I7: applied before committed")
        server.applied.append(entry)

        if entry.kind is EntryKind.COMMAND:
            server.rows_before = _named_rows(server, entry)

    def after_apply(self, server: Watched, entry: Entry) -> None:
        """The state machine has applied the entry."""
        self._compare_hash(server, entry.index, server.store.state_hash)
        if entry.kind is EntryKind.COMMAND:
            for key, row in _named_rows(server, entry).items():
                before = server.rows_before[key]
                if row not in (None, before) and row[1] != entry.index:
                    raise ViolationError(f"I14: {describe_entry(entry)} makes of {before} {row}")

    def _compare_hash(self, server: Watched, index: int, state_hash: int) -> None:
        known = self._hashes.setdefault(index, state_hash)
        self.require(
            known == state_hash,
            f"I13: {server.name} has {state_hash:x} at {index}, another had {known:x}",
        )

    # ---- States (paper section 7) --------------------------------------------------------------

    def on_save(self, server: Watched, state: SimState) -> None:
        """A state is about to be made durable, the server's own or one that it was sent."""
        index, term, membership, membership_index = state.snapshot
        self.require(
            list(state.entries) == self.committed[:index] and state.entries[-1].term == term,
            f"section 7: {server.name}'s state at {index} is not what was committed",
        )
        last = [e for e in state.entries if e.kind is EntryKind.MEMBERSHIP][-1]
        self.require(
            (membership_index, membership) == (last.index, Membership.decode(last.data)),
            f"section 7: {server.name}'s state at {index} has another membership",
        )
        self._check_rows(server, state)

    def _check_rows(self, server: Watched, state: SimState) -> None:
        """The rows are the store's as it was at that index."""
        store = state.rows.load(state.snapshot.index)
        self._compare_hash(server, state.snapshot.index, state.rows.state_hash)
        self._compare_hash(server, state.snapshot.index, store.recompute_state_hash())

    def on_open(self, snapshot_id: int, state: SimState) -> None:
        """A transfer of this state begins."""
        self._sent[snapshot_id] = state.entries

    def entries_of(self, snapshot_id: int) -> tuple[Entry, ...]:
        """What has led to the state of this transfer."""
        return self._sent[snapshot_id]

    def on_restore(self, server: Watched, state: SimState) -> None:
        """The core has just been told of a state that was installed here."""
        index, *_ = state.snapshot
        had_it = server.log[index - 1 : index] == [state.entries[-1]]
        what = "kept" if had_it else "emptied" if len(server.log) < index else "replaced"
        self.counts[f"logs {what}"] += 1
        if not had_it:
            server.log = list(state.entries)
        server.truncated_count = server.core.truncated_count
        self._check_membership(server)
        if index > server.applied_index:
            server.applied = list(state.entries)
            server.store.adopt(state.rows.load(index))

    # ---- Linearizable reads (thesis 6.4) -------------------------------------------------------

    def on_read_asked(self, token: int) -> None:
        """A client asks for a read: it must see whatever is committed anywhere by now."""
        self._reads[token] = len(self.committed)

    def on_read_given(self, token: int, read_index: int) -> None:
        """A leader allows the read at this index, once."""
        self.require(token in self._reads, "thesis 6.4: a read is allowed twice")
        asked_at = self._reads.pop(token)
        self.require(
            read_index >= asked_at,
            f"thesis 6.4: a read at {read_index} misses a write committed at {asked_at} before it",
        )
        self.counts["reads"] += 1

    def on_served(self, index: int) -> None:
        """A client gets an answer that shows the state as it was at this index, or later."""
        self._served_index = max(self._served_index, index)

    def on_lease_read(self, server: Watched) -> None:
        """A leader allows a read by itself.

        It may miss what the next leader has committed, as long as that one has shown it to nobody.
        """
        self.require(
            server.core.commit_index >= self._served_index,
            f"thesis 6.4.1: {server.name} reads at {server.core.commit_index} by its lease, "
            f"though {self._served_index} was seen",
        )
        self.counts["reads by lease"] += 1
