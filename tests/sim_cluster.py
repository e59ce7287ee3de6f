"""A cluster of nodes in a made-up world: cores, disks, stores, clients. One seed, one history.

Rule 1: what a disk did not sync is lost in a crash, or kept, or kept in part, as chance will.
Rule 2: after every step of every server the invariants are checked (``sim_invariants.py``).
Rule 3: the driver's part is played as ``raft_node.py`` plays it, each of its threads an event.

A run is storms (``sim_faults.py``) with lulls between them, in which a majority must answer whatever
became of the others; then calm, in which the cluster must come to rest and every client get its
answers; then one follower cut off and returned, one whose state differs found out, a leader with a
lease mistaken for dead, and leaders lost one after another.

Started by ``simulator.py``. Chance and time: ``sim_world.py``. Links: ``sim_network.py``. Who comes
and goes: ``sim_members.py``. Who asks: ``sim_clients.py``.
"""

from __future__ import annotations

import logging
import operator
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from itertools import chain, islice

from kv_store import Flush, Slice
from kv_types import Reply
from raft_audit import StateAudit
from raft_core import RaftCore
from raft_types import (
    EntriesOnDisk,
    Entry,
    EntryKind,
    HardState,
    HashReport,
    MemberId,
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
from raft_watch import Lease
from tests.raft_servers import Receiving, Sending, SimDisk, SimState, describe, membership
from tests.sim_audit import Audits
from tests.sim_clients import WORKLOADS, Clients, Desk
from tests.sim_faults import FAULTS, Faults
from tests.sim_invariants import Invariants, Watched
from tests.sim_members import Members
from tests.sim_network import Network
from tests.sim_world import CALM, NUISANCES, SimClock, World
from tests.torn_writes import is_torn

# Its warnings are nobody's here: the trace tells the same.
logging.getLogger("raft_snapshots").addHandler(logging.NullHandler())

STEPS = 8000
# What can be left out of a history.
KINDS = (*FAULTS, *NUISANCES, *WORKLOADS, "joins")
# In the calm, in the longest election timeouts: until there is a leader, until clients have their
# answers though the first servers that they ask are not there, until all is equal.
LEADER_TIMEOUTS = 5
ANSWER_TIMEOUTS = 10
REST_TIMEOUTS = 15
LULL_TICKS_MAX = 10_000
LEADERS_LOST = 3
APPLY_TICKS = 0.05  # for so many bytes
CHUNK_RETRY_TICKS = 8
LEAVING_TICKS = 30
CHUNK_RETRIES_MAX = 5


def _config(rng: random.Random, *, reads_by_lease: bool) -> RaftConfig:
    # Under a long lease, another can be elected whom the old leader does not hear of.
    timeout_ticks = rng.choice(((10, 20), (30, 40))) if reads_by_lease else (10, 20)
    return RaftConfig(
        heartbeat_ticks=3,
        election_ticks_min=timeout_ticks[0],
        election_ticks_max=timeout_ticks[1],
        dead_leader_ticks=5,
        dead_leader_vote_ticks=6,
        append_bytes_max=rng.choice((1, 150, 1000)),  # 1: an entry a message
        uncommitted_bytes_max=rng.choice((400, 100_000)),
        learner_ticks_max=rng.choice((40, 6000)),
        catch_up_ticks_max=rng.choice((100, 60_000)),
    )


def _founded(names: str) -> SimDisk:
    """The disk of a founder: the log begins with the first membership."""
    disk = SimDisk(Membership())
    first = Entry(1, 1, EntryKind.MEMBERSHIP, membership(names).encode())
    disk.write(HardState(1, None), [first])
    return disk


class SimServer(Watched):
    """A server from its start to its crash, with the driver's threads as events."""

    def __init__(
        self,
        name: MemberId,
        core: RaftCore,
        disk: SimDisk,
        clock: SimClock,
        tick_length: float,
        lease: Lease,
    ) -> None:
        super().__init__(name, core, disk)
        self.clock = clock
        self.tick_length = tick_length  # its clock may be fast or slow
        self.lease = lease
        self.desk = Desk()
        self.up = True
        self.asleep_until = 0.0  # as under SIGSTOP
        self.writing = False  # the log writer has a Ready and has not come back
        self.unsynced: Ready | None = None  # what a crash would take
        self.applying = False  # the applier goes on soon: not all fitted in one go
        self.reading: set[MemberId] = set()  # followers for whom entries are read from the disk
        self.sending: dict[MemberId, Sending] = {}
        self.receiving = Receiving()
        # How far a state received is; until it is in force this server's own must not be saved.
        self.installing = ""
        self.last_chunk: SnapshotChunk | None = None  # of the state that is being installed
        # What is being saved.
        self.saving: Flush | None = None
        self.disk_hangs_until = 0.0
        self.writing_ticks = 0
        self.audit = StateAudit(name)
        self.next_audit = 0.0
        self.lie = 0  # by which its state hash differs from what it should be
        self.upkeep_ticks = 0
        self.is_leaving = False  # it has heard that it was removed
        self.lonely_ticks = 0  # since it knew a leader


class Simulation(World):
    """One cluster's history."""

    def __init__(
        self,
        seed: int,
        trace: Callable[[str], None] | None = None,
        *,
        nodes: int | None = None,
        without: Collection[str] = (),
    ) -> None:
        """``nodes``: founders, else as chance will; ``without``: of ``KINDS``, what never comes."""
        super().__init__(seed, trace, without)
        self.reads_by_lease = self.chance(0.3)
        self.config = _config(self.rng, reads_by_lease=self.reads_by_lease)
        self.window_bytes_max = self.rng.choice((0, 600, 100_000))
        self.save_ticks = self.rng.choice((4, 15, 60, 1e9))  # the mean time between states saved
        # That a state is sent to who has just started, whether it needs it or not.
        self.needless = 0 if "needless" in without else self.rng.choice((0, 0.7, 1))
        self.tail_entries = self.rng.choice((0, 3, 20))  # kept in the log though the state has them
        self.apply_bytes = self.rng.choice((200, 2000))
        self.upkeep_ticks = self.rng.choice((10, 10, 1000))
        self.chunk_bytes = self.rng.choice((200, 1000, 10_000))
        drawn = self.rng.choice((1, 2, 3, 3, 3, 3, 5, 5, 5))
        self.names = "abcdefg"[: drawn if nodes is None else nodes]
        self.disks = {name: _founded(self.names) for name in self.names}
        self.servers: dict[MemberId, SimServer] = {}
        self.retired: set[MemberId] = set()  # who is removed, and has ended
        self.invariants = Invariants(self, self.names, self.counts)
        self.storm_steps = self.rng.choice((500, 1000, 2000))
        # Of what runs well the ticks are equally long, or nearly so. A lease counts on that, always.
        self.good_lengths = self.rng.choice(((1.0,), (0.8, 1.0, 1.25)))
        if self.reads_by_lease:
            self.good_lengths = (0.9, 1.0, 1.1)
        self.lull_ticks = self.rng.choice((10, 40, 80))  # that clients have once there are answers
        self.away: set[MemberId] = set()  # who takes no part in a lull
        self.last_arrival = 0.0  # when the last message that is under way arrives
        self.network = Network(self, self._on_mended)
        self.members = Members(self, "joins" not in without)
        self.clients = Clients(self, without)
        self.faults = Faults(self, without)
        self.audits = Audits(self)

    # ---- What the invariants ask ----

    def running(self) -> list[Watched]:
        """The servers that are up."""
        return list(self.servers.values())

    def disk_of(self, member_id: MemberId) -> SimDisk | None:
        """A server's disk, whether it is up or not; None: there is no such server."""
        return self.disks.get(member_id)

    # ---- The course of a history ----

    def run(self, steps: int = STEPS) -> Counter[str]:
        """Storms and lulls of so many steps, calm, one cut off and returned; what happened, counted."""
        for name in self.names:
            self.start_server(name)
        self.faults.start()
        self.members.start()
        self.clients.start()
        self.run_steps(min(steps, self.storm_steps))
        while self.steps < steps:
            self._lull()
            self.run_steps(min(steps - self.steps, self.storm_steps))
        self.is_over = True
        self._calm_down()
        self._settle()
        self.clients.ask_for_all()
        self._settle()
        self.clients.check()
        self._cut_off_and_return()
        self._find_who_differs()
        self._mistake_for_dead()
        self._lose_leaders()
        self.invariants.check_timeouts()
        self.counts["steps"] = self.steps
        return self.counts

    def _calm_down(self) -> None:
        """The storm ends, for all but those who are away."""
        self.say("the storm ends")
        self.weather = CALM
        self.network.heal()
        for name in sorted(self.disks.keys() - self.away):
            server = self.servers.get(name)
            if server is not None and (server.lie or server.audit.trouble):
                self.crash(server)  # only a restart mends a state
            self.restart(name)
        for server in self._present():
            server.disk_hangs_until = 0
            if not self.reads_by_lease:
                server.tick_length = self.rng.choice(self.good_lengths)
        for server in self._present():
            self._connect(server, 1)

    def _lull(self) -> None:
        """I15: as many as are a majority go on, whatever became of the others; then a new storm."""
        self.away = self._minority()
        self._calm_down()
        self.faults.hand_over_to_one_of(self.away)
        self._send_away()
        # What a leader has sent who is gone may still arrive, and keep its followers quiet.
        under_way_ticks = max(0, self.last_arrival - self.now)
        self._wait(LEADER_TIMEOUTS, self._is_led, "no leader", under_way_ticks)
        self.clients.ask_each([server.name for server in self._present()])
        # A follower without whom there is no majority may have to take what it lacks first.
        more_ticks = 2 * self._entries_behind()
        self._wait(ANSWER_TIMEOUTS, lambda: self.clients.have_answers, "no answers", more_ticks)
        self.counts["lulls"] += 1
        self.counts["lulls of a mere majority"] += bool(self.away)
        self.run_until(self.now + self.lull_ticks)
        self.say("a storm begins")
        self.weather = self.storm
        self.heal()
        away, self.away = self.away, set()
        for name in sorted(away):
            self.restart(name)

    def _minority(self) -> set[MemberId]:
        """Some servers without which the others can go on, the leader first; as often as not none."""
        away: set[MemberId] = set()
        if self.chance(0.5):
            leaders = [server.name for server in self.leaders()]
            for name in [*leaders, *self.rng.sample(sorted(self.disks), len(self.disks))]:
                if self.members.can_do_without(away | {name}):
                    away.add(name)
        return away

    def _send_away(self) -> None:
        for name in sorted(self.away):
            server, others = self.servers.get(name), sorted(self.disks.keys() - {name})
            if server is None:
                continue
            way = self.rng.choice(("down", "alone", "deaf", "mute"))
            self.counts[f"away: {way}"] += 1
            if way == "down":
                self.crash(server)
            elif way == "alone":
                self.network.isolate(name, others, LULL_TICKS_MAX)
            else:
                self.network.silence(name, others, LULL_TICKS_MAX, is_deaf=way == "deaf")

    def _present(self) -> list[SimServer]:
        return [server for name, server in self.servers.items() if name not in self.away]

    def _is_led(self) -> bool:
        return any(server.core.role is Role.LEADER for server in self._present())

    def _settle(self) -> None:
        """I15: soon a leader; then every learner has its vote or stays one, all logs are equal and
        applied, and who was removed has heard it."""
        self._wait(LEADER_TIMEOUTS, self._is_led, "no leader")
        self._wait(REST_TIMEOUTS, self._is_at_rest, "not at rest", 2 * self._entries_behind())

    def _entries_behind(self) -> int:
        """Of the longest log, how much somebody lacks.

        Where each is a message of its own, and one at a time, catching up takes longer.
        """
        logs = [server.log for server in self.servers.values()]
        longest = max(logs, key=len)
        shared = [
            list(map(operator.eq, log, longest)).count(True) for log in logs
        ]  # a prefix, by I2
        return len(longest) - min(shared)

    def _wait(
        self, timeouts: int, reached: Callable[[], bool], otherwise: str, more_ticks: float = 0
    ) -> None:
        limit = self.now + timeouts * self.config.election_ticks_max + more_ticks
        while not reached():
            roles = {name: server.core.role.value for name, server in self.servers.items()}
            self.invariants.require(self.now < limit, f"I15: {otherwise} by {limit}: {roles}")
            self.run_until(self.now + 1)

    def leaders(self) -> list[SimServer]:
        """Whoever believes to lead: of several terms there may be several."""
        return [s for s in self.servers.values() if s.core.role is Role.LEADER]

    def _is_at_rest(self) -> bool:
        if len(self.leaders()) != 1:
            return False
        (leader,) = self.leaders()
        last_index = leader.core.log.last_index
        members = leader.core.membership.members
        if {member.member_id for member in members} != self.servers.keys():
            return False
        return (
            all(member.voter or member.stays_learner for member in members)
            and all(
                server.asleep_until <= self.now
                and server.core.leader_id == leader.name
                and server.log == leader.log
                and server.disk.found() == leader.log
                and server.core.commit_index == server.applied_index == last_index
                for server in self.servers.values()
            )
            and self.clients.are_idle
        )

    def _cut_off_and_return(self) -> None:
        """I16: a follower that was cut off and comes back changes neither leader nor term."""
        (leader,) = self.leaders()
        term = leader.core.term
        followers = [
            name
            for name in self.servers
            if name != leader.name
            and leader.core.membership.has_quorum(self.servers.keys() - {name})
        ]
        if not followers:
            return
        ticks = 3 * self.config.election_ticks_max
        self.network.isolate(self.rng.choice(followers), self.disks, ticks)
        self.run_until(self.now + ticks)
        self.heal()
        self.run_until(self.now + self.config.election_ticks_max)
        self._settle()
        held = leader.core.role is Role.LEADER and leader.core.term == term
        self.invariants.require(held, "I16: a returning follower cost the leader its leadership")

    def _find_who_differs(self) -> None:
        """G6: one whose state differs from a majority's is found, and serves no more."""
        (leader,) = self.leaders()
        server = self.rng.choice([*self.servers.values()])
        if not leader.core.membership.has_quorum(self.servers.keys() - {server.name}):
            return
        self.audits.lie(server)
        self._wait(REST_TIMEOUTS, lambda: bool(server.audit.trouble), "G6: a difference stays")
        stopped = [other.name for other in self.servers.values() if other.audit.trouble]
        self.invariants.require(stopped == [server.name], f"G6: {stopped} serve no more")
        finding = f"the state of {server.name} differs"
        is_named = leader.audit.finding.startswith(finding) or leader not in self.leaders()
        self.invariants.require(is_named, f"G6: {leader.audit.finding!r}, not {finding!r}")
        self._wait(REST_TIMEOUTS, lambda: not server.up, "it was not restarted")
        self._settle()
        self.counts["differing states found in the calm"] += 1

    def _mistake_for_dead(self) -> None:
        """Thesis 6.4.1: another is elected at once, and the old leader, which does not hear of it, is
        asked on; its lease must have run out before the other shows anything to a client."""
        (leader,) = self.leaders()
        others = sorted(self.servers.keys() - {leader.name})
        if not (self.reads_by_lease and leader.core.membership.has_quorum(others)):
            return
        timeout_ticks = self.config.election_ticks_max
        self.weather = CALM._replace(slow=0.2, slow_ticks=self.config.election_ticks_min)
        self.run_until(self.now + timeout_ticks)  # so that answers to the leader are under way
        self.network.isolate(leader.name, others, 2 * timeout_ticks)
        for name in others:
            self.hear_of_death(self.servers[name], leader.name)
        for name in sorted(self.servers):
            for ticks in range(2 * timeout_ticks):
                self.clients.ask_at_once(name, ticks)
        self.run_until(self.now + 2 * timeout_ticks)
        self.weather = CALM
        self.heal()
        self._settle()
        self.counts["leaders mistaken for dead"] += 1

    def _lose_leaders(self) -> None:
        """I15: one after another is gone, and soon there is the next, though all logs are equal."""
        for _ in range(LEADERS_LOST):
            (leader,) = self.leaders()
            if not leader.core.membership.has_quorum(self.servers.keys() - {leader.name}):
                return
            self.run_until(
                self.now + self.config.heartbeat_ticks * 3
            )  # so that all hear it at once
            self.away = {leader.name}
            self.crash(leader)
            self._wait(LEADER_TIMEOUTS, self._is_led, "no leader")
            self.away = set()
            self.restart(leader.name)
            self._settle()
            self.counts["leaders lost in the calm"] += 1

    # ---- A server's threads ----

    def start_server(self, name: MemberId) -> None:
        """From what its disk holds."""
        disk = self.disks[name]
        core = disk.start(
            name,
            self.config,
            random.Random(self.rng.random()),
            tail_count=self.rng.choice((0, 3, 1000)),
            window_bytes_max=self.window_bytes_max,
        )
        are_good = self.reads_by_lease or self.weather is CALM
        lengths = self.good_lengths if are_good else (1, 1, 1, 0.8, 1.25, 0.5, 2)
        clock, tick_length = SimClock(self.rng), self.rng.choice(lengths)
        lease = Lease(
            self.reads_by_lease, self.config.election_ticks_min, lambda: self.now / tick_length
        )
        server = self.servers[name] = SimServer(name, core, disk, clock, tick_length, lease)
        self.invariants.on_start(server)
        held = f"{core.log.first_index}..{core.log.last_index}"
        self.say(f"{name} starts in term {core.term}, state at {core.commit_index}, log {held}")
        self.at(self.rng.uniform(0, 1), self._tick, server)
        self.at(self.pause(self.save_ticks), self._save, server)
        for peer in list(self.servers.values()):
            if self.chance(self.habits.links_up):
                peer.core.link_up(name)
                self.after(peer)
            if self.chance(self.needless) and self.weather is not CALM:
                self.send_needless_state(peer, name)

    def _connect(self, server: SimServer, chance: float) -> None:
        """New connections to the others."""
        for other in self.servers:
            if other != server.name and self.chance(chance):
                server.core.link_up(other)
        self.after(server)

    def sleeps(self, server: SimServer, action: Callable[..., None], *args: object) -> bool:
        """Whether the server can do nothing now; if so, the action comes when it wakes up."""
        if self.now >= server.asleep_until:
            return False
        self.at_time(server.asleep_until, action, *args)
        return True

    def _tick(self, server: SimServer) -> None:
        if server.up and not self.sleeps(server, self._tick, server):
            # A follower whose own disk is slow has no cause to doubt its leader (raft-traps T23).
            if server.core.role is Role.LEADER or not server.core.is_writing:
                server.core.tick()
            self._watch_disk(server)
            # Who was removed, and starts from a state of later, hears a leader now and then.
            is_led = server.core.leader_id and server.core.membership.get(server.name)
            server.lonely_ticks = 0 if is_led else server.lonely_ticks + 1
            is_lonely = server.lonely_ticks > 2 * self.config.election_ticks_max
            if is_lonely and self.members.tell_if_removed(server):
                return
            server.upkeep_ticks += 1
            if server.upkeep_ticks % self.upkeep_ticks == 0:
                self.clients.do_upkeep(server)
            self.audits.compare(server)
            self.after(server)
            self.at(server.tick_length, self._tick, server)

    def _watch_disk(self, server: SimServer) -> None:
        """A leader whose own disk hangs makes way, though its heartbeats still flow."""
        core = server.core
        server.writing_ticks = server.writing_ticks + 1 if core.is_writing else 0
        hangs = server.writing_ticks > self.config.election_ticks_min
        core.may_campaign = not (hangs or server.audit.trouble)
        if hangs:
            self.counts["way given for a disk"] += core.role is Role.LEADER
            core.give_way()

    def after(self, server: SimServer) -> None:
        """The core has changed: look at it, and do what its driver would do."""
        core = server.core
        if (server.role, server.term) != (core.role, core.term):
            self.say(f"{server.name} is {core.role.value} of term {core.term}")
            if server.role is Role.LEADER and server.term == core.term:
                self.counts["steps down"] += 1
            if server.role is Role.LEADER:
                self.clients.leadership_lost(server)
            elif core.role is Role.LEADER:
                server.lease.begin()
        server.lease.follow(core)
        self.invariants.observe(server)
        if core.is_removed and not server.is_leaving:
            server.is_leaving = True
            self.at(self.rng.uniform(0, LEAVING_TICKS), self.retire, server)
        for notice in core.take_notices():
            assert "has lost" not in notice, notice  # no simulated disk forgets what it synced
            self.say(f"{server.name} says: {notice}")
            self.counts["learners dropped"] += "dropped" in notice
        if not self.chance(self.weather.late):
            self._write(server)
        self._push(server)
        if not self.chance(self.weather.late):
            self._apply(server)
        for index, tokens in core.take_reads():
            for token in tokens:
                assert isinstance(token, int)
                self.say(f"{server.name} allows read {token} at {index}")
                self.clients.on_read_given(server, token, index)

    def retire(self, server: SimServer) -> None:
        """It has heard that it is no member any more."""
        if not server.up:
            return
        self.say(f"{server.name} has heard that it was removed, and ends")
        self.counts["removals heard"] += 1
        self.retired.add(server.name)
        server.up = False
        del self.servers[server.name]

    def _sync_ticks(self) -> float:
        ticks = self.rng.uniform(0.01, self.weather.sync_ticks)
        return ticks * 10 if self.chance(self.weather.stall) else ticks

    def _fails_to_sync(self, server: SimServer) -> bool:
        """Whether the disk has just failed; that ends the server (raft-traps T6)."""
        if not self.chance(self.weather.sync_error):
            return False
        self.say(f"the disk of {server.name} fails")
        self.counts["disk errors"] += 1
        self.crash_for_a_while(server)
        return True

    def _write(self, server: SimServer) -> None:
        ready = None if server.writing else server.core.ready()
        if ready is not None:
            server.writing, server.unsynced = True, ready
            if ready.log_base is None:
                hangs = max(0, server.disk_hangs_until - self.now)
                self.at(hangs + self._sync_ticks(), self._synced, server, ready)
            else:
                self._next_step(server, self._synced, server, ready)

    def _synced(self, server: SimServer, ready: Ready) -> None:
        if not server.up or self.sleeps(server, self._synced, server, ready):
            return
        if self._fails_to_sync(server):
            return
        server.disk.write(ready.hard_state, ready.entries, ready.log_base)
        server.unsynced = None
        for message in ready.messages:
            self._send(server, message)
        if self.chance(self.weather.late):  # answers may come before the writer goes on
            self.at(1, self._advance, server, ready)
        else:
            self._advance(server, ready)

    def _advance(self, server: SimServer, ready: Ready) -> None:
        if server.up and not self.sleeps(server, self._advance, server, ready):
            server.writing, server.writing_ticks = False, 0
            server.core.advance(ready)
            self.after(server)

    def _push(self, server: SimServer) -> None:
        core = server.core
        peers = list(core.progress)
        if self.chance(self.habits.looks / 10):  # so do links to those who get nothing
            peers += [name for name in self.servers if name not in core.progress]
        for peer in peers:
            if self.chance(self.weather.late):
                continue
            # A link looks by itself, or is told to.
            if not self.chance(self.habits.looks):
                commit_due = None if self.chance(self.habits.commits_told) else 0
                if not core.wants_append(peer, commit_due):
                    continue
            while peer not in server.reading:
                append = server.core.append_for(peer)
                if append is None:
                    break
                if isinstance(append, SnapshotDue):
                    self.say(f"{server.name} has no entry {append.needed_index} for {peer}")
                    server.core.snapshot_started(peer)
                    self.at(self._sync_ticks(), self._open_state, server, peer, server.core.term)
                elif isinstance(append, EntriesOnDisk):
                    self.counts["entries on disk"] += 1
                    server.reading.add(peer)
                    self.at(self._sync_ticks(), self._read_disk, server, peer, append)
                else:
                    self._send(server, append)

    def _read_disk(self, server: SimServer, peer: MemberId, wanted: EntriesOnDisk) -> None:
        if not server.up or self.sleeps(server, self._read_disk, server, peer, wanted):
            return
        entries = server.disk.read(wanted.first, wanted.last, self.config.append_bytes_max)
        ticks = self.rng.uniform(0, 20) if self.chance(self.weather.slow_read) else 0
        self.at(ticks, self._send_read, server, peer, entries)

    def _send_read(self, server: SimServer, peer: MemberId, entries: list[Entry]) -> None:
        if not server.up or self.sleeps(server, self._send_read, server, peer, entries):
            return
        server.reading.discard(peer)
        append = server.core.append_with(peer, entries)
        if append is None:
            self.counts["read in vain"] += 1
        else:
            self._send(server, append)
        self.after(server)

    def _apply(self, server: SimServer) -> None:
        first = server.applied_index + 1
        entries = server.core.entries_to_apply(first, self.apply_bytes)
        if entries is None:
            last = min(server.core.commit_index, server.core.log.stable_index)
            entries = tuple(server.disk.read(first, last, self.apply_bytes))
            self.counts["applied from disk"] += 1
        for entry in entries:
            self.invariants.before_apply(server, entry)
            reply: Reply = None
            if entry.kind is EntryKind.COMMAND:
                reply = server.store.apply(entry.index, entry.data)
            else:
                server.store.skip(entry.index)
            self.invariants.after_apply(server, entry)
            self.clients.on_applied(server, entry, reply)
        server.core.applied_to(server.applied_index)
        if entries and not server.applying and server.applied_index < server.core.commit_index:
            server.applying = True
            self.at(APPLY_TICKS, self._apply_on, server)

    def _apply_on(self, server: SimServer) -> None:
        if server.up and not self.sleeps(server, self._apply_on, server):
            server.applying = False
            self._apply(server)

    # ---- States, saved and sent ----

    def _next_step(self, server: SimServer, step: Callable[..., None], *args: object) -> None:
        """Do this when the disk is done, unless the server crashes just before it."""
        ticks = self._sync_ticks()
        if self.chance(self.weather.slow_step):
            ticks += self.rng.uniform(1, self.weather.slow_ticks)  # a big state
        self.at(ticks, step, *args)
        if self.chance(self.weather.step_crash):
            self.at(self.rng.uniform(0, ticks), self.crash_for_a_while, server)

    def _save(self, server: SimServer) -> None:
        """Like state-flusher: write down how far the state machine is; then shorten the log."""
        if not server.up or self.sleeps(server, self._save, server):
            return
        self.at(self.pause(self.save_ticks), self._save, server)
        index = server.applied_index
        is_due = index > server.disk.state.snapshot.index and not server.audit.trouble
        if is_due and not (server.saving or server.installing):
            membership_index, members = server.core.membership_at(index)
            snapshot = Snapshot(index, server.core.log.term_at(index), members, membership_index)
            state = SimState(snapshot, tuple(server.applied))
            # Some rows are taken now, the others when entries have been applied meanwhile.
            flush = server.store.begin_flush()
            slices = flush.slices(nullcontext(), rows_max=2)
            taken = list(islice(slices, self.rng.randint(0, 3)))
            server.saving = flush
            self._next_step(server, self._saved, server, state, flush, chain(taken, slices))

    def _saved(
        self, server: SimServer, state: SimState, flush: Flush, slices: Iterable[Slice]
    ) -> None:
        if not server.up or self.sleeps(server, self._saved, server, state, flush, slices):
            return
        if server.saving is not flush or self._fails_to_sync(server):
            return
        if self.chance(self.weather.sync_error * 10):  # such an error is not fatal: sqlite's
            self._end_saving(server, saved=False)
            return
        rows = server.disk.state.rows.with_slices(flush, slices)
        self._end_saving(server, saved=True)
        state = state._replace(rows=rows)
        self.invariants.on_save(server, state)
        server.disk.save(state)
        self.counts["states saved"] += 1
        # What is being sent to a follower must meet the log, which may end before the state, if the
        # others committed faster than this disk wrote. And drops go by whole segments of 3.
        needed = [sending.index for sending in server.sending.values()]
        covered = min(state.snapshot.index, server.core.log.stable_index)
        first = min([covered - self.tail_entries, *needed]) // 3 * 3 + 1
        if first > server.disk.base[0] + 1:
            self.say(f"{server.name} drops its log before {first}, state at {state.snapshot.index}")
            server.disk.drop_before(first)
            self._next_step(server, self._compacted, server, first)

    def _end_saving(self, server: SimServer, *, saved: bool) -> None:
        if server.saving is not None:
            server.saving = None
            server.store.end_flush(saved=saved)
            self.counts["flushes given up"] += not saved

    def _compacted(self, server: SimServer, first: int) -> None:
        if server.up and not self.sleeps(server, self._compacted, server, first):
            self.counts["logs compacted"] += 1
            server.core.compacted_to(first)
            self.after(server)

    def send_needless_state(self, server: SimServer, peer: MemberId) -> None:
        """To one that does not need it (any more): a state may come at any time."""
        idle = peer in server.core.progress and peer not in server.sending
        if idle and server.disk.state.snapshot.index > 0:
            self._open_state(server, peer, server.core.term)

    def _open_state(self, server: SimServer, peer: MemberId, term: int) -> None:
        if not server.up or self.sleeps(server, self._open_state, server, peer, term):
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
        self.at(CHUNK_RETRY_TICKS, self._repeat_chunk, *args)

    def _repeat_chunk(
        self, server: SimServer, peer: MemberId, sending: Sending, seen: int, retries: int
    ) -> None:
        """Send the chunk at ``seen`` again if the transfer has not gone on since."""
        args = (server, peer, sending, seen, retries)
        if not server.up or self.sleeps(server, self._repeat_chunk, *args):
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
        self.after(server)

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
        if chunk.term != server.core.term:
            server.core.answer_chunk(chunk, 0, SnapshotOutcome.REFUSED)  # which it does not send
            return
        if server.installing:
            # Answered when that state is installed; one of another transfer is not.
            assert server.last_chunk is not None
            if server.last_chunk.snapshot_id == chunk.snapshot_id:
                server.last_chunk = chunk
            return
        result = server.receiving.take(chunk, self.invariants.entries_of(chunk.snapshot_id))
        if not isinstance(result, SimState):
            server.core.answer_chunk(chunk, *result)
        elif result.snapshot.index <= server.core.commit_index:
            server.core.answer_chunk(chunk, 0, SnapshotOutcome.INSTALLED)
        else:
            self._end_saving(server, saved=False)
            server.installing = "a state received"
            server.last_chunk = chunk
            self._next_step(server, self._install, server, result)

    def _install(self, server: SimServer, state: SimState) -> None:
        """The state is whole and synced: put it in the place of the server's own."""
        if server.up and not self.sleeps(server, self._install, server, state):
            self.invariants.on_save(server, state)
            server.disk.save(state)
            server.installing = "a state in place"
            self._next_step(server, self._restore, server, state)

    def _restore(self, server: SimServer, state: SimState) -> None:
        """It is in place: load it."""
        if server.up and not self.sleeps(server, self._restore, server, state):
            self.say(f"{server.name} restores the state at {state.snapshot.index}")
            assert server.last_chunk is not None
            server.installing = ""
            server.core.restore(state.snapshot)
            self.invariants.on_restore(server, state)
            server.core.answer_chunk(server.last_chunk, 0, SnapshotOutcome.INSTALLED)
            self.after(server)

    # ---- The network ----

    def _send(self, server: SimServer, message: Message) -> None:
        self.invariants.on_send(server, message)
        if self.network.is_cut(message.sender, message.to) or self.chance(self.weather.drop):
            self.counts["lost"] += 1
            return
        copies = 1
        if self.chance(self.weather.duplicate):
            copies = 2
            self.counts["duplicated"] += 1
        for _ in range(copies):
            delay = self.delay()
            self.last_arrival = max(self.last_arrival, self.now + delay)
            self.at(delay, self._deliver, message)

    def send_reports(self, server: SimServer, reports: Iterable[HashReport]) -> None:
        """Those that compare states, which promise nothing."""
        for report in reports:
            self._send(server, report)

    def _deliver(self, message: Message) -> None:
        server = self.servers.get(message.to)
        if server is None or self.sleeps(server, self._deliver, message):
            return
        if self.tracing:
            self.say(describe(message))
        if isinstance(message, HashReport):
            self.audits.on_report(server, message)
            self.after(server)
            return
        self.invariants.before_step(server, message)
        server.core.step(message)
        if isinstance(message, SnapshotChunk):
            self._on_chunk(server, message)
        elif isinstance(message, SnapshotReply):
            self._on_snapshot_reply(server, message)
        self.after(server)

    def _on_mended(self, name: MemberId) -> None:
        if name in self.servers:
            self._connect(self.servers[name], self.habits.links_up)

    def heal(self) -> None:
        """All links work again; some connections are new."""
        self.network.heal()
        for server in list(self.servers.values()):
            self._connect(server, self.habits.links_up)

    # ---- Crashes ----

    def crash_for_a_while(self, server: SimServer) -> None:
        """It comes back later."""
        if server.up and self.weather is not CALM:
            self.crash(server)
            self.at(self.rng.uniform(0.1, 40), self.restart, server.name)

    def restart(self, name: MemberId) -> None:
        """What has crashed comes back, unless it has none to come back to, or stays away."""
        gone = self.retired | self.members.lost | self.away
        if name not in self.servers and name not in gone:
            self.start_server(name)

    def crash(self, server: SimServer) -> None:
        """All that was in memory is gone, and perhaps what was not synced."""
        self.counts["crashes"] += 1
        self.clients.leadership_lost(server)
        server.up = False
        del self.servers[server.name]
        if server.installing:
            self.counts[f"crash with {server.installing}"] += 1
        fate = "nothing" if server.unsynced is None else self._lose_power(server, server.unsynced)
        self.say(f"{server.name} crashes; of what was not synced: {fate}")
        for other in self.servers.values():
            if self.chance(self.weather.evidence):
                self.at(self.rng.uniform(0.1, 5), self.hear_of_death, other, server.name)

    def _lose_power(self, server: SimServer, ready: Ready) -> str:
        """What was written and not synced is on the disk now, or not, or in part; which of them."""
        disk = server.disk
        hard_state, entries = ready.hard_state, ready.entries
        if ready.log_base is not None:
            self.counts["crash with a log to empty"] += 1
            done = self.rng.randrange(3)  # of the driver's steps, of which a reset is the second
            if done > 0:
                disk.append(hard_state, ())
            if done > 1:
                disk.reset(*ready.log_base)
            hard_state = hard_state if done == 0 else None
            entries = entries if done > 1 else ()
        if hard_state is None and not entries:
            return "nothing"
        fate = self.rng.choice(("lost", "kept in part", "kept", "torn"))
        if fate == "torn":
            # One record, which the log's reader must find to be whole or torn, and never damaged.
            if not is_torn((hard_state, entries), self.rng):
                fate = "torn, but whole"
                disk.append(hard_state, entries)
        elif fate != "lost":
            # Of a long write, the first records.
            kept = len(entries) if fate == "kept" else self.rng.randint(0, len(entries))
            disk.append(hard_state, entries[:kept])
        self.counts[f"write {fate}"] += 1
        return fate

    def hear_of_death(self, server: SimServer, dead: MemberId) -> None:
        """The server has evidence, right or wrong, that the other's process is gone."""
        if server.up and not self.sleeps(server, self.hear_of_death, server, dead):
            self.counts["evidence"] += server.core.leader_id == dead
            server.has_evidence = True
            server.core.leader_died(dead)
            self.after(server)
