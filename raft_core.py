"""Raft as a pure state machine: ``tick``, ``step``, ``propose`` and ``read_index`` in, values out.

Rule 1: every decision of the algorithm lives in this file, or in ``raft_progress.py`` and
``raft_members.py``, which are parts of it.
Rule 2: no socket, disk, thread, lock, clock or global random: time is a count of ticks, chance is
the ``random.Random`` it is given. The same calls give the same results.
Rule 3: what must be durable comes out of ``ready`` together with the messages that may only leave
after it; ``advance`` says that it is durable. A server counts its own vote and its own copy of an
entry only then (raft-traps T1, T4, T5).
Rule 4: an assertion that fails is a bug of ours or a broken disk; the process must stop.

Out come, each pulled by the driver's thread that does the work: ``ready`` (disk, then replies and
votes), ``append_for`` (the next AppendEntries to a follower: pulled, so that all that has gathered
goes in one), ``entries_to_apply``, ``take_reads``. What a snapshot is made of, and how its bytes
travel, is the driver's; the core is told when one has been sent or restored.

Figures and sections: "paper" is Ongaro and Ousterhout 2014, "thesis" Ongaro 2014.
The driver is ``raft_node.py``.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable, Iterable, Sequence

from raft_log import MembershipLog, RaftLog, entry_bytes
from raft_members import Followers
from raft_progress import Progress, ProgressState
from raft_types import (
    AppendEntries,
    AppendReply,
    EntriesOnDisk,
    Entry,
    EntryKind,
    HardState,
    Member,
    MemberId,
    Membership,
    Message,
    RaftConfig,
    Ready,
    Role,
    Room,
    Snapshot,
    SnapshotChunk,
    SnapshotDue,
    SnapshotOutcome,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)


class NotLeaderError(Exception):
    """This server does not lead; nothing was appended."""


class TransferUnderWayError(Exception):
    """The leadership is being handed over; nothing was appended."""


class TransferRefusedError(Exception):
    """The leadership can't be handed over; the text says why."""


class TooMuchUncommittedError(Exception):
    """The log's uncommitted end is at its limit; nothing was appended."""


class ImpossibleMessageError(Exception):
    """No server that keeps to the protocol can have sent this: it was not taken in.

    A bug of ours, or somebody who knows the cluster's ids. To end for it would let one bad server
    end all others.
    """


class MembershipChangeRefusedError(Exception):
    """A change of membership can't start now; nothing was appended."""


# Attempts with a short pause after the leader's death, before falling back to the timeout.
DEAD_LEADER_ATTEMPTS_MAX = 4


