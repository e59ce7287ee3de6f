"""A cluster of pure cores in a made-up world: one seed, one history, any fault.

Rule 1: every choice comes from the seed; the same seed gives the same history, to the last byte.
Rule 2: time is a number; what is to happen stands in one queue, ordered by when.
Rule 3: what a disk did not sync is lost in a crash, or kept, or kept in part, as chance will.
Rule 4: after every step of every server the invariants are checked (``sim_invariants.py``).

A run is a storm (crashes, cuts, loss, duplicates, delays, slow disks, uneven clocks, clients, servers
that join and are removed, logs cut short behind states on disk), then calm, in which the cluster
must come to rest, then one follower cut off and returned.

``python -m tests.sim_raft --seed 7`` prints the history of seed 7;
``python -m tests.sim_raft --seed 0 --count 1000`` runs a thousand quietly.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import NamedTuple

from raft_core import (
    EntriesOnDisk,
    MembershipChangeRefusedError,
    NotLeaderError,
    RaftCore,
    SnapshotDue,
    TooMuchUncommittedError,
)
from raft_types import (
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
    Snapshot,
    SnapshotChunk,
    SnapshotOutcome,
    SnapshotReply,
)
from tests.raft_servers import (
    Receiving,
    Sending,
    SimDisk,
    SimState,
    describe,
    member,
    membership,
)
from tests.sim_invariants import Invariants, ViolationError, Watched

STORM_TICKS = 250.0
# After the storm, in the longest election timeouts: until there is a leader, until all is equal.
LEADER_TIMEOUTS = 5
REST_TIMEOUTS = 10
JOINERS = "fghijklm"
CHUNK_RETRY_TICKS = 8
CHUNK_RETRIES_MAX = 5


class Weather(NamedTuple):
    """How bad the world is: chances from 0 to 1, times in ticks."""

    drop: float
    duplicate: float
    quick_ticks: tuple[float, float]  # the usual delay; where it varies, messages overtake
    slow: float  # the chance that a message takes up to slow_ticks
    slow_ticks: float
    sync_ticks: float
    stall: float  # the chance that a sync takes up to ten times as long
    late: float  # the chance that a server's thread does its work only the next time
    fault_ticks: float  # the mean time between faults
    client_ticks: float  # the mean time between requests


CALM = Weather(0, 0, (0.3, 0.3), 0, 0, 0.3, 0, 0, 1e9, 5)


def _storm(rng: random.Random) -> Weather:
    return Weather(
        drop=rng.choice((0, 0.02, 0.1, 0.3)),
        duplicate=rng.choice((0, 0.05, 0.3)),
        quick_ticks=rng.choice(((0.3, 0.3), (0.05, 0.8))),
        slow=rng.choice((0, 0.05, 0.3)),
        slow_ticks=rng.choice((3, 20, 80)),
        sync_ticks=rng.choice((0.1, 0.5, 3)),
        stall=rng.choice((0, 0.1)),
        late=rng.choice((0, 0.3)),
        fault_ticks=rng.choice((5, 10, 25)),
        client_ticks=rng.choice((0.3, 1, 3)),
    )


def _config(rng: random.Random) -> RaftConfig:
    return RaftConfig(
        heartbeat_ticks=3,
        election_ticks_min=10,
        election_ticks_max=20,
        dead_leader_ticks_min=1,
        dead_leader_ticks_max=4,
        append_bytes_max=rng.choice((1, 60, 400)),  # 1: an entry a message
        uncommitted_bytes_max=rng.choice((200, 100_000)),
        learner_ticks_max=rng.choice((40, 6000)),
    )


def _founded(names: str) -> SimDisk:
    """The disk of a founder: the log begins with the first membership."""
    disk = SimDisk(Membership())
    first = Entry(1, 1, EntryKind.MEMBERSHIP, membership(names).encode())
    disk.write(HardState(1, None), [first])
    disk.admitted_index = 1
    return disk


class SimServer(Watched):
    """A server from its start to its crash, with the driver's threads as events."""

    def __init__(self, name: MemberId, core: RaftCore, disk: SimDisk, tick_length: float) -> None:
        super().__init__(name, core, disk)
        self.tick_length = tick_length  # its clock may be fast or slow
        self.up = True
        self.asleep_until = 0.0  # as under SIGSTOP
        self.writing = False  # the log writer has a Ready and has not come back
        self.unsynced: Ready | None = None  # what a crash would take
        self.reading: set[MemberId] = set()  # followers for whom entries are read from the disk
        self.sending: dict[MemberId, Sending] = {}
        self.receiving = Receiving()
        # How far a state received is; until it is in force this server's own must not be saved.
        self.installing = ""


