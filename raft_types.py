"""The nouns of Raft: entries, hard state, membership, messages, and what the core hands out.

Rule 1: everything here is a value: immutable, comparable, free of I/O.
Rule 2: an index counts from 1; index 0 with term 0 is the empty log before the first entry.
Rule 3: a member is named by its random ``member_id`` (16 hex digits), never by its node's name: a
node that lost its disk comes back as another member (raft-traps T12).

Words are those of Ongaro's thesis (2014). Read on in ``raft_core.py``.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

MemberId = str


def new_id() -> str:
    """A random id of 64 bits, as 16 hex digits, for a member, a cluster or a process."""
    return secrets.token_hex(8)


class EntryKind(IntEnum):
    """What an entry's ``data`` is; the number is the byte on disk and on the wire."""

    COMMAND = 0  # bytes for the state machine
    NOOP = 1  # the first entry of each term (thesis 6.4, step 1)
    MEMBERSHIP = 2  # Membership.encode()


class Entry(NamedTuple):
    """One entry of the replicated log. A tuple, for it is made and read by the hundred thousand."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which no one needs here
    term: int
    kind: EntryKind
    data: bytes


class HardState(NamedTuple):
    """What must be on disk before a message of ``term`` leaves this server (paper, figure 2)."""

    term: int
    voted_for: MemberId | None


class Identity(NamedTuple):
    """Who a data directory belongs to; ``cluster_id`` is empty until a cluster is founded or joined."""

    cluster_id: str
    member_id: MemberId
    node_id: str


# ---- Settings ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RaftConfig:
    """Times in ticks, sizes in bytes."""

    heartbeat_ticks: int
    # A timeout is drawn anew from min..max for each election (paper 5.2).
    election_ticks_min: int
    election_ticks_max: int
    # Once the leader's process is known to be dead, the voters stand one after the other, this long
    # apart. Who does not win waits for the votes, then twice as long as before, and stands again.
    dead_leader_ticks: int = 10
    dead_leader_vote_ticks: int = 50
    append_bytes_max: int = 1024 * 1024
    # Proposals beyond this wait for commits (raft-traps T34).
    uncommitted_bytes_max: int = 128 * 1024 * 1024
    # A learner that is not heard of for so long is dropped, unless it is to stay a learner.
    learner_ticks_max: int = 6000
    # So is one that is heard of, but does not catch up within this.
    catch_up_ticks_max: int = 60_000

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_ticks < self.election_ticks_min <= self.election_ticks_max:
            raise ValueError("needs 0 < heartbeat < election min <= election max, in ticks")


# ---- Membership --------------------------------------------------------------------------------

# Every commit waits for a majority; more than three failures at once are not tolerated by adding
# voters but by keeping copies elsewhere.
VOTERS_MAX = 7


class Member(NamedTuple):
    """A server of the cluster and its advertised addresses."""

    member_id: MemberId
    node_id: str
    host: str
    port: int  # clients
    peer_port: int
    voter: bool  # False: a learner, which holds the data but has no vote (thesis 4.2.1)
    stays_learner: bool = False  # a read copy, which is never given a vote


@dataclass(frozen=True, slots=True)
class Membership:
    """Who belongs to the cluster, and the arithmetic of its majorities."""

    members: tuple[Member, ...] = ()
    # The ids of those who vote; derived once, for it is asked at every reply.
    voters: tuple[MemberId, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        voters = tuple(m.member_id for m in self.members if m.voter)
        object.__setattr__(self, "voters", voters)

    @property
    def quorum(self) -> int:
        """How many voters make a majority."""
        return len(self.voters) // 2 + 1

    @property
    def failures_tolerated(self) -> int:
        """How many voters may be lost with the rest still able to commit."""
        return max(0, len(self.voters) - self.quorum)

    def is_voter(self, member_id: MemberId) -> bool:
        """Whether this member votes."""
        return member_id in self.voters

    def get(self, member_id: MemberId) -> Member | None:
        """The member of this id, or None."""
        return next((m for m in self.members if m.member_id == member_id), None)

    def found_anew(self, former: Membership) -> list[Member]:
        """Those whose peer address is not the one that ``former`` has, if it has one.

        The others may have been found elsewhere since: an address that is no news must not undo it.
        """
        known = {(m.member_id, m.host, m.peer_port) for m in former.members}
        return [m for m in self.members if (m.member_id, m.host, m.peer_port) not in known]

    def has_quorum(self, supporters: Iterable[MemberId]) -> bool:
        """Whether the voters among ``supporters`` are a majority of all voters."""
        return len(set(supporters).intersection(self.voters)) >= self.quorum

    def majority_index(self, match: Mapping[MemberId, int]) -> int:
        """The highest value that a majority of the voters has reached (0 if none).

        Source: paper figure 2, "a majority of matchIndex[i] >= N".
        """
        reached = sorted([match.get(v, 0) for v in self.voters], reverse=True)
        return reached[self.quorum - 1] if reached else 0

    def objection_to(self, newcomer: Member) -> str:
        """Why a member can't be added or have these addresses, for a person; "" if it can."""
        others = [m for m in self.members if m.member_id != newcomer.member_id]
        if sum(not m.stays_learner for m in others) >= VOTERS_MAX and not newcomer.stays_learner:
            return (
                f"a cluster has at most {VOTERS_MAX} voters; a learner that stays one can be added"
            )
        for member in others:
            if member.node_id == newcomer.node_id:
                return (
                    f"the name {newcomer.node_id} is taken by member {member.member_id} at "
                    f"{member.host}:{member.port}; stop that process, or remove it, first"
                )
            if (member.host, member.port) == (newcomer.host, newcomer.port):
                return f"the address {member.host}:{member.port} is taken by {member.node_id}"
        return ""

    def objection_to_leaving(self, member_id: MemberId) -> str:
        """Why this member can't be removed, for a person; "" if it can."""
        if self.get(member_id) is None:
            return f"there is no member {member_id}"
        if self.voters == (member_id,):
            return "it is the only voter: without it there is no cluster"
        return ""

    def without_member(self, member_id: MemberId) -> Membership:
        """This membership without the one of this id."""
        return Membership(tuple(m for m in self.members if m.member_id != member_id))

    def with_member(self, member: Member) -> Membership:
        """This membership with ``member`` added, or put in place of the one with the same id."""
        others = tuple(m for m in self.members if m.member_id != member.member_id)
        return Membership(tuple(sorted((*others, member), key=lambda m: m.node_id)))

    def encode(self) -> bytes:
        """As bytes for a MEMBERSHIP entry."""
        return json.dumps([m._asdict() for m in self.members], sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> Membership:
        """The inverse of ``encode``. Raises ValueError for bytes that are not a membership."""
        try:
            return cls(tuple(Member(**fields) for fields in json.loads(data)))
        except (TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"not a membership: {data[:80]!r}") from error


class Snapshot(NamedTuple):
    """What the core must know of a state: where in the log it stands, and who were members there."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which no one needs here
    term: int  # of the entry at ``index``
    membership: Membership
    membership_index: int  # the entry it came with, at most ``index``


# ---- Messages (paper figures 2 and 13, thesis 6.4 and 9.6) -------------------------------------


@dataclass(frozen=True, slots=True)
class AppendEntries:
    """Leader to follower: entries after ``prev_index``; without entries a heartbeat.

    ``round`` counts the leader's heartbeat rounds; the reply repeats it, which is how the leader
    knows that it still led when a read arrived (thesis 6.4). 0 asks for no answer unless refused.
    """

    sender: MemberId
    to: MemberId
    term: int
    prev_index: int
    prev_term: int
    entries: tuple[Entry, ...]
    commit_index: int
    round: int


class Room(IntEnum):
    """What a server's disk has left for writes; the number is the byte on the wire."""

    PLENTY = 0
    SHORT = 1  # enough for deletions, and for what was accepted
    NONE = 2


@dataclass(frozen=True, slots=True)
class AppendReply:
    """Follower to leader, sent only when what it claims is on the follower's disk.

    ``success``: the follower's log equals the leader's up to ``match_index``.
    Refused: ``prev_index`` repeats the request's; the follower's log may agree at
    ``hint_index``, where its term is ``hint_term`` (paper 5.3, backing up by term).
    ``room`` is not part of Raft: whether the follower's disk will take more.
    """

    sender: MemberId
    to: MemberId
    term: int
    success: bool
    match_index: int
    round: int
    prev_index: int = 0
    hint_index: int = 0
    hint_term: int = 0
    room: Room = Room.PLENTY


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """A candidate asks for a vote; with ``pre_vote`` it only asks whether it would get one (9.6)."""

    sender: MemberId
    to: MemberId
    term: int
    last_index: int
    last_term: int
    pre_vote: bool
    transfer: bool = False  # asked for by the leader itself (thesis 3.10): no one owes it loyalty


@dataclass(frozen=True, slots=True)
class VoteReply:
    """The answer to a VoteRequest of the same ``pre_vote``.

    ``term`` is the request's where a pre-vote is granted, otherwise the voter's own.
    """

    sender: MemberId
    to: MemberId
    term: int
    granted: bool
    pre_vote: bool


@dataclass(frozen=True, slots=True)
class SnapshotChunk:
    """Leader to follower: a piece of a state, from byte ``offset`` on (paper figure 13).

    To Raft it is no more than a sign of life; what the bytes are is the driver's concern.
    """

    sender: MemberId
    to: MemberId
    term: int
    snapshot_id: int  # random for each transfer, so that pieces of two are never mixed
    offset: int
    data: bytes
    is_last: bool


class SnapshotOutcome(IntEnum):
    """What became of a chunk; the number is the byte on the wire."""

    MORE = 0  # go on at ``received_bytes``
    INSTALLED = 1  # the whole state is in place, durably
    REFUSED = 2  # the chunk fits to nothing received before: start anew


@dataclass(frozen=True, slots=True)
class SnapshotReply:
    """Follower to leader: how far the transfer ``snapshot_id`` has come."""

    sender: MemberId
    to: MemberId
    term: int
    snapshot_id: int
    received_bytes: int  # from the beginning, without a gap
    outcome: SnapshotOutcome


@dataclass(frozen=True, slots=True)
class TimeoutNow:
    """Leader to the voter that is to lead: campaign at once (thesis 3.10)."""

    sender: MemberId
    to: MemberId
    term: int


@dataclass(frozen=True, slots=True)
class HashReport:
    """Leader to all: "send me your state hash at ``applied_index``"; and a follower's answer.

    Not part of Raft: the driver compares state machines with it while they run (promise G6).
    """

    sender: MemberId
    to: MemberId
    term: int
    applied_index: int
    state_hash: int
    is_verdict: bool  # from the leader: a majority has this hash there; who differs stops serving


Message = (
    AppendEntries
    | AppendReply
    | VoteRequest
    | VoteReply
    | TimeoutNow
    | SnapshotChunk
    | SnapshotReply
    | HashReport
)


# ---- What the core hands to the driver ---------------------------------------------------------


class Role(StrEnum):
    """What a server is in its current term."""

    FOLLOWER = "FOLLOWER"
    PRE_CANDIDATE = "PRE_CANDIDATE"
    CANDIDATE = "CANDIDATE"
    LEADER = "LEADER"


@dataclass(frozen=True, slots=True)
class Ready:
    """Make ``hard_state`` and ``entries`` durable, *then* send ``messages``, then ``advance``.

    An entry whose index is in the log already replaces it and everything after it. With
    ``log_base`` the log is first emptied, to begin after that (index, term), which the durable
    state has reached.
    """

    hard_state: HardState | None
    entries: tuple[Entry, ...]
    messages: tuple[Message, ...]
    log_base: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class EntriesOnDisk:
    """Instead of an append: read entries from ``first`` on from the disk, then ``append_with``."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class SnapshotDue:
    """Instead of an append: the log begins after what this follower needs, so send it a state.

    Call ``snapshot_started`` at once, or this comes again; ``snapshot_ended`` when it is over.
    """

    needed_index: int


# ---- Entries as bytes (the log's records and the peers' frames hold the same) ------------------

_ENTRY_HEADER = struct.Struct(">QQBI")  # index, term, kind, length of data
_KINDS = tuple(EntryKind)  # by number: calling EntryKind(number) costs three times as much


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """Entries one after another, each a header of 21 bytes and its data."""
    pack = _ENTRY_HEADER.pack
    parts: list[bytes] = []
    for index, term, kind, data in entries:
        parts.append(pack(index, term, kind, len(data)))
        parts.append(data)
    return b"".join(parts)


def decode_entries(buffer: bytes, offset: int = 0) -> list[Entry]:
    """The inverse of ``encode_entries``, from ``offset`` to the end.

    Raises ValueError for bytes that are not whole entries.
    """
    entries: list[Entry] = []
    end = len(buffer)
    unpack = _ENTRY_HEADER.unpack_from
    while offset < end:
        if end - offset < _ENTRY_HEADER.size:
            raise ValueError("an entry's header is cut short")
        index, term, kind, length = unpack(buffer, offset)
        offset += _ENTRY_HEADER.size
        if end - offset < length:
            raise ValueError(f"entry {index} is cut short")
        if kind >= len(_KINDS):
            raise ValueError(f"entry {index} is of the unknown kind {kind}")
        entries.append(Entry(index, term, _KINDS[kind], bytes(buffer[offset : offset + length])))
        offset += length
    return entries


ENTRY_OVERHEAD_BYTES = _ENTRY_HEADER.size
