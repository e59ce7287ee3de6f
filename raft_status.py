"""What the driver is told, shows and holds: settings, a node's status, writes and reads under way.

Values and one small class; the one who fills them is ``raft_node.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kv_errors import KVError
from kv_types import Reply
from raft_types import Identity, Member, RaftConfig

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


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """A member as this node sees it; ``match_index`` and ``lag`` only where this node leads."""

    member: Member
    is_primary: bool
    match_index: int | None
    lag: int | None
    link: str  # from this node to it: "up", or why not; "" for this node itself
    snapshot: float | None  # the share of the state that it has, while it is sent; None: it is not


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
