"""What goes wrong in a simulated cluster, and how often: drawn anew for each seed (swarm testing).

Rule 1: a kind of fault has a name, by which it can be left out: ``simulator.py --without``.
Rule 2: chance decides which kinds a seed has at all; a fault that is always there hides others.

Source: F1 to F13 of the fault model; Groce and others, "Swarm testing", 2012.
Used by ``sim_cluster.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from raft_core import NotLeaderError, TransferRefusedError
from raft_types import MemberId
from tests.sim_world import CALM, HOUR_MS, SimClock

if TYPE_CHECKING:
    from tests.sim_cluster import SimServer, Simulation


FAULTS = {  # with how often each comes, compared with the others
    "crash": 4,
    "crash-all": 1,
    "isolate": 4,
    "cut": 4,
    "heal": 8,
    "mistake": 2,
    "differ": 1,
    "pause": 4,
    "stall": 2,
    "clock": 1,
    "transfer": 4,
    "remove": 3,
    "move": 2,
    "mistype": 1,
    "wipe": 1,
    "needless": 2,
}


class Faults:
    """The kinds of faults of one seed, and when the next one comes."""

    def __init__(self, cluster: Simulation, without: Collection[str]) -> None:
        self._cluster = cluster
        kinds: dict[str, Callable[[], None]] = {
            "crash": self._crash_one,
            "crash-all": self._crash_all,
            "isolate": self._isolate_leader,
            "cut": self._cut,
            "heal": cluster.heal,
            "mistake": self._mistake_for_dead,
            "differ": self._differ,
            "pause": self._pause_one,
            "stall": self._stall_disk,
            "clock": self._set_clock,
            "transfer": self._transfer,
            "remove": cluster.members.remove_one,
            "move": cluster.members.move_one,
            "mistype": cluster.members.mistype_address,
            "wipe": cluster.members.wipe_one,
            "needless": self._send_needless_state,
        }
        rng = cluster.rng
        # What heals stays; of the others each seed leaves out some, and has some more often.
        drawn = {name: rng.choice((0, 1, 1, 3)) if name != "heal" else 1 for name in kinds}
        if cluster.config.learner_ticks_max > 1000:
            drawn["mistype"] = 0  # it would be given up only long after the history's end
        self._kinds = {
            name: (fault, FAULTS[name] * drawn[name])
            for name, fault in kinds.items()
            if drawn[name] and name not in without
        }

    def start(self) -> None:
        """From now on faults come, in each storm."""
        if self._kinds and not self._cluster.is_over:
            self._cluster.at(self._cluster.pause(self._cluster.storm.fault_ticks), self._next)

    def _next(self) -> None:
        cluster = self._cluster
        if cluster.weather is not CALM:
            self._strike()
        self.start()

    def _strike(self) -> None:
        cluster = self._cluster
        weights = [weight for _, weight in self._kinds.values()]
        ((name, (fault, _)),) = cluster.rng.choices([*self._kinds.items()], weights)
        cluster.counts[f"fault {name}"] += 1
        fault()

    def _some_server(self) -> SimServer | None:
        """A leader more often than not: there lies the danger."""
        cluster = self._cluster
        leaders = cluster.leaders()
        strikes_leader = bool(leaders) and cluster.chance(cluster.habits.picks_leader)
        few = leaders if strikes_leader else list(cluster.servers.values())
        return cluster.rng.choice(few) if few else None

    # ---- Servers ----

    def _crash_one(self) -> None:
        server = self._some_server()
        if server is not None:
            self._cluster.crash_for_a_while(server)

    def _crash_all(self) -> None:
        cluster = self._cluster
        for server in list(cluster.servers.values()):
            cluster.crash(server)
            cluster.at(cluster.rng.uniform(0.1, 20), cluster.restart, server.name)

    def _mistake_for_dead(self) -> None:
        for server in list(self._cluster.servers.values()):
            if server.core.leader_id is not None:
                self._cluster.hear_of_death(server, server.core.leader_id)

    def _differ(self) -> None:
        """The state of one or two is not what the log makes of it."""
        for _ in range(self._cluster.rng.choice((1, 1, 2))):
            server = self._some_server()
            if server is not None:
                self._cluster.audits.lie(server)

    def _pause_one(self) -> None:
        """A leader that sleeps while another is elected, and wakes up believing it leads."""
        cluster, server = self._cluster, self._some_server()
        if server is not None:
            ticks = cluster.rng.uniform(1, 3 * cluster.config.election_ticks_max)
            cluster.say(f"{server.name} sleeps for {ticks:.1f}")
            cluster.counts["pauses"] += 1
            server.asleep_until = cluster.now + ticks
            cluster.clients.ask_at_once(server.name, ticks)

    def _stall_disk(self) -> None:
        """Its next sync takes as long as it takes others to elect a leader, or longer."""
        server = self._some_server()
        if server is not None:
            ticks = self._cluster.rng.uniform(5, 3 * self._cluster.config.election_ticks_max)
            self._cluster.say(f"the disk of {server.name} hangs for {ticks:.1f}")
            server.disk_hangs_until = self._cluster.now + ticks

    def _set_clock(self) -> None:
        """A wall clock jumps (F9)."""
        server = self._some_server()
        if server is not None:
            server.clock = SimClock(self._cluster.rng)
            server.clock.skew_ms += self._cluster.rng.choice((0, HOUR_MS, -HOUR_MS))

    # ---- Links ----

    def _isolate_leader(self) -> None:
        server = self._some_server()
        if server is not None:
            self._cluster.network.isolate(server.name, self._cluster.disks, self._cut_ticks())

    def _cut(self) -> None:
        self._cluster.network.break_somehow(list(self._cluster.servers), self._cut_ticks())

    def _cut_ticks(self) -> float:
        return self._cluster.rng.uniform(1, self._cluster.weather.cut_ticks)

    def _send_needless_state(self) -> None:
        """To one that does not need it (any more): a state may come at any time."""
        for leader in self._cluster.leaders():
            self._cluster.send_needless_state(leader, self._cluster.rng.choice(self._names()))

    def _names(self) -> list[str]:
        return list(self._cluster.disks)

    # ---- Leadership ----

    def _transfer(self) -> None:
        """To whoever is furthest, or to any: also one that lags, is dead, or has no vote.

        Sometimes in a loop, each new leader handing over at once (F13).
        """
        self._transfer_times(self._cluster.rng.choice((1, 1, 5)))

    def learner_added(self) -> None:
        """Sometimes the leadership is handed over just when it becomes ready for its vote."""
        if "transfer" in self._kinds and self._cluster.chance(
            self._cluster.habits.hands_over_at_once
        ):
            self._cluster.at(self._cluster.rng.uniform(0, 15), self._transfer_times, 1)

    def hand_over_to_one_of(self, leaving: set[MemberId]) -> None:
        """To somebody who is just about to be gone; the leader must give that up."""
        if "transfer" in self._kinds and leaving:
            for leader in self._cluster.leaders():
                self._hand_over(leader, self._cluster.rng.choice(sorted(leaving)))

    def _hand_over(self, leader: SimServer, target: MemberId | None) -> None:
        cluster = self._cluster
        try:
            leader.core.transfer_to(target)
        except (TransferRefusedError, NotLeaderError):
            cluster.counts["transfers refused"] += 1
            return
        cluster.say(f"{leader.name} hands over to {leader.core.transfer_target}")
        cluster.counts["transfers"] += 1
        cluster.counts["transfers to the dead"] += (
            leader.core.transfer_target not in cluster.servers
        )
        cluster.after(leader)

    def _transfer_times(self, times: int) -> None:
        cluster = self._cluster
        if cluster.weather is CALM or times == 0:
            return
        anyone = cluster.rng.choices([*cluster.servers.values()]) if cluster.servers else []
        for leader in anyone if cluster.chance(cluster.habits.picks_anyone) else cluster.leaders():
            self._hand_over(leader, cluster.rng.choice((None, *self._names())))
        cluster.at(cluster.rng.uniform(1, 12), self._transfer_times, times - 1)
