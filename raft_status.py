"""What the driver shows, and what waits in it: a node's status, writes and reads under way.

Values and one small class; the one who fills them is ``raft_node.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from kv_errors import KVError
from kv_types import Reply
from raft_types import Identity, Member


class StateMachine(Protocol):
    """What the driver needs of the store. Called with ``store_lock`` held."""

    @property
    def applied_index(self) -> int:
        """The index of the last entry applied or skipped."""

    @property
    def state_hash(self) -> int:
        """Order-independent, the same on every node that has applied the same index."""

    def apply(self, index: int, data: bytes) -> Reply:
        """The reply to the command at ``index``; deterministic."""

    def skip(self, index: int) -> None:
        """The entry at ``index`` is not for the state machine."""

    def hash_at(self, index: int) -> int | None:
        """The state hash at a recent index; None if it is not known (any more)."""


class NodeRole(StrEnum):
    """What a node is to its users."""

    PRIMARY = "PRIMARY"
    SECONDARY = "SECONDARY"
    CANDIDATE = "CANDIDATE"  # asks for votes: there is no primary that it knows of
    LEARNER = "LEARNER"  # holds the data, or is catching up; has no vote


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """A member as this node sees it; ``match_index`` and ``lag`` only where this node leads."""

    member: Member
    is_primary: bool
    match_index: int | None
    lag: int | None
    link: str  # from this node to it: "up", or why not; "" for this node itself


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A consistent picture of this node."""

    identity: Identity
    role: NodeRole
    term: int
    primary: Member | None
    commit_index: int
    applied_index: int
    last_index: int
    state_hash: int
    voters: int
    failures_tolerated: int
    members: tuple[MemberStatus, ...]
    trouble: str  # why this node does not serve (all), for a person; "" if all is well


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
