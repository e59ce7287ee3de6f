"""Servers for the tests of Raft's core: what makes one, what its disk holds, how a message reads.

Rule: no thread, socket or clock, and no choice that is left to chance: who wants chance passes it.

Used by ``test_raft_core.py`` and ``test_raft_scenarios.py``, and by the simulator ``sim_raft.py``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from raft_core import EntriesOnDisk, RaftConfig, RaftCore
from raft_log import WINDOW_BYTES_MAX, RaftLog, entry_bytes
from raft_types import (
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    HardState,
    HashReport,
    Member,
    MemberId,
    Membership,
    Message,
    Role,
    VoteReply,
    VoteRequest,
)

CONFIG = RaftConfig(heartbeat_ticks=3, election_ticks_min=10, election_ticks_max=20)


def member(name: str, *, voter: bool = True) -> Member:
    """The member of this name, which is its id too."""
    return Member(name, name, "127.0.0.1", 7000, 8000, voter)


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


class SimDisk:
    """What a server finds again after a crash: what was synced, and nothing else."""

    def __init__(self, founding: Membership) -> None:
        self.hard_state = HardState(0, None)
        self.entries: list[Entry] = []
        # As if it stood before the first entry; empty for a server that joins later.
        self.founding = founding

    def write(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        """Synced; an entry replaces the one of its index and everything after it."""
        if hard_state is not None:
            assert hard_state.term >= self.hard_state.term
            self.hard_state = hard_state
        for entry in entries:
            assert entry.index <= len(self.entries) + 1, "a gap in the log"
            del self.entries[entry.index - 1 :]
            self.entries.append(entry)

    def read(self, first: int, last: int, bytes_max: int) -> list[Entry]:
        """Entries ``first..last``, at least one, then up to ``bytes_max``."""
        found: list[Entry] = []
        total = 0
        for entry in self.entries[first - 1 : last]:
            total += entry_bytes(entry)
            if found and total > bytes_max:
                break
            found.append(entry)
        return found

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
        count = len(self.entries)
        tail = self.entries[max(0, count - tail_count) if tail_count is not None else 0 :]
        memberships = [(0, self.founding)] + [
            (entry.index, Membership.decode(entry.data))
            for entry in self.entries
            if entry.kind is EntryKind.MEMBERSHIP
        ]
        log = RaftLog(count, runs_of(self.entries), tail, window_bytes_max=window_bytes_max)
        return RaftCore(member_id, config, log, self.hard_state, memberships, rng)


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
        assert not isinstance(message, EntriesOnDisk)
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
    return [core.log.term_at(i) for i in range(1, core.log.last_index + 1)]


def describe_entry(entry: Entry) -> str:
    """An entry as index.term and what it carries."""
    if entry.kind is EntryKind.COMMAND:
        carried = entry.data.decode(errors="replace")
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
        case HashReport():
            return f"{head}: state hash at {message.applied_index}"
