"""Servers for the tests of Raft's core: what makes one, what its disk holds, how a message reads.

Rule: no thread, socket or clock, and no choice that is left to chance: who wants chance passes it.

Used by ``test_raft_core.py`` and ``test_raft_scenarios.py``, and by the simulated cluster of ``sim_cluster.py``.
"""

from __future__ import annotations

import ast
import random
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, cast

from kv_commands import decode_payload
from kv_store import Flush, KeyRow, KeyValueStore, SessionRow, Slice, Table
from raft_core import RaftCore
from raft_log import WINDOW_BYTES_MAX, RaftLog, entry_bytes
from raft_snapshots import fit_log
from raft_types import (
    AppendEntries,
    AppendReply,
    EntriesOnDisk,
    Entry,
    EntryKind,
    HardState,
    HashReport,
    Member,
    MemberId,
    Membership,
    Message,
    RaftConfig,
    Role,
    Snapshot,
    SnapshotChunk,
    SnapshotDue,
    SnapshotOutcome,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from replication_log import ReplicationLog

CONFIG = RaftConfig(heartbeat_ticks=3, election_ticks_min=10, election_ticks_max=20)


def member(name: str, *, voter: bool = True, stays_learner: bool = False) -> Member:
    """The member of this name, which is its id too."""
    return Member(name, name, "127.0.0.1", 7000, 8000, voter, stays_learner)


def membership(voters: Iterable[str], learners: Iterable[str] = ()) -> Membership:
    """Members by their one-letter names."""
    return Membership(
        (*(member(v) for v in voters), *(member(name, voter=False) for name in learners))
    )


def log_of(*terms: int) -> list[Entry]:
    """Entries 1, 2, 3.. of these terms."""
    return [Entry(i, term, EntryKind.COMMAND, b"%d" % i) for i, term in enumerate(terms, 1)]


def runs_of(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """(first index, term) of each run of equal terms."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if not runs or runs[-1][1] != entry.term:
            runs.append((entry.index, entry.term))
    return runs


# ---- The disk, and states on their way from one to another --------------------------------------


Rows = Mapping[bytes | int, KeyRow | SessionRow]


class StoredRows(NamedTuple):
    """A store's rows as flushes have left them on a disk, and what is compared when they are loaded."""

    last_stamp_ms: int = 0
    state_hash: int = 0
    keys: Rows = MappingProxyType({})
    sessions: Rows = MappingProxyType({})

    def with_slices(self, flush: Flush, slices: Iterable[Slice]) -> StoredRows:
        """These rows after that flush."""
        keys, sessions = dict(self.keys), dict(self.sessions)
        for part in slices:
            table = keys if part.table is Table.KEY else sessions
            if part.clear:
                table.clear()
            table.update((row[0], row) for row in part.rows)
            for key in part.gone:
                table.pop(key, None)
        return StoredRows(flush.last_stamp_ms, flush.state_hash, keys, sessions)

    def load(self, applied_index: int) -> KeyValueStore:
        """The store that these rows are of."""
        rows = self.keys.values(), self.sessions.values()
        return KeyValueStore.load(applied_index, self.last_stamp_ms, *rows)  # type: ignore[arg-type]

    def encode(self) -> bytes:
        """As the bytes that travel."""
        keys, sessions = [*self.keys.values()], [*self.sessions.values()]
        return repr((self.last_stamp_ms, self.state_hash, keys, sessions)).encode()

    @classmethod
    def decode(cls, data: bytes) -> StoredRows:
        """The inverse of ``encode``."""
        last_stamp_ms, state_hash, keys, sessions = ast.literal_eval(data.decode())
        by_key, by_id = {row[0]: row for row in keys}, {row[0]: row for row in sessions}
        return cls(last_stamp_ms, state_hash, by_key, by_id)


# CRC32 of what follows, three numbers, and the length of the membership.
_STATE_HEADER = struct.Struct(">IQQQI")


class SimState(NamedTuple):
    """A state: what it says of the log, a store's rows, and for the checks what has led to it."""

    snapshot: Snapshot
    entries: tuple[Entry, ...]  # all from the first on, so that none is lost or invented unseen
    rows: StoredRows = StoredRows()

    def encode(self) -> bytes:
        """As the bytes that travel; the entries do not."""
        index, term, membership, membership_index = self.snapshot
        members = membership.encode()
        head = _STATE_HEADER.pack(0, index, term, membership_index, len(members))[4:]
        body = head + members + self.rows.encode()
        return struct.pack(">I", zlib.crc32(body)) + body

    @classmethod
    def decode(cls, data: bytes, entries: tuple[Entry, ...]) -> SimState:
        """The inverse of ``encode``. Raises ValueError for bytes that are not a whole state."""
        crc, index, term, membership_index, length = _STATE_HEADER.unpack_from(data)
        if zlib.crc32(data[4:]) != crc:
            raise ValueError("not a whole state")
        end = _STATE_HEADER.size + length
        members = Membership.decode(data[_STATE_HEADER.size : end])
        snapshot = Snapshot(index, term, members, membership_index)
        return cls(snapshot, entries, StoredRows.decode(data[end:]))


class SimDisk:
    """What a server finds again after a crash: what was synced, and nothing else."""

    def __init__(self, founding: Membership) -> None:
        self.hard_state = HardState(0, None)
        # The log: entries after the base, which is (index, term).
        self.base = (0, 0)
        self.entries: list[Entry] = []
        # The founding membership stands as if before the first entry; it has no members for a
        # server that joins later.
        self.state = SimState(Snapshot(0, 0, founding, 0), ())

    # ---- What the driver does ----

    def write(
        self,
        hard_state: HardState | None,
        entries: Sequence[Entry],
        log_base: tuple[int, int] | None = None,
    ) -> None:
        """A Ready, synced."""
        if log_base is not None:
            # First, for the log can't begin in a term that it has not heard of.
            self.append(hard_state, ())
            self.reset(*log_base)
            hard_state = None
        self.append(hard_state, entries)

    def append(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        """An entry replaces the one of its index and everything after it."""
        if hard_state is not None:
            term, voted_for = self.hard_state
            assert hard_state.term >= term
            is_second = hard_state.term == term and voted_for not in (None, hard_state.voted_for)
            assert not is_second, f"a second vote in term {term}"
            self.hard_state = hard_state
        for entry in entries:
            place = entry.index - self.base[0] - 1
            assert 0 <= place <= len(self.entries), "a gap in the log"
            assert self.term_at(entry.index - 1) <= entry.term <= self.hard_state.term
            del self.entries[place:]
            self.entries.append(entry)

    def read(self, first: int, last: int, bytes_max: int) -> list[Entry]:
        """Entries ``first..last``, at least one, then up to ``bytes_max``; none if dropped."""
        base = self.base[0]
        found: list[Entry] = []
        total = 0
        for entry in self.entries[first - base - 1 : last - base] if first > base else ():
            total += entry_bytes(entry)
            if found and total > bytes_max:
                break
            found.append(entry)
        return found

    def save(self, state: SimState) -> None:
        """The state in place of the last one, wherever it came from."""
        assert state.snapshot.index >= self.state.snapshot.index, "a state that goes back"
        self.state = state

    def drop_before(self, first: int) -> None:
        """Shorten the log at its front."""
        assert first <= self.state.snapshot.index + 1, "T37: the log goes before the state has it"
        if first > self.base[0] + 1:
            last = self.entries[first - self.base[0] - 2]
            del self.entries[: first - self.base[0] - 1]
            self.base = (last.index, last.term)

    def reset(self, index: int, term: int) -> None:
        """Empty the log; it begins after that entry."""
        assert index <= self.state.snapshot.index, "T37: the log goes before the state has it"
        assert term <= self.hard_state.term, "a log of a term that nobody has heard of"
        self.base, self.entries = (index, term), []

    def start(
        self,
        member_id: MemberId,
        config: RaftConfig,
        rng: random.Random,
        *,
        tail_count: int | None = None,
        window_bytes_max: int = WINDOW_BYTES_MAX,
    ) -> RaftCore:
        """A server that starts from this disk, with its newest ``tail_count`` entries in memory."""
        index, _, members, membership_index = self.state.snapshot
        fit_log(cast(ReplicationLog, self), self.state.snapshot)
        count = len(self.entries)
        tail = self.entries[max(0, count - tail_count) if tail_count is not None else 0 :]
        changes = [
            (entry.index, Membership.decode(entry.data))
            for entry in self.entries
            if entry.kind is EntryKind.MEMBERSHIP
        ]
        log = RaftLog(
            self.last_index,
            runs_of(self.entries),
            tail,
            first_index=self.first_index,
            base_term=self.base[1],
            window_bytes_max=window_bytes_max,
        )
        memberships = [(membership_index, members), *(c for c in changes if c[0] > index)]
        return RaftCore(
            member_id, config, log, self.hard_state, memberships, rng, commit_index=index
        )

    # ---- As fit_log sees it ----

    @property
    def first_index(self) -> int:
        """Of the entries."""
        return self.base[0] + 1

    @property
    def last_index(self) -> int:
        """Of the entries; that of the base if there are none."""
        return self.base[0] + len(self.entries)

    def term_at(self, index: int) -> int:
        """Of an entry, or of the base."""
        return (
            self.base[1] if index == self.base[0] else self.entries[index - self.base[0] - 1].term
        )

    # ---- What a test wants to know ----

    def _log_holds_state(self) -> bool:
        index, term, *_ = self.state.snapshot
        assert self.base[0] <= index, "a hole between state and log"
        if index == self.base[0]:
            return term == self.base[1]
        place = index - self.base[0] - 1
        return place < len(self.entries) and self.entries[place].term == term

    def found_at(self, index: int) -> Entry | None:
        """The entry of this index that a restart would find, in the state or in the log."""
        if index > self.base[0] and self._log_holds_state():
            place = index - self.base[0] - 1
            return self.entries[place] if place < len(self.entries) else None
        return self.state.entries[index - 1] if 0 < index <= len(self.state.entries) else None

    def found_last_index(self) -> int:
        """The index of the last of them."""
        if not self._log_holds_state():
            return len(self.state.entries)
        return self.last_index

    def found(self) -> list[Entry]:
        """Every entry from the first on that a restart would find, in the state or in the log."""
        if not self._log_holds_state():
            return list(self.state.entries)
        return [*self.state.entries[: self.base[0]], *self.entries]


class Sending:
    """A state on its way to one follower, as its leader's driver sees it."""

    def __init__(self, snapshot_id: int, term: int, state: SimState, chunk_bytes: int) -> None:
        self.snapshot_id = snapshot_id
        self.term = term
        self.index = state.snapshot.index
        self.offset = 0
        self._data = state.encode()
        self._chunk_bytes = chunk_bytes

    def chunk(self, sender: MemberId, to: MemberId) -> SnapshotChunk:
        """The piece that the follower lacks next."""
        end = self.offset + self._chunk_bytes
        data = self._data[self.offset : end]
        is_last = end >= len(self._data)
        return SnapshotChunk(sender, to, self.term, self.snapshot_id, self.offset, data, is_last)


class Receiving:
    """A state on its way to this server, as its driver sees it."""

    def __init__(self) -> None:
        self._snapshot_id = 0
        self._data = b""

    def take(
        self, chunk: SnapshotChunk, entries: tuple[Entry, ...]
    ) -> tuple[int, SnapshotOutcome] | SimState:
        """What to answer, or the state once it is complete; ``entries`` have led to it."""
        if chunk.offset == 0 and chunk.snapshot_id != self._snapshot_id:
            self._snapshot_id, self._data = chunk.snapshot_id, b""
        if chunk.snapshot_id != self._snapshot_id:
            return 0, SnapshotOutcome.REFUSED
        if chunk.offset == len(self._data):
            self._data += chunk.data
            if chunk.is_last:
                data, self._data, self._snapshot_id = self._data, b"", 0
                return SimState.decode(data, entries)
        return len(self._data), SnapshotOutcome.MORE


# ---- Servers -----------------------------------------------------------------------------------


def server(
    name: str = "a",
    voters: str = "abc",
    *,
    learners: str = "",
    log: Sequence[Entry] = (),
    term: int | None = None,
    voted_for: str | None = None,
    config: RaftConfig = CONFIG,
    seed: int = 1,
) -> RaftCore:
    """A server that has just started; its term is that of its last entry unless given."""
    disk = SimDisk(membership(voters, learners))
    last_term = log[-1].term if log else 0
    disk.write(HardState(last_term if term is None else term, voted_for), log)
    return disk.start(name, config, random.Random(seed))


def flush(core: RaftCore) -> list[Message]:
    """Make everything durable at once, and return what may then be sent."""
    sent: list[Message] = []
    while (ready := core.ready()) is not None:
        sent += ready.messages
        core.advance(ready)
    return sent


def replies(core: RaftCore, message: Message) -> list[Message]:
    """What the server sends on this message."""
    core.step(message)
    return flush(core)


def answer(core: RaftCore, message: AppendEntries) -> AppendReply:
    """The server's one answer to an append."""
    (reply,) = replies(core, message)
    assert isinstance(reply, AppendReply)
    return reply


def append(
    term: int,
    *entries: Entry,
    after: tuple[int, int] = (0, 0),
    commit: int = 0,
    heartbeat: int = 0,
    sender: str = "b",
) -> AppendEntries:
    """What leader b sends to a."""
    return AppendEntries(sender, "a", term, *after, entries, commit, heartbeat)


def appends(core: RaftCore, to: MemberId) -> list[AppendEntries]:
    """All that is to be sent to this follower now."""
    found: list[AppendEntries] = []
    while (message := core.append_for(to)) is not None:
        assert not isinstance(message, EntriesOnDisk | SnapshotDue)
        found.append(message)
    return found


def time_out(core: RaftCore) -> list[Message]:
    """Tick until the election timeout has passed; what the server then sends."""
    for _ in range(core.config.election_ticks_max):
        core.tick()
        if core.role is not Role.FOLLOWER:
            break
    return flush(core)


def elect(core: RaftCore) -> RaftCore:
    """Make the server the leader of its next term, with the votes of all the others."""
    others = [voter for voter in core.membership.voters if voter != core.member_id]
    time_out(core)
    for pre_vote in (True, False):
        for other in others:
            if core.role is (Role.PRE_CANDIDATE if pre_vote else Role.CANDIDATE):
                term = core.term + 1 if pre_vote else core.term
                core.step(VoteReply(other, core.member_id, term, True, pre_vote))
        flush(core)
    assert core.role is Role.LEADER
    return core


def acknowledge(core: RaftCore, *followers: str, index: int | None = None) -> None:
    """Let followers answer that they hold the log (up to ``index``) and saw the present round."""
    for follower in followers:
        match_index = core.log.last_index if index is None else index
        core.step(AppendReply(follower, core.member_id, core.term, True, match_index, core.round))


def lead(core: RaftCore | None = None) -> RaftCore:
    """A leader whose no-op is committed and known by all; server a of a, b, c unless given."""
    core = elect(core or server())
    others = [m.member_id for m in core.membership.members if m.member_id != core.member_id]
    for other in others:
        appends(core, other)
    acknowledge(core, *others)
    for other in others:
        appends(core, other)
    assert core.commit_index == core.log.last_index
    return core


def terms(core: RaftCore) -> list[int]:
    """The terms of the entries in the log."""
    return [core.log.term_at(i) for i in range(core.log.first_index, core.log.last_index + 1)]


def describe_command(data: bytes) -> str:
    """The words of a payload, under its serial if it has one; other bytes as they are."""
    try:
        _, argv, once = decode_payload(data)
    except ValueError:
        return data.decode(errors="replace")
    words = "_".join(word.decode(errors="replace") for word in argv)
    return f"{words}@{once[0]}#{once[1]}" if once else words


def describe_entry(entry: Entry) -> str:
    """An entry as index.term and what it carries."""
    if entry.kind is EntryKind.COMMAND:
        carried = describe_command(entry.data)
    elif entry.kind is EntryKind.NOOP:
        carried = "no-op"
    else:
        members = Membership.decode(entry.data).members
        carried = "+".join(m.node_id if m.voter else f"({m.node_id})" for m in members)
    return f"{entry.index}.{entry.term}={carried}"


def describe(message: Message) -> str:
    """A message as one line of a trace."""
    head = f"{message.sender}->{message.to} term {message.term}"
    match message:
        case AppendEntries():
            entries = " ".join(map(describe_entry, message.entries)) or "nothing"
            place = f"after {message.prev_index}.{message.prev_term}"
            commit = f"commit {message.commit_index}"
            heartbeat = f", round {message.round}" if message.round else ""
            return f"{head}: append {entries} {place}, {commit}{heartbeat}"
        case AppendReply(success=True):
            heartbeat = f", round {message.round}" if message.round else ""
            return f"{head}: holds up to {message.match_index}{heartbeat}"
        case AppendReply():
            hint = f"{message.hint_index}.{message.hint_term}"
            return f"{head}: refuses after {message.prev_index}, may agree at {hint}"
        case VoteRequest():
            asks = "asks if it would get a vote" if message.pre_vote else "asks for a vote"
            return f"{head}: {asks}, log ends {message.last_index}.{message.last_term}"
        case VoteReply():
            answer = "yes" if message.granted else "no"
            return f"{head}: {'would vote' if message.pre_vote else 'votes'} {answer}"
        case SnapshotChunk():
            place = "last" if message.is_last else "next" if message.offset else "first"
            return f"{head}: the {place} chunk of state {message.snapshot_id}"
        case SnapshotReply(outcome=SnapshotOutcome.MORE):
            what = "more" if message.received_bytes else "the beginning"
            return f"{head}: asks for {what} of state {message.snapshot_id}"
        case SnapshotReply():
            outcome = message.outcome.name.lower()
            return f"{head}: state {message.snapshot_id} is {outcome}"
        case TimeoutNow():
            return f"{head}: campaign now"
        case HashReport():
            return f"{head}: state hash at {message.applied_index}"
