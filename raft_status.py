"""What the driver is told, shows and holds: settings, a node's status, writes and reads under way.

Values, and ``Waiting``: who waits for which of them. Whose they are is ``raft_node.py``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kv_errors import KVError
from kv_types import Reply
from raft_core import RaftCore
from raft_types import Entry, Identity, Member, RaftConfig, Role

TICK_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Times in seconds."""

    heartbeat_interval_s: float
    election_timeout_min_s: float
    election_timeout_max_s: float
    async_replication: bool = False
    lease_reads: bool = False
    log_bytes_max: int = 64 * 1024 * 1024

    def in_ticks(self) -> RaftConfig:
        """The same for the core."""
        return RaftConfig(
            heartbeat_ticks=max(1, round(self.heartbeat_interval_s / TICK_S)),
            election_ticks_min=round(self.election_timeout_min_s / TICK_S),
            election_ticks_max=round(self.election_timeout_max_s / TICK_S),
        )


class NodeRole(StrEnum):
    """What a node is to its users."""

    PRIMARY = "PRIMARY"
    SECONDARY = "SECONDARY"
    CANDIDATE = "CANDIDATE"  # asks for votes: there is no primary that it knows of
    LEARNER = "LEARNER"  # holds the data, or is catching up; has no vote


def node_role(core: RaftCore) -> NodeRole:
    """What this node is now."""
    if core.role is Role.LEADER:
        return NodeRole.PRIMARY
    if core.role is not Role.FOLLOWER:
        return NodeRole.CANDIDATE
    is_voter = core.membership.is_voter(core.member_id)
    return NodeRole.SECONDARY if is_voter else NodeRole.LEARNER


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """A member as this node sees it; ``match_index`` and ``lag`` only where this node leads."""

    member: Member
    is_primary: bool
    match_index: int | None
    lag: int | None
    link: str  # from this node to it: "up", or why not; "" for this node itself
    snapshot: float | None  # the share of the state that it has, while it is sent; None: it is not

    @classmethod
    def of(cls, core: RaftCore, member: Member, link: str, snapshot: float | None) -> MemberStatus:
        """How this node's core sees it."""
        match_index = None
        if core.role is Role.LEADER:
            progress = core.progress.get(member.member_id)
            match_index = progress.match_index if progress else core.log.stable_index
        lag = None if match_index is None else core.log.last_index - match_index
        is_primary = member.member_id == core.leader_id
        return cls(member, is_primary, match_index, lag, link, snapshot)


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A consistent picture of this node."""

    identity: Identity
    role: NodeRole
    term: int
    primary: Member | None
    commit_index: int
    applied_index: int
    first_index: int  # of the log; what was before stands in the state file only
    last_index: int
    state_hash: int
    voters: int
    failures_tolerated: int
    members: tuple[MemberStatus, ...]
    trouble: str  # why this node does not serve (all), for a person; "" if all is well

    @classmethod
    def of(
        cls,
        core: RaftCore,
        identity: Identity,
        *,
        primary: Member | None,
        applied_index: int,
        state_hash: int,
        members: tuple[MemberStatus, ...],
        trouble: str,
    ) -> NodeStatus:
        """What the core tells, and the rest. Caller holds the node's lock."""
        return cls(
            identity=identity,
            role=node_role(core),
            term=core.term,
            primary=primary,
            commit_index=core.commit_index,
            applied_index=applied_index,
            first_index=core.log.first_index,
            last_index=core.log.last_index,
            state_hash=state_hash,
            voters=len(core.membership.voters),
            failures_tolerated=core.failures_tolerated,
            members=members,
            trouble=trouble,
        )


class Pending:
    """One batch of writes, or one read, under way; ``on_done`` is called once, with no lock held.

    Then ``error`` is set, or for writes ``replies``: one each, or none if they were answered
    before they were applied (asynchronous replication, where the reply is known beforehand).
    """

    __slots__ = ("blind", "deadline_s", "error", "first", "last", "on_done", "replies", "term")

    def __init__(
        self,
        first: int,
        last: int,
        term: int,
        deadline_s: float,
        on_done: Callable[[Pending], None],
    ) -> None:
        self.first = first  # log indexes; of a read: 0, and the least index that it must see
        self.last = last
        self.term = term
        self.blind = False
        self.deadline_s = deadline_s
        self.on_done = on_done
        self.replies: list[Reply] = []
        self.error: KVError | None = None

    def finish(self) -> None:
        """Tell whoever waits for it."""
        self.on_done(self)