class Simulation:
    """One cluster's history."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.weather = _storm(self.rng)
        self.config = _config(self.rng)
        self.window_bytes_max = self.rng.choice((0, 300, 100_000))
        self.save_ticks = self.rng.choice((4, 15, 60, 1e9))  # the mean time between states saved
        self.tail_entries = self.rng.choice((0, 3, 20))  # kept in the log though the state has them
        self.chunk_bytes = self.rng.choice((200, 1000, 10_000))
        self.names = "abcde"[: self.rng.choice((3, 5))]
        self.disks = {name: _founded(self.names) for name in self.names}
        self.servers: dict[MemberId, SimServer] = {}
        self.joiners = list(JOINERS)  # who may still come
        self.retired: set[MemberId] = set()  # who has heard that it was removed, and has ended
        self.is_shrinking = self.rng.random() < 0.5  # members are removed, too
        self.cuts: set[tuple[MemberId, MemberId]] = set()  # one direction each
        self.invariants = Invariants(self, self.names)
        self.counts: Counter[str] = self.invariants.counts
        self._trace = trace
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = count()
        self._requests = count(1)

    # ---- What the invariants ask ----

    def running(self) -> list[Watched]:
        """The servers that are up."""
        return list(self.servers.values())

    def disk_of(self, member_id: MemberId) -> SimDisk:
        """A server's disk, whether it is up or not."""
        return self.disks[member_id]

    # ---- The course of a history ----

    def run(self) -> Counter[str]:
        """A storm, calm, one follower cut off and returned; what happened, counted."""
        for name in self.names:
            self._start(name)
        self._at(self._pause(self.weather.fault_ticks), self._fault)
        self._at(self._pause(self.weather.client_ticks), self._client)
        if self._chance(0.5):
            self._at(self.rng.uniform(0, STORM_TICKS), self._join_next)
            self._at(self.rng.uniform(0, STORM_TICKS), self._join_next)
        self._run_until(STORM_TICKS)
        self._calm_down()
        self._settle()
        self._cut_off_and_return()
        return self.counts

    def _at(self, delay: float, action: Callable[..., None], *args: object) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), action, args))

    def _run_until(self, end: float) -> None:
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action, args = heapq.heappop(self._queue)
            action(*args)
        self.now = end

    def _pause(self, mean: float) -> float:
        return self.rng.expovariate(1 / mean)

    def _chance(self, chance: float) -> bool:
        return chance > 0 and self.rng.random() < chance

    def _say(self, what: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.now:7.2f} {what}")

    def _calm_down(self) -> None:
        self._say("the storm ends")
        self.weather = CALM
        self.cuts.clear()
        for name in self.disks:
            server = self.servers.get(name)
            if server is not None and not server.core.may_campaign:
                self._crash(server)  # only a restart brings a distrusted state machine back
            self._restart(name)
        for server in list(self.servers.values()):
            self._connect(server, 1)

    def _settle(self) -> None:
        """I15: soon a leader; then every learner has its vote or stays one, all logs are equal and
        applied, and who was removed has heard it."""
        self._wait(LEADER_TIMEOUTS, lambda: bool(self._leaders()), "no leader")
        self._wait(REST_TIMEOUTS, self._is_at_rest, "not at rest")

    def _wait(self, timeouts: int, reached: Callable[[], bool], otherwise: str) -> None:
        # Where each entry is a message of its own, and one at a time, catching up takes longer.
        longest = max(len(server.log) for server in self.servers.values())
        limit = self.now + timeouts * self.config.election_ticks_max + 2 * longest
        while not reached():
            roles = {name: server.core.role.value for name, server in self.servers.items()}
            self.invariants.require(self.now < limit, f"I15: {otherwise} by {limit}: {roles}")
            self._run_until(self.now + 1)

    def _leaders(self) -> list[SimServer]:
        return [s for s in self.servers.values() if s.core.role is Role.LEADER]

    def _is_at_rest(self) -> bool:
        if len(self._leaders()) != 1:
            return False
        (leader,) = self._leaders()
        last_index = leader.core.log.last_index
        members = leader.core.membership.members
        if {member.member_id for member in members} != self.servers.keys():
            return False
        return all(member.voter or member.stays_learner for member in members) and all(
            server.asleep_until <= self.now
            and server.core.leader_id == leader.name
            and server.log == leader.log
            and server.disk.found() == leader.log
            and server.core.commit_index == server.applied_index == last_index
            for server in self.servers.values()
        )

    def _cut_off_and_return(self) -> None:
        """I16: a follower that was cut off and comes back changes neither leader nor term."""
        (leader,) = self._leaders()
        term = leader.core.term
        followers = [
            name
            for name in self.servers
            if name != leader.name
            and leader.core.membership.has_quorum(self.servers.keys() - {name})
        ]
        if not followers:
            return
        self._isolate(self.rng.choice(followers))
        self._run_until(self.now + 3 * self.config.election_ticks_max)
        self._heal()
        self._run_until(self.now + self.config.election_ticks_max)
        self._settle()
        held = leader.core.role is Role.LEADER and leader.core.term == term
        self.invariants.require(held, "I16: a returning follower cost the leader its leadership")

    # ---- A server's threads ----

    def _start(self, name: MemberId) -> None:
        disk = self.disks[name]
        core = disk.start(
            name,
            self.config,
            random.Random(self.rng.random()),
            tail_count=self.rng.choice((0, 3, 1000)),
            window_bytes_max=self.window_bytes_max,
        )
        tick_length = self.rng.choice((1, 1, 1, 0.8, 1.25))
        server = self.servers[name] = SimServer(name, core, disk, tick_length)
        held = f"{core.log.first_index}..{core.log.last_index}"
        self._say(f"{name} starts in term {core.term}, state at {core.commit_index}, log {held}")
        self._at(self.rng.uniform(0, 1), self._tick, server)
        self._at(self._pause(self.save_ticks), self._save, server)
        for peer in list(self.servers.values()):
            if self._chance(0.7):
                peer.core.link_up(name)
                self._after(peer)
            if self._chance(0.7) and self.weather is not CALM:
                self._send_needless_state(peer, name)

    def _connect(self, server: SimServer, chance: float) -> None:
        """New connections to the others."""
        for other in self.servers:
            if other != server.name and self._chance(chance):
                server.core.link_up(other)
        self._after(server)

    def _sleeps(self, server: SimServer, action: Callable[..., None], *args: object) -> bool:
        """Whether the server can do nothing now; if so, the action comes when it wakes up."""
        if self.now >= server.asleep_until:
            return False
        heapq.heappush(self._queue, (server.asleep_until, next(self._order), action, args))
        return True

    def _tick(self, server: SimServer) -> None:
        if server.up and not self._sleeps(server, self._tick, server):
            server.core.tick()
            self._after(server)
            self._at(server.tick_length, self._tick, server)

    def _after(self, server: SimServer) -> None:
        """The core has changed: look at it, and do what its driver would do."""
        core = server.core
        if (server.role, server.term) != (core.role, core.term):
            self._say(f"{server.name} is {core.role.value} of term {core.term}")
            if server.role is Role.LEADER and server.term == core.term:
                self.counts["steps down"] += 1
        self.invariants.observe(server)
        if core.is_removed:
            self._retire(server)
            return
        for dropped in core.take_dropped():
            self._say(f"{server.name} drops learner {dropped.node_id}")
            self.counts["learners dropped"] += 1
        if not self._chance(self.weather.late):
            self._write(server)
        self._push(server)
        if not self._chance(self.weather.late):
            self._apply(server)
        for index, tokens in core.take_reads():
            for token in tokens:
                assert isinstance(token, int)
                self._say(f"{server.name} allows read {token} at {index}")
                self.invariants.on_read_given(token, index)

    def _retire(self, server: SimServer) -> None:
        self._say(f"{server.name} has heard that it was removed, and ends")
        self.counts["removals heard"] += 1
        self.retired.add(server.name)
        server.up = False
        del self.servers[server.name]

    def _sync_ticks(self) -> float:
        ticks = self.rng.uniform(0.01, self.weather.sync_ticks)
        return ticks * 10 if self._chance(self.weather.stall) else ticks

    def _write(self, server: SimServer) -> None:
        ready = None if server.writing else server.core.ready()
        if ready is not None:
            server.writing, server.unsynced = True, ready
            if ready.log_base is None:
                self._at(self._sync_ticks(), self._synced, server, ready)
            else:
                self._next_step(server, self._synced, server, ready)

    def _synced(self, server: SimServer, ready: Ready) -> None:
        if not server.up or self._sleeps(server, self._synced, server, ready):
            return
        server.disk.write(ready.hard_state, ready.entries, ready.log_base)
        server.unsynced = None
        for message in ready.messages:
            self._send(server, message)
        if self._chance(self.weather.late):  # answers may come before the writer goes on
            self._at(1, self._advance, server, ready)
        else:
            self._advance(server, ready)

    def _advance(self, server: SimServer, ready: Ready) -> None:
        if server.up and not self._sleeps(server, self._advance, server, ready):
            server.writing = False
            server.core.advance(ready)
            self._after(server)

    def _push(self, server: SimServer) -> None:
        for peer in list(server.core.progress):
            if self._chance(self.weather.late):
                continue
            while peer not in server.reading:
                append = server.core.append_for(peer)
                if append is None:
                    break
                if isinstance(append, SnapshotDue):
                    self._say(f"{server.name} has no entry {append.needed_index} for {peer}")
                    server.core.snapshot_started(peer)
                    self._at(self._sync_ticks(), self._open_state, server, peer, server.core.term)
                elif isinstance(append, EntriesOnDisk):
                    self.counts["entries on disk"] += 1
                    server.reading.add(peer)
                    self._at(self._sync_ticks(), self._read_disk, server, peer, append)
                else:
                    self._send(server, append)

    def _read_disk(self, server: SimServer, peer: MemberId, wanted: EntriesOnDisk) -> None:
        if not server.up or self._sleeps(server, self._read_disk, server, peer, wanted):
            return
        server.reading.discard(peer)
        entries = server.disk.read(wanted.first, wanted.last, self.config.append_bytes_max)
        append = server.core.append_with(peer, entries)
        if append is None:
            self.counts["read in vain"] += 1
        else:
            self._send(server, append)
        self._after(server)

    def _apply(self, server: SimServer) -> None:
        first = server.applied_index + 1
        entries = server.core.entries_to_apply(first, 200)
        if entries is None:
            last = min(server.core.commit_index, server.core.log.stable_index)
            entries = tuple(server.disk.read(first, last, 200))
            self.counts["applied from disk"] += 1
        for entry in entries:
            self.invariants.on_apply(server, entry)
        server.core.applied_to(server.applied_index)

    # ---- States, saved and sent ----

    def _next_step(self, server: SimServer, step: Callable[..., None], *args: object) -> None:
        """Do this when the disk is done, unless the server crashes just before it."""
        ticks = self._sync_ticks()
        if self._chance(self.weather.slow):
            ticks += self.rng.uniform(1, self.weather.slow_ticks)  # a big state
        self._at(ticks, step, *args)
        if self._chance(0.1):
            self._at(self.rng.uniform(0, ticks), self._crash_for_a_while, server)

    def _save(self, server: SimServer) -> None:
        """Like state-flusher: write down how far the state machine is; then shorten the log."""
        if not server.up or self._sleeps(server, self._save, server):
            return
        self._at(self._pause(self.save_ticks), self._save, server)
        index = server.applied_index
        if index > server.disk.state.snapshot.index:
            membership_index, members = server.core.membership_at(index)
            snapshot = Snapshot(index, server.core.log.term_at(index), members, membership_index)
            state = SimState(snapshot, tuple(server.applied))
            self._next_step(server, self._saved, server, state)

    def _saved(self, server: SimServer, state: SimState) -> None:
        if not server.up or self._sleeps(server, self._saved, server, state):
            return
        if server.installing or state.snapshot.index <= server.disk.state.snapshot.index:
            return  # given up for the state that another server has sent
        self.invariants.on_save(server, state)
        server.disk.save(state)
        self.counts["states saved"] += 1
        # What is being sent to a follower must meet the log, which may end before the state, if the
        # others committed faster than this disk wrote. And drops go by whole segments of 3.
        needed = [sending.index for sending in server.sending.values()]
        covered = min(state.snapshot.index, server.core.log.stable_index)
        first = min([covered - self.tail_entries, *needed]) // 3 * 3 + 1
        if first > server.disk.base[0] + 1:
            self._say(
                f"{server.name} drops its log before {first}, state at {state.snapshot.index}"
            )
            server.disk.drop_before(first)
            self._next_step(server, self._compacted, server, first)

    def _compacted(self, server: SimServer, first: int) -> None:
        if server.up and not self._sleeps(server, self._compacted, server, first):
            self.counts["logs compacted"] += 1
            server.core.compacted_to(first)
            self._after(server)

    def _send_needless_state(self, server: SimServer, peer: MemberId) -> None:
        """To one that does not need it (any more): a state may come at any time."""
        idle = peer in server.core.progress and peer not in server.sending
        if idle and server.disk.state.snapshot.index > 0:
            self._open_state(server, peer, server.core.term)

    def _open_state(self, server: SimServer, peer: MemberId, term: int) -> None:
        if not server.up or self._sleeps(server, self._open_state, server, peer, term):
            return
        if not self._still_leads(server, term):
            return
        snapshot_id = self.rng.randrange(1, 1 << 64)
        server.sending[peer] = Sending(snapshot_id, term, server.disk.state, self.chunk_bytes)
        self.counts["snapshots sent"] += 1
        self.invariants.on_open(snapshot_id, server.disk.state)
        self._send_chunk(server, peer, server.sending[peer], CHUNK_RETRIES_MAX)

    def _send_chunk(
        self, server: SimServer, peer: MemberId, sending: Sending, retries: int
    ) -> None:
        if not self._still_leads(server, sending.term):
            server.sending.pop(peer, None)
            return
        self.counts["chunks"] += 1
        self._send(server, sending.chunk(server.name, peer))
        args = (server, peer, sending, sending.offset, retries)
        self._at(CHUNK_RETRY_TICKS, self._repeat_chunk, *args)

    def _repeat_chunk(
        self, server: SimServer, peer: MemberId, sending: Sending, seen: int, retries: int
    ) -> None:
        """Send the chunk at ``seen`` again if the transfer has not gone on since."""
        args = (server, peer, sending, seen, retries)
        if not server.up or self._sleeps(server, self._repeat_chunk, *args):
            return
        if server.sending.get(peer) is sending and sending.offset == seen:
            if retries > 0:
                self._send_chunk(server, peer, sending, retries - 1)
            else:
                self._end_sending(server, peer, None)

    def _still_leads(self, server: SimServer, term: int) -> bool:
        return server.core.role is Role.LEADER and server.core.term == term

    def _end_sending(self, server: SimServer, peer: MemberId, index: int | None) -> None:
        del server.sending[peer]
        self.counts["snapshots given up"] += index is None
        server.core.snapshot_ended(peer, index)
        self._after(server)

    def _on_snapshot_reply(self, server: SimServer, reply: SnapshotReply) -> None:
        peer, sending = reply.sender, server.sending.get(reply.sender)
        if sending is None or sending.snapshot_id != reply.snapshot_id:
            return
        if not self._still_leads(server, reply.term):
            return
        if reply.outcome is SnapshotOutcome.INSTALLED:
            self._end_sending(server, peer, sending.index)
        elif reply.outcome is SnapshotOutcome.REFUSED:
            self._end_sending(server, peer, None)
        elif reply.received_bytes > sending.offset:
            sending.offset = reply.received_bytes
            self._send_chunk(server, peer, sending, CHUNK_RETRIES_MAX)

    def _on_chunk(self, server: SimServer, chunk: SnapshotChunk) -> None:
        if chunk.term != server.core.term or server.installing:
            return
        result = server.receiving.take(chunk)
        if not isinstance(result, SimState):
            server.core.answer_chunk(chunk, *result)
        elif result.snapshot.index <= server.core.commit_index:
            server.core.answer_chunk(chunk, 0, SnapshotOutcome.INSTALLED)
        else:
            server.installing = "a state received"
            self._next_step(server, self._install, server, chunk, result)

    def _install(self, server: SimServer, chunk: SnapshotChunk, state: SimState) -> None:
        """The state is whole and synced: put it in the place of the server's own."""
        if server.up and not self._sleeps(server, self._install, server, chunk, state):
            self.invariants.on_save(server, state)
            server.disk.save(state)
            server.installing = "a state in place"
            self._next_step(server, self._restore, server, chunk, state)

    def _restore(self, server: SimServer, chunk: SnapshotChunk, state: SimState) -> None:
        """It is in place: load it."""
        if server.up and not self._sleeps(server, self._restore, server, chunk, state):
            self._say(f"{server.name} restores the state at {state.snapshot.index}")
            server.installing = ""
            server.core.restore(state.snapshot)
            self.invariants.on_restore(server, state)
            server.core.answer_chunk(chunk, 0, SnapshotOutcome.INSTALLED)
            self._after(server)

    # ---- The network ----

    def _send(self, server: SimServer, message: Message) -> None:
        self.invariants.on_send(server, message)
        if (message.sender, message.to) in self.cuts or self._chance(self.weather.drop):
            self.counts["lost"] += 1
            return
        copies = 1
        if self._chance(self.weather.duplicate):
            copies = 2
            self.counts["duplicated"] += 1
        for _ in range(copies):
            slow = self._chance(self.weather.slow)
            span = (1, self.weather.slow_ticks) if slow else self.weather.quick_ticks
            self._at(self.rng.uniform(*span), self._deliver, message)

    def _deliver(self, message: Message) -> None:
        server = self.servers.get(message.to)
        if server is None or self._sleeps(server, self._deliver, message):
            return
        if self._trace is not None:
            self._say(describe(message))
        self.invariants.before_step(server, message)
        server.core.step(message)
        if isinstance(message, SnapshotChunk):
            self._on_chunk(server, message)
        elif isinstance(message, SnapshotReply):
            self._on_snapshot_reply(server, message)
        self._after(server)

    def _isolate(self, name: MemberId) -> None:
        self._say(f"{name} is cut off")
        for other in self.disks:
            self.cuts |= {(name, other), (other, name)}

    def _heal(self) -> None:
        self._say("all links work")
        self.cuts.clear()
        for server in list(self.servers.values()):
            self._connect(server, 0.5)

    # ---- Faults ----

    def _fault(self) -> None:
        faults: list[tuple[Callable[[], None], int]] = [
            (self._crash_one, 4),
            (self._crash_all, 1),
            (self._isolate_leader, 4),
            (self._cut_one_way, 3),
            (self._split, 2),
            (self._heal, 5),
            (self._mistake_for_dead, 2),
            (self._distrust, 1),
            (self._pause_one, 4),
            (self._remove_one, 8 if self.is_shrinking else 0),
            (self._move_one, 2),
            (self._mistype_address, 2 if self.config.learner_ticks_max < STORM_TICKS else 0),
        ]
        chosen = self.rng.choices([f for f, _ in faults], [weight for _, weight in faults])[0]
        if self.weather is not CALM:
            chosen()
            self._at(self._pause(self.weather.fault_ticks), self._fault)

    def _some_server(self) -> SimServer | None:
        """A leader more often than not: there lies the danger."""
        leaders = self._leaders()
        candidates = leaders if leaders and self._chance(0.6) else list(self.servers.values())
        return self.rng.choice(candidates) if candidates else None

    def _crash_one(self) -> None:
        server = self._some_server()
        if server is not None:
            self._crash_for_a_while(server)

    def _crash_for_a_while(self, server: SimServer) -> None:
        if server.up and self.weather is not CALM:
            self._crash(server)
            self._at(self.rng.uniform(0.1, 40), self._restart, server.name)

    def _crash_all(self) -> None:
        for server in list(self.servers.values()):
            self._crash(server)
            self._at(self.rng.uniform(0.1, 20), self._restart, server.name)

    def _restart(self, name: MemberId) -> None:
        if name not in self.servers and name not in self.retired:
            self._start(name)

    def _crash(self, server: SimServer) -> None:
        self.counts["crashes"] += 1
        server.up = False
        del self.servers[server.name]
        if server.installing:
            self.counts[f"crash with {server.installing}"] += 1
        fate = "nothing"
        if (ready := server.unsynced) is not None:
            fate, kept = self.rng.choice(
                (
                    ("lost", 0),
                    ("kept in part", self.rng.randint(0, len(ready.entries))),
                    ("kept", len(ready.entries)),
                )
            )
            if fate != "lost":
                server.disk.write(ready.hard_state, ready.entries[:kept], ready.log_base)
            elif ready.log_base and self._chance(0.5):
                server.disk.reset(ready.log_base)  # the first step was done
            self.counts[f"write {fate}"] += 1
            self.counts["crash with a log to empty"] += ready.log_base is not None
        self._say(f"{server.name} crashes; of what was not synced: {fate}")
        for other in self.servers.values():
            if self._chance(0.5):
                self._at(self.rng.uniform(0.1, 5), self._hear_of_death, other, server.name)

    def _hear_of_death(self, server: SimServer, dead: MemberId) -> None:
        if server.up and not self._sleeps(server, self._hear_of_death, server, dead):
            self.counts["evidence"] += server.core.leader_id == dead
            server.core.leader_died(dead)
            self._after(server)

    def _mistake_for_dead(self) -> None:
        for server in list(self.servers.values()):
            if server.core.leader_id is not None:
                self._hear_of_death(server, server.core.leader_id)

    def _pause_one(self) -> None:
        """A leader that sleeps while another is elected, and wakes up believing it leads."""
        server = self._some_server()
        if server is not None:
            ticks = self.rng.uniform(1, 3 * self.config.election_ticks_max)
            self._say(f"{server.name} sleeps for {ticks:.1f}")
            self.counts["pauses"] += 1
            server.asleep_until = self.now + ticks
            self._at(ticks, self._ask, server)

    def _isolate_leader(self) -> None:
        server = self._some_server()
        if server is not None:
            self._isolate(server.name)

    def _cut_one_way(self) -> None:
        sender, to = self.rng.sample(list(self.disks), 2)
        self._say(f"{to} does not hear {sender}")
        self.cuts.add((sender, to))

    def _split(self) -> None:
        names = list(self.disks)
        left = self.rng.sample(names, len(names) // 2)
        self._say(f"split: {' '.join(left)} from the others")
        for name in left:
            for other in names:
                if other not in left:
                    self.cuts |= {(name, other), (other, name)}

    def _distrust(self) -> None:
        server = self._some_server()
        if server is not None:
            self._say(f"{server.name} must lead no more")
            server.core.step_down()
            self._after(server)

    # ---- Clients and joining servers ----

    def _client(self) -> None:
        self._at(self._pause(self.weather.client_ticks), self._client)
        server = self._some_server()
        if server is not None:
            self._ask(server)

    def _ask(self, server: SimServer) -> None:
        if not server.up or self._sleeps(server, self._ask, server):
            return
        token = next(self._requests)
        try:
            if self._chance(0.4):
                server.core.read_index(token)
                self._say(f"a client asks {server.name} for read {token}")
                self.invariants.on_read_asked(token)
            else:
                payloads = [b"%d.%d" % (token, i) for i in range(self.rng.choice((1, 1, 3)))]
                index = server.core.propose(payloads)
                self._say(f"a client writes {token} at {server.name}, index {index}")
                self.counts["writes"] += 1
        except (NotLeaderError, TooMuchUncommittedError) as error:
            self.counts[type(error).__name__] += 1
        self._after(server)

    # ---- Members that come and go ----

    def _join_next(self) -> None:
        if self.joiners:
            name = self.joiners.pop(0)
            newcomer = member(name, voter=False, stays_learner=self._chance(0.3))
            self.disks[name] = SimDisk(Membership())
            self._start(name)
            self._join(newcomer)

    def _join(self, newcomer: Member) -> None:
        """It asks whoever leads to be added, until it hears that it was."""
        name = newcomer.member_id
        server = self.servers.get(name)
        if server is not None and name in self.invariants.removed:
            self._retire(server)  # dropped before it had heard; an id never comes back
            return
        if server is not None and self.now >= server.asleep_until:
            for leader in self._leaders():
                self._ask_to_join(server, leader, newcomer)
        if self.disks[name].admitted_index is None and name not in self.retired:
            self._at(7, self._join, newcomer)

    def _ask_to_join(self, server: SimServer, leader: SimServer, newcomer: Member) -> None:
        core, name = leader.core, newcomer.member_id
        index, members = core.membership_at(core.commit_index)
        is_new = core.membership.get(name) is None
        if members.get(name) is not None:
            server.disk.admitted_index = index
            server.core.admitted_at(index)
        elif is_new and self._change(leader, partial(core.add_learner, newcomer)):
            self.counts["joins"] += 1
            self._say(f"{leader.name} adds {name} as a learner")

    def _mistype_address(self) -> None:
        """A learner that is nowhere: it must be dropped, or the cluster never comes to rest."""
        for leader in self._leaders()[:1]:
            nobody = member(f"nobody{next(self._requests)}", voter=False)
            if self._change(leader, partial(leader.core.add_learner, nobody)):
                self.counts["addresses mistyped"] += 1

    def _remove_one(self) -> None:
        for leader in self._leaders():
            core = leader.core
            name = self.rng.choice(core.membership.members).member_id
            if core.membership.objection_to_leaving(name):
                continue
            if self._change(leader, partial(core.remove_member, name)):
                self.counts["leader removes itself"] += name == leader.name
                self.counts["removals"] += 1
                self._say(f"{leader.name} removes {name}")
                if self._chance(0.7):
                    self._at(self.rng.uniform(0, 60), self._join_next)

    def _move_one(self) -> None:
        for leader in self._leaders():
            core = leader.core
            moved = self.rng.choice(core.membership.members)
            moved = moved._replace(port=moved.port + 1)
            if self._change(leader, partial(core.change_member, moved)):
                self.counts["moves"] += 1

    def _change(self, leader: SimServer, change: Callable[[], int]) -> bool:
        try:
            change()
        except MembershipChangeRefusedError:
            self.counts["change refused"] += 1
            return False
        self._after(leader)
        return True


def run(seed: int, trace: Callable[[str], None] | None = None) -> Counter[str]:
    """Run one history; what happened, counted. Raises ViolationError that tells how to replay."""
    simulation = Simulation(seed, trace)
    try:
        return simulation.run()
    except (AssertionError, LookupError) as error:
        raise ViolationError(
            f"seed={seed} time={simulation.now:.2f}: {type(error).__name__} {error}\n"
            f"replay: python -m tests.sim_raft --seed {seed}"
        ) from error


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> None:
    """Print one history, or run many."""
    parser = argparse.ArgumentParser(description="A Raft cluster in a made-up world.")
    parser.add_argument("--seed", type=int, required=True, help="the history, or the first one")
    parser.add_argument("--count", type=int, help="run that many, and print only the sums")
    args = parser.parse_args()
    if args.count is None:
        happened = run(args.seed, _print)
    else:
        happened = sum((run(args.seed + i) for i in range(args.count)), Counter())
    for what, times in sorted(happened.items()):
        sys.stdout.write(f"{times:8d} {what}\n")


if __name__ == "__main__":
    main()
