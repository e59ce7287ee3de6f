"""Stories about Raft that read as prose, each with the trace that it must give.

A scenario in ``scenarios/*.txt`` holds comments (``#``), sentences, and under each sentence,
indented, what happens. The sentences are the patterns of ``Stage`` below. Servers work at once,
their disks too (unless told to stall); messages wait until a sentence delivers or loses them.

After a wanted change ``REGENERATE=1 pytest tests/test_raft_scenarios.py`` writes the traces anew:
read the difference before it is committed.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import raft_progress
from raft_core import NotLeaderError, RaftCore
from raft_types import (
    EntriesOnDisk,
    Entry,
    HardState,
    Membership,
    Message,
    RaftConfig,
    Ready,
    Role,
    Snapshot,
    SnapshotChunk,
    SnapshotDue,
    SnapshotOutcome,
    SnapshotReply,
)
from tests.raft_servers import (
    CONFIG,
    Receiving,
    Sending,
    SimDisk,
    SimState,
    describe,
    describe_entry,
    log_of,
    member,
    membership,
)

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
INDENT = "    "


class Server:
    """A core, its disk, and what of it was told already."""

    def __init__(self, name: str, disk: SimDisk, config: RaftConfig) -> None:
        self.name = name
        self.disk = disk
        self.config = config
        self.stalled = False
        self.start()

    def start(self) -> None:
        """From what the disk holds."""
        rng = random.Random(self.name)
        self.core: RaftCore | None = self.disk.start(self.name, self.config, rng)
        self.writing: Ready | None = None
        self.told_role = (Role.FOLLOWER, self.core.term)
        self.told_removed = False
        self.applied = list(self.disk.state.entries)
        self.sending: dict[str, Sending] = {}
        self.receiving = Receiving()
        self.received: tuple[SnapshotChunk, SimState] | None = None


class Stage:
    """The servers of one scenario, the messages between them, and the trace."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}
        self.waiting: list[Message] = []
        self.cuts: set[frozenset[str]] = set()
        self.trace: list[str] = []
        self.transfers = 0
        self.sent_entries: dict[int, tuple[Entry, ...]] = {}
        self.silent = False  # events are told, messages are not
        self.sentences: list[tuple[str, Callable[..., None]]] = [
            (r"servers ([\w ]+)(, one entry a message)?(, little patience)?", self.found),
            (r"(\w) in term (\d+) holds entries of terms ([\d ]+)", self.hold_entries),
            (r"(\w) is elected", self.elect),
            (r"(\w) times out", self.time_out),
            (r"(\w) sends heartbeats", self.send_heartbeats),
            (r"(\d+) ticks pass", self.pass_ticks),
            (r"deliver all", self.deliver_all),
            (r"deliver (\w) to (\w)", self.deliver_link),
            (r"lose (\w) to (\w)", self.lose_link),
            (r"repeat (\w) to (\w)", self.repeat_link),
            (r"cut (\w) from ([\w ]+)", self.cut),
            (r"heal", self.heal),
            (r"client writes (\w+) at (\w)", self.write),
            (r"client reads (\w+) at (\w)", self.read),
            (r"(\w) joins at (\w)( by a wrong address)?", self.join),
            (r"(\w) is removed at (\w)", self.remove),
            (r"(\w) crashes", self.crash),
            (r"(\w) crashes with the state in place", self.crash_in_install),
            (r"(\w) restarts", self.restart),
            (r"(\w) saves its state", self.save),
            (r"(\w) drops its log before (\d+)", self.drop),
            (r"(\w) repeats its chunk to (\w)", self.repeat_chunk),
            (r"(\w)'s disk stalls", self.stall),
            (r"(\w)'s disk works", self.resume),
            (r"(\w) hears that (\w) died", self.hear_of_death),
            (r"show", self.show),
        ]

    def play(self, sentence: str) -> list[str]:
        """Do what the sentence says; what happened."""
        self.trace = []
        for pattern, action in self.sentences:
            if match := re.fullmatch(pattern, sentence):
                action(*match.groups())
                return self.trace
        raise ValueError(f"no sentence of the scenario language: {sentence!r}")

    # ---- What servers do by themselves ----

    def _core(self, name: str) -> RaftCore:
        core = self.servers[name].core
        assert core is not None, f"{name} is down"
        return core

    def _work(self, server: Server) -> None:
        """Write, send, and tell what is new."""
        core = server.core
        assert core is not None
        while not server.stalled and (ready := server.writing or core.ready()) is not None:
            server.disk.write(ready.hard_state, ready.entries, ready.log_base)
            self.waiting += ready.messages
            server.writing = None
            core.advance(ready)
        if server.stalled and server.writing is None:
            server.writing = core.ready()
        for peer in core.progress:
            while (append := core.append_for(peer)) is not None:
                assert not isinstance(append, EntriesOnDisk)
                if isinstance(append, SnapshotDue):
                    self._start_sending(server, core, peer)
                else:
                    self.waiting.append(append)
        self._tell_news(server, core)
        core.check_invariants()

    def _tell_news(self, server: Server, core: RaftCore) -> None:
        if server.told_role != (core.role, core.term):
            server.told_role = (core.role, core.term)
            self.trace.append(f"{server.name} is {core.role} of term {core.term}")
        if core.commit_index > len(server.applied):
            entries: list[Entry] = list(
                core.entries_to_apply(len(server.applied) + 1, 1 << 20) or ()
            )
            server.applied += entries
            self.trace.append(f"{server.name} commits {' '.join(map(describe_entry, entries))}")
        if core.is_removed and not server.told_removed:
            server.told_removed = True
            self.trace.append(f"{server.name} knows that it was removed")
        self.trace += [f"{server.name} says: {notice}" for notice in core.take_notices()]
        for index, tokens in core.take_reads():
            self.trace += [f"{server.name} may read {token} at {index}" for token in tokens]

    def _deliver(self, message: Message) -> None:
        server = self.servers.get(message.to)
        is_down = server is None or server.core is None
        lost = is_down or frozenset((message.sender, message.to)) in self.cuts
        if not self.silent:
            self.trace.append(f"{'lost: ' if lost else ''}{describe(message)}")
        if not lost and server is not None and server.core is not None:
            server.core.step(message)
            if isinstance(message, SnapshotChunk):
                self._take_chunk(server, server.core, message)
            elif isinstance(message, SnapshotReply):
                self._take_snapshot_reply(server, server.core, message)
            self._work(server)

    def _start_sending(self, server: Server, core: RaftCore, peer: str) -> None:
        """The whole state in two chunks."""
        core.snapshot_started(peer)
        self.transfers += 1
        self.sent_entries[self.transfers] = server.disk.state.entries
        half = len(server.disk.state.encode()) // 2 + 1
        server.sending[peer] = Sending(self.transfers, core.term, server.disk.state, half)
        self.waiting.append(server.sending[peer].chunk(server.name, peer))

    def _take_snapshot_reply(self, server: Server, core: RaftCore, reply: SnapshotReply) -> None:
        sending = server.sending.get(reply.sender)
        if sending is None or sending.snapshot_id != reply.snapshot_id or reply.term != core.term:
            return
        if reply.outcome is SnapshotOutcome.MORE:
            sending.offset = reply.received_bytes
            self.waiting.append(sending.chunk(server.name, reply.sender))
        else:
            installed = reply.outcome is SnapshotOutcome.INSTALLED
            core.snapshot_ended(reply.sender, sending.index if installed else None)
            del server.sending[reply.sender]

    def _take_chunk(self, server: Server, core: RaftCore, chunk: SnapshotChunk) -> None:
        if chunk.term != core.term:
            return
        entries = self.sent_entries[chunk.snapshot_id]
        result = server.receiving.take(chunk, entries)
        if isinstance(result, SimState):
            server.received = (chunk, result)
            self._install(server, core)
        else:
            core.answer_chunk(chunk, *result)

    def _install(self, server: Server, core: RaftCore) -> None:
        if server.received is None or server.stalled:
            return
        chunk, state = server.received
        server.received = None
        if state.snapshot.index > core.commit_index:
            server.disk.save(state)
            core.restore(state.snapshot)
            server.applied = list(state.entries)
            self.trace.append(f"{server.name} restores the state at {state.snapshot.index}")
        core.answer_chunk(chunk, 0, SnapshotOutcome.INSTALLED)

    def _take(self, sender: str, to: str) -> list[Message]:
        taken = [m for m in self.waiting if (m.sender, m.to) == (sender, to)]
        self.waiting = [m for m in self.waiting if (m.sender, m.to) != (sender, to)]
        return taken

    # ---- Sentences: servers ----

    def found(self, names: str, small: str | None, impatient: str | None) -> None:
        """A cluster of these voters, nothing written yet."""
        config = replace(CONFIG, append_bytes_max=1) if small else CONFIG
        config = replace(config, learner_ticks_max=30) if impatient else config
        for name in names.split():
            self.servers[name] = Server(name, SimDisk(membership(names.split())), config)

    def hold_entries(self, name: str, term: str, terms: str) -> None:
        """The server starts again with this log."""
        server = self.servers[name]
        server.disk.write(HardState(int(term), None), log_of(*map(int, terms.split())))
        server.start()

    def elect(self, name: str) -> None:
        """It times out first, and all messages arrive."""
        self.silent = True
        self.time_out(name)
        self.deliver_all()
        self.silent = False
        self.trace = [line for line in self.trace if "LEADER" in line or "commits" in line]

    def time_out(self, name: str) -> None:
        """Time passes for this server alone, until it campaigns."""
        core, server = self._core(name), self.servers[name]
        core.tick()
        while core.role is Role.FOLLOWER or not core.has_ready:
            core.tick()
        self._work(server)

    def send_heartbeats(self, name: str) -> None:
        """Time passes for this leader alone, until a round begins."""
        core = self._core(name)
        begun = core.round
        while core.round == begun and core.role is Role.LEADER:
            core.tick()
        self._work(self.servers[name])

    def pass_ticks(self, ticks: str) -> None:
        """Time passes for all, and messages travel within a tick."""
        self.silent = True
        for _ in range(int(ticks)):
            for server in self.servers.values():
                if server.core is not None:
                    server.core.tick()
                    self._work(server)
            self.deliver_all()
        self.silent = False

    def crash(self, name: str) -> None:
        """What was not synced is lost, and what it had sent and no one received."""
        self.servers[name].core = None
        self.waiting = [m for m in self.waiting if m.sender != name]

    def crash_in_install(self, name: str) -> None:
        """The state it has received takes the place of its own, and nothing else happens."""
        server = self.servers[name]
        assert server.received is not None
        server.disk.save(server.received[1])
        self.crash(name)

    def restart(self, name: str) -> None:
        """The server comes back with what its disk holds."""
        server = self.servers[name]
        server.start()
        for other in self.servers.values():
            if other.core is not None:
                other.core.link_up(name)
                self._work(other)

    def stall(self, name: str) -> None:
        """The disk syncs nothing for a while."""
        self.servers[name].stalled = True

    def resume(self, name: str) -> None:
        """The disk goes on."""
        server = self.servers[name]
        server.stalled = False
        self._install(server, self._core(name))
        self._work(server)

    def save(self, name: str) -> None:
        """What is applied goes to the disk."""
        server, core = self.servers[name], self._core(name)
        index = len(server.applied)
        membership_index, members = core.membership_at(index)
        snapshot = Snapshot(index, core.log.term_at(index), members, membership_index)
        server.disk.save(SimState(snapshot, tuple(server.applied)))

    def drop(self, name: str, first: str) -> None:
        """The log becomes shorter at its front."""
        self.servers[name].disk.drop_before(int(first))
        self._core(name).compacted_to(int(first))
        self._work(self.servers[name])

    def repeat_chunk(self, name: str, to: str) -> None:
        """The leader has waited for an answer in vain."""
        self.waiting.append(self.servers[name].sending[to].chunk(name, to))

    def hear_of_death(self, name: str, dead: str) -> None:
        """The server is told that the other's process is gone."""
        self._core(name).leader_died(dead)
        self._work(self.servers[name])

    def join(self, name: str, leader: str, wrong: str | None) -> None:
        """A fresh server is added as a learner; or none is where it was said to be."""
        if not wrong:
            self.servers[name] = Server(name, SimDisk(Membership()), CONFIG)
        self._core(leader).add_learner(member(name, voter=False))
        self._work(self.servers[leader])

    def remove(self, name: str, leader: str) -> None:
        """A member is to belong to the cluster no more."""
        self._core(leader).remove_member(name)
        self._work(self.servers[leader])

    # ---- Sentences: messages ----

    def deliver_all(self) -> None:
        """In the order they were sent, until no message waits."""
        while self.waiting:
            self._deliver(self.waiting.pop(0))

    def deliver_link(self, sender: str, to: str) -> None:
        """What waits on this link now, and nothing that follows from it."""
        for message in self._take(sender, to):
            self._deliver(message)

    def lose_link(self, sender: str, to: str) -> None:
        """What waits on this link is lost."""
        self.trace += [f"lost: {describe(message)}" for message in self._take(sender, to)]

    def repeat_link(self, sender: str, to: str) -> None:
        """What waits on this link will come twice, the second time after all the first."""
        taken = self._take(sender, to)
        self.waiting += taken + taken

    def cut(self, name: str, others: str) -> None:
        """No message gets through between them."""
        self.cuts |= {frozenset((name, other)) for other in others.split()}

    def heal(self) -> None:
        """All links work."""
        self.cuts.clear()

    # ---- Sentences: clients ----

    def write(self, command: str, name: str) -> None:
        """A client proposes a command."""
        try:
            self._core(name).propose([command.encode()])
        except NotLeaderError:
            self.trace.append(f"{name} does not lead")
        self._work(self.servers[name])

    def read(self, token: str, name: str) -> None:
        """A client asks for a linearizable read."""
        try:
            self._core(name).read_index(token)
        except NotLeaderError:
            self.trace.append(f"{name} does not lead")
        self._work(self.servers[name])

    def show(self) -> None:
        """Every server: its role, its log as index.term, its commit index."""
        for name, server in self.servers.items():
            core = server.core
            if core is None:
                self.trace.append(f"{name}: down")
                continue
            first, last = core.log.first_index, core.log.last_index
            log = " ".join(f"{i}.{core.log.term_at(i)}" for i in range(first, last + 1))
            follows = (
                f", follows {core.leader_id or 'no one'}" if core.role is Role.FOLLOWER else ""
            )
            self.trace.append(
                f"{name}: {core.role} of term {core.term}{follows}, "
                f"log {log or 'empty'}, commit {core.commit_index}"
            )