class RaftCore:
    """One server's part in Raft."""

    def __init__(
        self,
        member_id: MemberId,
        config: RaftConfig,
        log: RaftLog,
        hard_state: HardState,
        memberships: Iterable[tuple[int, Membership]],
        rng: random.Random,
        *,
        commit_index: int = 0,
    ) -> None:
        """``memberships``: of the log and of the durable state, which has reached ``commit_index``."""
        assert log.first_index <= commit_index + 1 <= log.last_index + 1
        self.member_id = member_id
        self.config = config
        self.log = log
        self._rng = rng
        # Persistent (paper figure 2). Changes leave through ``ready`` before any message does.
        assert log.last_term <= hard_state.term, "a log of a term that nobody has heard of"
        self.term, self.voted_for = hard_state
        self._saved_hard_state = hard_state
        self._memberships = MembershipLog(member_id, memberships)
        self.membership = self._memberships.latest
        self._has_vote = self.membership.is_voter(member_id)
        # Volatile.
        self.role = Role.FOLLOWER
        self.leader_id: MemberId | None = None
        self.commit_index = commit_index
        self.may_campaign = True
        self.room = Room.PLENTY  # on this server's disk; the driver sets it
        self._messages: list[Message] = []
        self._notices: list[str] = []
        self._ready_out: Ready | None = None
        self._log_base: tuple[int, int] | None = None  # for the next Ready
        self._votes: dict[MemberId, bool] = {}
        self._now_ticks = 0
        self._dead_leader_attempts = 0  # left with a short pause
        self._dead_leader_rank = 0  # how many of the others stand before this server
        # Ticks since a leader was heard, a vote was granted or a campaign began.
        self._election_elapsed_ticks = 0
        self._election_timeout_ticks = 0
        self._reset_election_timer()
        if self.membership.voters == (member_id,):
            self._election_timeout_ticks = 1  # no other leader can be alive: work at once
        # Of the leader.
        self._followers = Followers(member_id, config, self._notices)
        self.progress = self._followers.progress
        self.truncated_count = 0  # entries this server ever had to give up
        self._heartbeat_elapsed_ticks = 0
        self._term_first_index = 0  # the index of this leadership's no-op
        self.led_commit_index = 0  # how far it had committed when it last ceased to lead
        # The last term in which it led, or may have led before it started.
        self._led_term = self.term if self.voted_for == member_id else 0
        self._uncommitted: deque[tuple[int, int]] = deque()  # (last index, bytes) by proposal
        self._uncommitted_bytes = 0
        self.transfer_target: MemberId | None = None  # who is to lead instead
        self._transfer_ticks = 0
        self.round = 0  # heartbeat rounds begun in this leadership
        self._reads_waiting: list[Hashable] = []  # for a round that has not begun
        self._reads_in_round: list[Hashable] = []
        self._read_round = 0  # the round that answers them; 0: none under way
        self._read_index = 0
        self._reads_done: list[tuple[int, list[Hashable]]] = []

    # ---- Time ----------------------------------------------------------------------------------

    def tick(self) -> None:
        """One tick has passed."""
        self._now_ticks += 1
        if self.role is Role.LEADER:
            self._tick_leader()
            return
        self._election_elapsed_ticks += 1
        if self._election_elapsed_ticks >= self._election_timeout_ticks:
            self._dead_leader_attempts = max(0, self._dead_leader_attempts - 1)
            self._reset_election_timer()
            # Also where no campaign follows: a silent leader is owed no loyalty (thesis 4.2.3).
            self.leader_id = None
            if not self._memberships.may_stand(self.commit_index):
                if not self.is_removed:
                    self._ask_voters(pre_vote=True)  # for a sign of life; the answer elects no one
            elif self.may_campaign:
                self._campaign(pre_vote=True)

    def _tick_leader(self) -> None:
        self._heartbeat_elapsed_ticks += 1
        if self._heartbeat_elapsed_ticks >= self.config.heartbeat_ticks:
            self._start_round()
        if self.transfer_target is not None:
            self._transfer_ticks += 1
            if self._transfer_ticks >= self.config.election_ticks_min:
                self.transfer_target = None  # it does not take over: go on (thesis 3.10)
        if not self.membership.has_quorum(self._followers.answering(self._now_ticks)):
            # Check-quorum: clients must not hang on a leader that is cut off (thesis 6.2).
            self._become_follower(self.term, None)
            return
        if self._may_change_membership:
            self._followers.forget_outsiders(self._memberships.latest_index, self._now_ticks)
            changed = self._followers.next_change(
                self.membership, self.log.last_index, self._now_ticks
            )
            if changed is not None:
                self._propose_membership(changed)

    def _reset_election_timer(self) -> None:
        # Randomised anew each time so that split votes are rare: paper 5.2, thesis 3.4.
        self._election_elapsed_ticks = 0
        low, high = self.config.election_ticks_min, self.config.election_ticks_max
        if self._dead_leader_attempts > 0:
            failed = DEAD_LEADER_ATTEMPTS_MAX - self._dead_leader_attempts
            wait = self.config.dead_leader_vote_ticks if failed else 0
            # All learn of the death at one time. Were chance alone to keep them apart, a vote that
            # takes long, as on a busy machine, would be split again and again.
            apart = self.config.dead_leader_ticks << failed
            wait += self._dead_leader_rank * apart
            low, high = min(low, wait + apart // 5), min(high, wait + apart // 2)
        self._election_timeout_ticks = self._rng.randint(low, high)

    def leader_died(self, member_id: MemberId) -> None:
        """There is evidence that this member's process is gone, not merely silent.

        If it led, this server no longer waits out the timeout, nor holds others to it: a campaign
        follows after a short pause. Safety does not rest on the evidence.
        """
        if self.role is not Role.LEADER and self.leader_id == member_id:
            self.leader_id = None
            others = set(self.membership.voters) - {member_id}
            self._dead_leader_rank = sum(other < self.member_id for other in others)
            self._dead_leader_attempts = DEAD_LEADER_ATTEMPTS_MAX
            self._reset_election_timer()

    # ---- Roles ---------------------------------------------------------------------------------

    def _become_follower(self, term: int, leader_id: MemberId | None) -> None:
        assert term >= self.term
        if term > self.term:
            self.term = term
            self.voted_for = None  # never within a term: raft-traps T3
        if self.role is Role.LEADER:
            self._reset_election_timer()
            self.led_commit_index = self.commit_index
        self.role = Role.FOLLOWER
        self.leader_id = leader_id
        self._votes = {}
        # Of a leadership that is over. The driver tells those who wait.
        self._followers.clear()
        self._uncommitted.clear()
        self._uncommitted_bytes = 0
        self.transfer_target = None
        self._read_round = 0
        self._reads_waiting = []
        self._reads_in_round = []
        self._reads_done = []

    def _campaign(self, *, pre_vote: bool, transfer: bool = False) -> None:
        """Ask for votes, or first whether an election could be won at all (thesis 9.6)."""
        self._votes = {}
        self.leader_id = None
        if pre_vote:
            self.role = Role.PRE_CANDIDATE
            self._votes[self.member_id] = True
            if self.membership.has_quorum(self._votes):
                self._campaign(pre_vote=False)
                return
        else:
            self.role = Role.CANDIDATE
            self.term += 1
            self.voted_for = self.member_id  # counted in ``advance``, when it is on disk
        self._ask_voters(pre_vote=pre_vote, transfer=transfer)

    def _ask_voters(self, *, pre_vote: bool, transfer: bool = False) -> None:
        for voter in self.membership.voters:
            if voter != self.member_id:
                self._messages.append(
                    VoteRequest(
                        sender=self.member_id,
                        to=voter,
                        term=self.term + 1 if pre_vote else self.term,
                        last_index=self.log.last_index,
                        last_term=self.log.last_term,
                        pre_vote=pre_vote,
                        transfer=transfer,
                    )
                )

    def _become_leader(self) -> None:
        assert self.role is Role.CANDIDATE
        assert self.membership.has_quorum(m for m, granted in self._votes.items() if granted)
        self.role = Role.LEADER
        self._led_term = self.term
        self.leader_id = self.member_id
        self._dead_leader_attempts = 0
        self._heartbeat_elapsed_ticks = 0
        self.round = 0
        self._followers.clear()
        self._followers.follow(self.membership, self.log.last_index, self._now_ticks)
        # Only an entry of its own term lets a leader commit what came before (paper 5.4.2) and
        # know the commit index that reads must reach (thesis 6.4).
        self._term_first_index = self._append(EntryKind.NOOP, [b""])

    def give_way(self) -> None:
        """Stop leading; another may, and this server again later."""
        if self.role is Role.LEADER:
            self._become_follower(self.term, None)

    # ---- Leadership transfer (thesis 3.10) -----------------------------------------------------

    def transfer_to(self, target: MemberId | None) -> None:
        """Hand the leadership to a voter, or (None) to the one whose log is furthest.

        Until it is over, new proposals are refused, so that everything can be committed first.
        Raises NotLeaderError or TransferRefusedError.
        """
        if self.role is not Role.LEADER:
            raise NotLeaderError
        if not self.committed_in_own_term or self.transfer_target is not None:
            raise TransferRefusedError("a change of leadership is under way; try again")
        alive = [
            voter
            for voter in self._followers.answering(self._now_ticks)
            if voter != self.member_id and self.membership.is_voter(voter)
        ]
        if target is None and alive:
            target = max(alive, key=lambda voter: self.progress[voter].match_index)
        if target not in alive:
            raise TransferRefusedError("no other voter answers, or not the one that is named")
        self.transfer_target = target
        self._transfer_ticks = 0
        self._go_on_with_transfer()

    def _go_on_with_transfer(self) -> None:
        """Tell the target to campaign once it has everything, and everything is committed."""
        target = self.transfer_target
        if target is None or self.commit_index < self.log.last_index:
            return
        if self.progress[target].match_index == self.log.last_index:
            self._messages.append(TimeoutNow(self.member_id, target, self.term))

    def _on_timeout_now(self) -> None:
        if self.role is Role.FOLLOWER and self.may_campaign and self._has_vote:
            self._campaign(pre_vote=False, transfer=True)

    def step_down(self) -> None:
        """Stop leading, and do not stand again: this server's state machine can't be trusted."""
        self.may_campaign = False
        if self.role is not Role.FOLLOWER:
            self._become_follower(self.term, None)

    # ---- Messages ------------------------------------------------------------------------------

    def step(self, message: Message) -> None:
        """Take in a message from a peer. Raises ImpossibleMessageError."""
        if message.term > self.term:
            if not self._accept_newer_term(message):
                return
        elif message.term < self.term:
            self._answer_older_term(message)
            return
        match message:
            case AppendEntries():
                self._on_append(message)
            case AppendReply():
                self._on_append_reply(message)
            case VoteRequest():
                self._on_vote_request(message)
            case VoteReply():
                self._on_vote_reply(message)
            case SnapshotChunk():
                self._hear_leader(message.sender)
            case SnapshotReply():
                self._on_snapshot_reply(message)
            case TimeoutNow():
                self._on_timeout_now()
            case _:
                raise TypeError(f"not a message for the core: {message}")

    def _accept_newer_term(self, message: Message) -> bool:
        """Move to the message's term if it has the right to move us; False: ignore it."""
        match message:
            case VoteRequest() if self._hears_leader and not message.transfer:
                # Leader stickiness: no one disturbs a leader that works (thesis 4.2.3).
                self._tell_outsider(message.sender)
                return False
            case VoteRequest(pre_vote=True) | VoteReply(pre_vote=True, granted=True):
                return True  # a term that is only asked about; ours stays
            case AppendEntries() | SnapshotChunk():
                self._become_follower(message.term, message.sender)
            case _:
                self._become_follower(message.term, None)
        return True

    @property
    def _hears_leader(self) -> bool:
        if self.role is Role.LEADER:
            return True
        return (
            self.leader_id is not None
            and self._election_elapsed_ticks < self.config.election_ticks_min
        )

    def _answer_older_term(self, message: Message) -> None:
        """Tell a stale leader or candidate our term; stale answers are dropped (T18, T30)."""
        match message:
            case AppendEntries() | SnapshotChunk():
                # Only the term: by now the sender may lead ours, and would take a round of its
                # earlier leadership for one of this (thesis 6.4).
                self._messages.append(
                    AppendReply(self.member_id, message.sender, self.term, False, 0, 0)
                )
            case VoteRequest():
                self._answer_vote(message, granted=False)

    # ---- Election (paper 5.2 and 5.4.1, thesis 9.6) ----

    def _on_vote_request(self, message: VoteRequest) -> None:
        up_to_date = self.log.is_up_to_date(message.last_index, message.last_term)
        if message.pre_vote:
            # Changes nothing here: not the term, the vote or the timer.
            granted = up_to_date and message.term > self.term and not self._hears_leader
        else:
            granted = up_to_date and self.voted_for in (None, message.sender)
            granted = granted and self.leader_id is None
            if granted:
                self.voted_for = message.sender
                self._election_elapsed_ticks = 0
        self._answer_vote(message, granted=granted)

    def _answer_vote(self, request: VoteRequest, *, granted: bool) -> None:
        term = request.term if granted else self.term
        self._messages.append(
            VoteReply(self.member_id, request.sender, term, granted, request.pre_vote)
        )

    def _on_vote_reply(self, message: VoteReply) -> None:
        if message.pre_vote:
            if self.role is not Role.PRE_CANDIDATE:
                return
            if message.granted and message.term != self.term + 1:
                return
        elif self.role is not Role.CANDIDATE:
            return
        self._count_vote(message.sender, message.granted)

    def _count_vote(self, voter: MemberId, granted: bool) -> None:
        self._votes[voter] = granted  # by voter, so that a repeated answer counts once (T15)
        if self.membership.has_quorum(m for m, yes in self._votes.items() if yes):
            if self.role is Role.PRE_CANDIDATE:
                self._campaign(pre_vote=False)
            else:
                self._become_leader()
        elif self.membership.has_quorum(m for m, yes in self._votes.items() if not yes):
            self._become_follower(self.term, None)

    # ---- Replication, the follower's side (paper 5.3) ----

    def _hear_leader(self, sender: MemberId) -> None:
        if self.leader_id not in (None, sender):
            raise ImpossibleMessageError(f"two leaders in term {self.term}")
        if self.role is not Role.FOLLOWER or self.leader_id is None:
            self._become_follower(self.term, sender)
        self._election_elapsed_ticks = 0
        if self._dead_leader_attempts > 0:
            # A leader again: the short pause already drawn might be less than a heartbeat.
            self._dead_leader_attempts = 0
            self._reset_election_timer()

    def _on_append(self, message: AppendEntries) -> None:
        self._hear_leader(message.sender)
        log = self.log
        base = log.first_index - 1
        if message.prev_index >= base and message.prev_term < log.term_at(base):
            raise ImpossibleMessageError(f"a leader whose log differs at {base}, a committed entry")
        if not log.matches(message.prev_index, message.prev_term):
            index = log.last_index_up_to_term(message.prev_index, message.prev_term)
            self._refuse_append(message, index, log.term_at(index))
            return
        self._merge(message.entries)
        last_verified = message.prev_index + len(message.entries)
        # Bounded by what this very message has verified (paper figure 2, raft-traps T28).
        self._commit_to(min(message.commit_index, last_verified))
        if message.entries or message.round:
            self._messages.append(
                AppendReply(
                    sender=self.member_id,
                    to=message.sender,
                    term=self.term,
                    success=True,
                    match_index=last_verified,
                    round=message.round,
                    room=self.room,
                )
            )

    def _merge(self, entries: Sequence[Entry]) -> None:
        """Add what is new; truncate only from the first entry that conflicts (raft-traps T27)."""
        for position, entry in enumerate(entries):
            if entry.index > self.log.last_index:
                self._append_entries(entries[position:])
                return
            if not self.log.matches(entry.index, entry.term):
                if entry.index <= self.commit_index:
                    text = f"a leader that would replace {entry.index}, a committed entry"
                    raise ImpossibleMessageError(text)
                self._truncate_from(entry.index)
                self._append_entries(entries[position:])
                return

    def _truncate_from(self, index: int) -> None:
        assert index > self.commit_index, "a committed entry must never be replaced"
        count = self.log.last_index - index + 1
        self.truncated_count += count
        self._notices.append(f"rolled back entries={count}")
        self.log.truncate_from(index)
        self._memberships.truncate_from(index)
        self._use_latest_membership()

    def _refuse_append(self, request: AppendEntries, hint_index: int, hint_term: int) -> None:
        self._messages.append(
            AppendReply(
                sender=self.member_id,
                to=request.sender,
                term=self.term,
                success=False,
                match_index=0,
                round=request.round,
                prev_index=request.prev_index,
                hint_index=hint_index,
                hint_term=hint_term,
                room=self.room,
            )
        )

    # ---- Replication, the leader's side (paper 5.3, 5.4.2) ----

    def _on_append_reply(self, message: AppendReply) -> None:
        progress = self.progress.get(message.sender)
        if progress is None:
            return
        if message.match_index > self.log.last_index or message.round > self.round:
            raise ImpossibleMessageError("an answer to what was not sent")
        progress.heard_ticks = self._now_ticks
        progress.room = message.room
        progress.acked_round = max(progress.acked_round, message.round)
        if message.success:
            if progress.matched(message.match_index, self.round):
                self._advance_commit()
                self._go_on_with_transfer()
        elif message.prev_index > progress.match_index and (
            progress.state is ProgressState.REPLICATE
            or (
                progress.state is ProgressState.PROBE
                and message.prev_index == progress.next_index - 1
            )
        ):
            # Refused, and not by a stale answer: back up to where terms can agree.
            agreed = self.log.last_index_up_to_term(message.hint_index, message.hint_term)
            self._probe_from(progress, agreed + 1)
        elif message.prev_index <= progress.match_index and message.round > progress.matched_round:
            self._followers.note_loss(message.sender, self.membership)
        self._finish_read_round()

    def _probe_from(self, progress: Progress, next_index: int) -> None:
        progress.probe_from(next_index)
        if progress.next_index < self.log.first_index:
            progress.need_snapshot()

    def _advance_commit(self) -> None:
        match = {member: progress.match_index for member, progress in self.progress.items()}
        match[self.member_id] = self.log.stable_index
        index = self.membership.majority_index(match)
        # Only entries of the own term are committed by counting (paper 5.4.2, figure 8).
        if index >= self._term_first_index:
            self._commit_to(index)
            if not self._has_vote and self._memberships.latest_index <= self.commit_index:
                # Removed, and no longer needed to make it so (thesis 4.2.2, raft-traps T65).
                self._become_follower(self.term, None)

    def _commit_to(self, index: int) -> None:
        if index <= self.commit_index:
            return
        assert index <= self.log.last_index
        self.commit_index = index
        while self._uncommitted and self._uncommitted[0][0] <= index:
            self._uncommitted_bytes -= self._uncommitted.popleft()[1]
        if self._reads_waiting:
            self._start_read_round()

    def wants_append(self, member_id: MemberId, commit_due: int | None = None) -> bool:
        """Whether ``append_for`` would give something for this member.

        ``commit_due``: that more than this is committed does not count by itself (None: it does);
        the next entries, most often already on their way, tell it for nothing.
        """
        progress = self.progress.get(member_id)
        if progress is None:
            return False
        commit_index = self.commit_index if commit_due is None else commit_due
        return (
            progress.may_send_entries(self.log.last_index)
            or progress.may_send_news(self.round, commit_index)
            or progress.snapshot_due
        )

    def append_for(self, member_id: MemberId) -> AppendEntries | EntriesOnDisk | SnapshotDue | None:
        """The next message for this follower, all in one; None: nothing is due."""
        progress = self.progress.get(member_id)
        if progress is None:
            return None
        if progress.may_send_entries(self.log.last_index):
            entries = self.log.entries(progress.next_index, self.config.append_bytes_max)
            if entries is None:
                return EntriesOnDisk(progress.next_index, self.log.stable_index)
            return self._append_message(member_id, progress, entries)
        if progress.may_send_news(self.round, self.commit_index):
            return self._append_message(member_id, progress, ())
        if progress.snapshot_due:
            return SnapshotDue(progress.next_index)
        return None

    def append_with(self, member_id: MemberId, entries: Sequence[Entry]) -> AppendEntries | None:
        """``append_for`` with entries that the driver read from disk.

        None if they are no longer what this follower needs: a new term, or news from it.
        """
        progress = self.progress.get(member_id)
        if progress is None or not entries or entries[0].index != progress.next_index:
            return None
        last = entries[-1]
        may_send = progress.may_send_entries(self.log.last_index)
        if not may_send or not self.log.matches(last.index, last.term):
            return None
        return self._append_message(member_id, progress, tuple(entries))

    def _append_message(
        self, member_id: MemberId, progress: Progress, entries: tuple[Entry, ...]
    ) -> AppendEntries:
        heartbeat = self.round if progress.sent_round < self.round else 0
        progress.sent_round = self.round
        if progress.state is ProgressState.SNAPSHOT:
            # Nothing but a sign of life: where the logs agree, this one can't say.
            return AppendEntries(self.member_id, member_id, self.term, 0, 0, (), 0, heartbeat)
        prev_index = progress.next_index - 1
        size_bytes = sum(map(entry_bytes, entries))
        progress.sent(prev_index, prev_index + len(entries), size_bytes, self.commit_index)
        return AppendEntries(
            sender=self.member_id,
            to=member_id,
            term=self.term,
            prev_index=prev_index,
            prev_term=self.log.term_at(prev_index),
            entries=entries,
            commit_index=self.commit_index,
            round=heartbeat,
        )

    def link_up(self, member_id: MemberId) -> None:
        """A new connection to this member: what was in flight on the old one is lost."""
        self._tell_outsider(member_id)
        progress = self.progress.get(member_id)
        if progress is None:
            return
        progress.sent_round = 0  # repeat the present round: its message may be lost too
        if progress.state is not ProgressState.SNAPSHOT:  # which the driver sends again, or ends
            next_index = progress.match_index + 1 if progress.match_index else progress.next_index
            self._probe_from(progress, next_index)

    # ---- Snapshots (paper section 7) -----------------------------------------------------------

    def compacted_to(self, first_index: int) -> None:
        """The log on disk begins at ``first_index`` now; a durable state has what came before."""
        assert first_index <= self.commit_index + 1
        self.log.compact(first_index)
        self._memberships.compact(first_index)
        for progress in self.progress.values():
            if progress.next_index < first_index and progress.state is not ProgressState.SNAPSHOT:
                progress.need_snapshot()

    def membership_at(self, index: int) -> tuple[int, Membership]:
        """The entry that set it, and the membership at a committed ``index``, for its state."""
        assert self.log.first_index - 1 <= index <= self.commit_index
        return self._memberships.at(index)

    def snapshot_started(self, member_id: MemberId) -> None:
        """A state is on its way to this follower; meanwhile ``append_for`` gives heartbeats."""
        self.progress[member_id].snapshot_due = False

    def snapshot_ended(self, member_id: MemberId, index: int | None) -> None:
        """This follower has installed the state at ``index``; None: the transfer has failed.

        Then the follower is asked anew what it has, which can take a heartbeat.
        """
        progress = self.progress.get(member_id)
        if progress is None:
            return
        if index is not None:
            assert index <= self.commit_index
            progress.matched(index, self.round)
        if progress.state is ProgressState.SNAPSHOT:
            last = self.log.last_index if index is None else progress.match_index
            self._probe_from(progress, last + 1)
        self._tell_outsider(member_id)

    def _on_snapshot_reply(self, message: SnapshotReply) -> None:
        progress = self.progress.get(message.sender)
        if progress is not None:
            progress.heard_ticks = self._now_ticks

    def answer_chunk(
        self, chunk: SnapshotChunk, received_bytes: int, outcome: SnapshotOutcome
    ) -> None:
        """Answer the leader with the next Ready, so that what the answer rests on is durable.

        Not if the chunk is of an older term: then its bytes are not worth keeping either.
        """
        if chunk.term == self.term:
            self._messages.append(
                SnapshotReply(
                    sender=self.member_id,
                    to=chunk.sender,
                    term=self.term,
                    snapshot_id=chunk.snapshot_id,
                    received_bytes=received_bytes,
                    outcome=outcome,
                )
            )

    def restore(self, snapshot: Snapshot) -> None:
        """This server's durable state is another's now, which has reached ``snapshot.index``.

        A log that agrees with it is kept (paper figure 13, step 6), any other is emptied: in
        memory now, on disk with the next Ready. Where as much was committed here meanwhile,
        nothing changes (raft-traps T39).
        """
        index, term, *_ = snapshot
        if index <= self.commit_index:
            return
        if self.log.matches(index, term):
            self._commit_to(index)
            self._memberships.restore(snapshot, index)
        else:
            assert self.role is not Role.LEADER, "a committed entry is missing"
            self.truncated_count += max(0, self.log.last_index - index)
            if self.log.last_index > self.commit_index and self.log.last_term == self._led_term:
                # What it answered for, as a leader, without a majority. The state may have a part.
                uncommitted = self.log.last_index - self.commit_index
                self._notices.append(f"rolled back entries={uncommitted} at most")
            self.log.reset(index, term)
            self._log_base = (index, term)
            self._memberships.truncate_from(index + 1)
            self._memberships.restore(snapshot, self.commit_index)
            self.commit_index = index
        self._use_latest_membership()

    # ---- Proposals -----------------------------------------------------------------------------

    def propose(self, payloads: Sequence[bytes]) -> int:
        """Append commands and return the index of the first.

        Raises NotLeaderError, TransferUnderWayError or TooMuchUncommittedError; then nothing was
        appended.
        """
        if self.role is not Role.LEADER:
            raise NotLeaderError
        if self.transfer_target is not None:
            raise TransferUnderWayError
        if self._uncommitted_bytes >= self.config.uncommitted_bytes_max:
            raise TooMuchUncommittedError
        return self._append(EntryKind.COMMAND, payloads)

    def _append(self, kind: EntryKind, payloads: Sequence[bytes]) -> int:
        first, term = self.log.last_index + 1, self.term
        entries = [Entry(first + i, term, kind, data) for i, data in enumerate(payloads)]
        size_bytes = sum(map(entry_bytes, entries))
        self._uncommitted.append((entries[-1].index, size_bytes))
        self._uncommitted_bytes += size_bytes
        self._append_entries(entries)
        return first

    def _append_entries(self, entries: Sequence[Entry]) -> None:
        self.log.append(entries)
        for entry in entries:
            if entry.kind is EntryKind.MEMBERSHIP:
                self._memberships.append(entry.index, Membership.decode(entry.data))
                self._use_latest_membership()

    # ---- Reads (thesis 6.4) --------------------------------------------------------------------

    def read_index(self, token: Hashable) -> None:
        """Ask for an index at which a read is linearizable; ``take_reads`` gives it later.

        Raises NotLeaderError. A token that waits when the leadership ends is never given.
        """
        if self.role is not Role.LEADER:
            raise NotLeaderError
        self._reads_waiting.append(token)
        self._start_read_round()

    @property
    def committed_in_own_term(self) -> bool:
        """Whether this leader's commit index is known to be the cluster's."""
        return self.role is Role.LEADER and self.commit_index >= self._term_first_index

    def _start_read_round(self) -> None:
        # One round at a time: what arrives meanwhile shares the next one. It begins only now, so
        # its answers prove leadership after each of these reads arrived (raft-traps T47).
        if self._read_round or not self._reads_waiting or not self.committed_in_own_term:
            return
        self._start_round()
        self._read_round = self.round
        self._read_index = self.commit_index
        self._reads_in_round, self._reads_waiting = self._reads_waiting, []
        self._finish_read_round()  # at once where this server alone is the majority

    def _start_round(self) -> None:
        self.round += 1
        self._heartbeat_elapsed_ticks = 0

    @property
    def confirmed_round(self) -> int:
        """The newest round that a majority has answered in this leadership."""
        acked = {member: progress.acked_round for member, progress in self.progress.items()}
        acked[self.member_id] = self.round
        return self.membership.majority_index(acked)

    def _finish_read_round(self) -> None:
        if self._read_round and self.confirmed_round >= self._read_round:
            self._reads_done.append((self._read_index, self._reads_in_round))
            self._read_round = 0
            self._reads_in_round = []
            self._start_read_round()

    def take_reads(self) -> list[tuple[int, list[Hashable]]]:
        """(read index, tokens): each may read once the state machine has applied that index."""
        done, self._reads_done = self._reads_done, []
        return done

    # ---- Membership (thesis 4) -----------------------------------------------------------------

    def add_learner(self, member: Member) -> int:
        """Append a membership with ``member`` as a learner; returns the entry's index.

        It is promoted by itself once it has caught up, unless it is to stay a learner; one that
        is not heard of is dropped. This and the next two raise NotLeaderError or
        MembershipChangeRefusedError; ``Membership`` knows the objections that no time cures.
        """
        assert not member.voter and self.membership.get(member.member_id) is None
        return self._propose_membership(self.membership.with_member(member))

    def change_member(self, member: Member) -> int:
        """Append a membership in which ``member`` has other addresses."""
        old = self.membership.get(member.member_id)
        assert old is not None and old.voter == member.voter
        return self._propose_membership(self.membership.with_member(member))

    def remove_member(self, member_id: MemberId) -> int:
        """Append a membership without this member, which may be this leader itself.

        The log goes on to reach the removed one for a while, to tell it. Its id never comes back.
        """
        assert not self.membership.objection_to_leaving(member_id)
        return self._propose_membership(self.membership.without_member(member_id))

    def _propose_membership(self, membership: Membership) -> int:
        if self.role is not Role.LEADER:
            raise NotLeaderError
        if not self._may_change_membership:
            raise MembershipChangeRefusedError("another change is under way; try again")
        if objection := self._followers.objection_to(membership, self._now_ticks):
            raise MembershipChangeRefusedError(objection)
        return self._append(EntryKind.MEMBERSHIP, [membership.encode()])

    @property
    def membership_is_settled(self) -> bool:
        """Whether the change that made it is committed, so that it can't be taken back."""
        return self._memberships.latest_index <= self.commit_index

    @property
    def _may_change_membership(self) -> bool:
        # One at a time, and none before an entry of the own term is committed: without it two
        # leaders could use majorities that do not meet (thesis 4.1, raft-traps T61).
        may_change = self.committed_in_own_term and self.membership_is_settled
        return may_change and self.transfer_target is None

    @property
    def is_removed(self) -> bool:
        """Whether this server was a member and, by a committed change, is none any more.

        One that never got the entry that added it can't know: its driver asks the others.
        """
        return not self._has_vote and self._memberships.is_removed(self.commit_index)

    @property
    def failures_tolerated(self) -> int:
        """How many more voters may fail; where this server leads, it counts on those that answer."""
        if self.role is Role.LEADER:
            return self._followers.failures_tolerated(self.membership, self._now_ticks)
        return self.membership.failures_tolerated

    @property
    def cluster_room(self) -> Room:
        """What writes may count on: this leader's own disk, and those of a majority."""
        return self._followers.room(self.membership, self.room)

    @property
    def troubles(self) -> list[str]:
        """What is wrong with this leader's followers, for a person."""
        return self._followers.troubles(self.membership)

    def take_notices(self) -> list[str]:
        """What a person should know, since the last call."""
        notices = self._notices[:]
        self._notices.clear()
        return notices

    def _use_latest_membership(self) -> None:
        self.membership = self._memberships.latest
        self._has_vote = self.membership.is_voter(self.member_id)
        if self.role is Role.LEADER:
            self._followers.follow(self.membership, self.log.last_index, self._now_ticks)
            self._finish_read_round()  # those who have not answered may no longer be needed

    def _tell_outsider(self, member_id: MemberId) -> None:
        if self.role is Role.LEADER and self.membership.get(member_id) is None:
            self._followers.tell_outsider(member_id, self.log.last_index, self._now_ticks)

    # ---- To the disk, to the state machine -----------------------------------------------------

    @property
    def has_ready(self) -> bool:
        """Whether ``ready`` would give something."""
        return self._ready_out is None and (
            bool(self._messages)
            or self.log.has_unwritten
            or self._log_base is not None
            or self._saved_hard_state != (self.term, self.voted_for)
        )

    @property
    def is_writing(self) -> bool:
        """Whether a Ready is out and has not come back by ``advance``."""
        return self._ready_out is not None

    def ready(self) -> Ready | None:
        """What to write and then send; the next one comes only after ``advance``."""
        if not self.has_ready:
            return None
        hard_state = HardState(self.term, self.voted_for)
        messages, self._messages = tuple(self._messages), []
        self._ready_out = Ready(
            hard_state=hard_state if hard_state != self._saved_hard_state else None,
            entries=self.log.take_unwritten(),
            messages=messages,
            log_base=self._log_base,
        )
        self._log_base = None
        return self._ready_out

    def advance(self, ready: Ready) -> None:
        """``ready`` is durable (and its messages may be sent)."""
        assert ready is self._ready_out
        self._ready_out = None
        if ready.hard_state is not None:
            self._saved_hard_state = ready.hard_state
            if self.role is Role.CANDIDATE and ready.hard_state == (self.term, self.member_id):
                self._count_vote(self.member_id, True)
        if ready.entries:
            self.log.written(ready.entries[-1])
            if self.role is Role.LEADER:
                self._advance_commit()
                self._go_on_with_transfer()

    def entries_to_apply(self, first: int, bytes_max: int) -> tuple[Entry, ...] | None:
        """Committed entries from ``first`` on; None: read them from disk.

        But no further than ``log.stable_index``: beyond it the disk may still hold an entry that
        was replaced in memory, even if the new one is committed.
        """
        if first > self.commit_index:
            return ()
        entries = self.log.entries(first, bytes_max)
        if entries and entries[-1].index > self.commit_index:
            return entries[: self.commit_index - first + 1]
        return entries

    def applied_to(self, index: int) -> None:
        """The state machine has applied up to ``index``: memory before it may be let go."""
        assert index <= self.commit_index
        self.log.trim(index)

    def check_invariants(self) -> None:
        """What holds between any two calls. Source: paper figure 3, fault-model I5 and I7."""
        log = self.log
        assert log.first_index - 1 <= self.commit_index <= log.last_index
        assert log.stable_index <= log.last_index
        assert log.last_term <= self.term
        assert self._saved_hard_state.term <= self.term
        if self.role is Role.LEADER:
            assert self.leader_id == self.member_id
            assert self.voted_for == self.member_id
            for progress in self.progress.values():
                assert progress.match_index < progress.next_index <= log.last_index + 1
                is_held = progress.next_index >= log.first_index
                assert is_held or progress.state is ProgressState.SNAPSHOT