class Waiting:
    """All writes and reads under way. Who comes out of a method is done, and is to be finished.

    No lock of its own: the node's.
    """

    def __init__(self) -> None:
        self._writes: deque[Pending] = deque()  # by log index
        # All reads, the oldest first: for a read index, or (then also in _reads_at) to reach it.
        self._reads: dict[Pending, None] = {}
        self._reads_at: list[tuple[int, Sequence[Pending]]] = []  # by the index that they wait for

    def add_write(self, pending: Pending) -> None:
        """Its entries are the last of the log."""
        self._writes.append(pending)

    def add_read(self, reader: Pending) -> None:
        """It has no read index yet."""
        self._reads[reader] = None

    def applied(self, entries: Sequence[Entry], replies: Sequence[Reply]) -> list[Pending]:
        """These entries have been applied, with these replies."""
        first, last = entries[0].index, entries[-1].index
        writes = self._writes
        done: list[Pending] = []
        while writes and writes[0].first <= last:
            pending = writes[0]
            # What was proposed in one go may be applied in several: its replies gather.
            begin = pending.first + len(pending.replies) - first
            end = min(pending.last, last) - first + 1
            # Leadership was lost and won again: whose entry stands here? (raft-traps T33)
            assert all(entry.term == pending.term for entry in entries[begin:end])
            pending.replies += replies[begin:end]
            if pending.last > last:
                break
            done.append(writes.popleft())
        while self._reads_at and self._reads_at[0][0] <= last:
            done += self._take_reads(self._reads_at.pop(0)[1])
        return done

    def confirmed(
        self, read_index: int, readers: Sequence[Pending], applied_index: int
    ) -> list[Pending]:
        """A majority has confirmed the leadership since these asked: they may read there."""
        read_index = max(read_index, *(reader.last for reader in readers))
        if read_index <= applied_index:
            return self._take_reads(readers)
        self._reads_at.append((read_index, readers))
        return []

    def _take_reads(self, readers: Sequence[Pending]) -> list[Pending]:
        # Some may have been given up meanwhile, which the core does not know.
        done = [reader for reader in readers if reader in self._reads]
        for reader in done:
            del self._reads[reader]
        return done

    def durable(self, stable_index: int) -> list[Pending]:
        """The log is on this node's disk up to here, which is all that blind writes wait for."""
        done = [p for p in self._writes if p.blind and p.last <= stable_index]
        self._writes = deque(p for p in self._writes if not p.blind or p.last > stable_index)
        return done

    def late(self, now_s: float, write_error: KVError, read_error: KVError) -> list[Pending]:
        """Those whose deadline has passed, given up with these errors."""
        late: list[Pending] = []
        while self._writes and self._writes[0].deadline_s <= now_s:
            late.append(self._writes.popleft())
            late[-1].error = write_error
        while self._reads and (reader := next(iter(self._reads))).deadline_s <= now_s:
            del self._reads[reader]
            late.append(reader)
            reader.error = read_error
        return late

    def fail(
        self, committed_index: int, write_error: KVError, read_error: KVError
    ) -> list[Pending]:
        """All reads, and the writes beyond ``committed_index``, given up with these errors.

        What is committed only has to be applied, whoever leads.
        """
        uncommitted = [pending for pending in self._writes if pending.last > committed_index]
        failed = [*uncommitted, *self._reads]
        for pending in failed:
            pending.error = read_error if pending in self._reads else write_error
        for _ in uncommitted:
            self._writes.pop()
        self._reads.clear()
        self._reads_at.clear()
        return failed


def wait_for(begin: Callable[[Callable[[Pending], None]], None]) -> Pending:
    """Begin something, sleep until it is done, and return it. Raises its error."""
    done: list[Pending] = []
    wakeup = threading.Lock()
    wakeup.acquire()

    def on_done(pending: Pending) -> None:
        done.append(pending)
        wakeup.release()

    begin(on_done)
    wakeup.acquire()
    (pending,) = done
    if pending.error is not None:
        raise pending.error
    return pending


class OwnBugs:
    """Whatever thread it is on, a client's too: an assertion that fails within ends the process."""

    def __init__(self, on_fatal: Callable[[BaseException], None]) -> None:
        self._on_fatal = on_fatal

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, AssertionError):
            self._on_fatal(error)