def perform(text: str) -> str:
    """The scenario with the trace that it gives today."""
    stage = Stage()
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith(INDENT):
            continue
        lines.append(line)
        if line and not line.startswith("#"):
            lines += [INDENT + happened for happened in stage.play(line)]
    return "\n".join(lines) + "\n"


@pytest.fixture(autouse=True)
def window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of several appends, whatever the measured value is today."""
    monkeypatch.setattr(raft_progress, "INFLIGHT_MESSAGES_MAX", 4)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario_gives_its_trace(path: Path) -> None:
    """What is written under each sentence is what happens, in that order, and nothing else."""
    expected = path.read_text()
    happened = perform(expected)
    if os.environ.get("REGENERATE"):
        path.write_text(happened)

    assert happened == expected


def test_scenario_language_refuses_a_sentence_it_does_not_know() -> None:
    """A typing error must not pass for a step."""
    with pytest.raises(ValueError, match="no sentence"):
        perform("servers a b c\na tmes out\n")


def test_scenarios_use_every_sentence() -> None:
    """A sentence that no story needs goes."""
    used = [
        line
        for path in SCENARIOS
        for line in path.read_text().splitlines()
        if line and not line.startswith((INDENT, "#"))
    ]

    unused = [
        pattern
        for pattern, _ in Stage().sentences
        if not any(re.fullmatch(pattern, line) for line in used)
    ]
    assert not unused
