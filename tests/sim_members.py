"""Members that come and go in a simulated cluster: joins, removals, moves, servers that lose their disks.

Rule: whoever runs the cluster does nothing that must end it: no server's disk is lost while the
others could not go on without it. All else is tried at any time.

Used by ``sim_cluster.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from raft_core import MembershipChangeRefusedError, NotLeaderError
from raft_types import VOTERS_MAX, EntryKind, Member, MemberId, Membership
from tests.raft_servers import SimDisk, member
from tests.sim_world import CALM

if TYPE_CHECKING:
    from tests.sim_cluster import SimServer, Simulation

ASK_AGAIN_TICKS = 7


class Members:
    """Who runs the cluster, and the servers that ask to be let in."""

    def __init__(self, cluster: Simulation, may_join: bool) -> None:
        self._cluster = cluster
        self._may_join = may_join
        self._admitted: set[MemberId] = set()  # who was told so
        self.count = 0  # of those who came after the founders
        self.lost: set[MemberId] = set()  # whose disks are gone, and who are to be removed

    # ---- Joining ----

    def start(self) -> None:
        """Perhaps some come by themselves."""
        for _ in range(self._cluster.rng.choice((0, 0, 2))):
            self._cluster.at(self._cluster.rng.uniform(0, 250), self.join_next)

    def join_next(self) -> None:
        """Another server comes, with an empty disk and an id of its own."""
        cluster = self._cluster
        there = cluster.disks.keys() - cluster.retired - self.lost
        if cluster.weather is CALM or not self._may_join or len(there) >= VOTERS_MAX:
            return
        self.count += 1
        letter = chr(ord("f") + (self.count - 1) % 20)
        name = letter if self.count <= 20 else f"{letter}{(self.count - 1) // 20}"
        stays_learner = cluster.chance(cluster.habits.stays_learner)
        newcomer = member(name, voter=False, stays_learner=stays_learner)
        cluster.disks[name] = SimDisk(Membership())
        cluster.start_server(name)
        self._join(newcomer)

    def _join(self, newcomer: Member) -> None:
        """It asks whoever leads to be added, until it hears that it was."""
        cluster, name = self._cluster, newcomer.member_id
        server = cluster.servers.get(name)
        if server is not None and name in cluster.invariants.removed:
            cluster.retire(server)  # dropped before it had heard; an id never comes back
            return
        if server is not None and cluster.now >= server.asleep_until:
            for leader in cluster.leaders():
                self._ask_to_join(leader, newcomer)
        if name not in self._admitted and name not in cluster.retired:
            cluster.at(ASK_AGAIN_TICKS, self._join, newcomer)

    def tell_if_removed(self, server: SimServer) -> bool:
        """It has belonged to nobody for long, and asks the others; if it was removed, it ends.

        Only one that no log can tell, since it never got the entry that added it, or does not ask
        who leads now for a vote: the others must hear it by their logs.
        """
        cluster, name = self._cluster, server.name
        for leader in cluster.leaders():
            is_member = server.core._memberships.admitted_index is not None
            if is_member and server.core.membership.is_voter(leader.name):
                continue
            is_cut = cluster.network.is_cut(name, leader.name)
            _, members = leader.core.membership_at(leader.core.commit_index)
            if name in cluster.invariants.removed and not is_cut and members.get(name) is None:
                cluster.retire(server)
                return True
        return False

    def _ask_to_join(self, leader: SimServer, newcomer: Member) -> None:
        core, name = leader.core, newcomer.member_id
        _, members = core.membership_at(core.commit_index)
        is_new = core.membership.get(name) is None and self._has_room(leader)
        if members.get(name) is not None:
            self._admitted.add(name)
        elif is_new and self._change(leader, partial(core.add_learner, newcomer)):
            self._cluster.counts["joins"] += 1
            self._cluster.say(f"{leader.name} adds {name} as a learner")
            self._cluster.faults.learner_added()

    @staticmethod
    def _has_room(leader: SimServer) -> bool:
        return len(leader.core.membership.members) < VOTERS_MAX

    def mistype_address(self) -> None:
        """A learner that is nowhere: it must be dropped, or the cluster never comes to rest."""
        self.count += 1
        for leader in self._cluster.leaders()[:1]:
            nobody = member(f"nobody{self.count}", voter=False)
            if self._has_room(leader) and self._change(
                leader, partial(leader.core.add_learner, nobody)
            ):
                self._cluster.counts["addresses mistyped"] += 1

    # ---- Leaving ----

    def remove_one(self) -> None:
        """Any member, which may be the leader; another server often comes for it."""
        cluster = self._cluster
        anyone = [s for s in cluster.servers.values() if s.core.membership.members]
        asks_anyone = cluster.chance(cluster.habits.picks_anyone)
        for leader in anyone if asks_anyone else cluster.leaders():
            core = leader.core
            name = cluster.rng.choice(core.membership.members).member_id
            if self.lost or core.membership.objection_to_leaving(name):
                continue
            if self._change(leader, partial(core.remove_member, name)):
                cluster.counts["leader removes itself"] += name == leader.name
                cluster.counts["removals"] += 1
                cluster.say(f"{leader.name} removes {name}")
                if cluster.chance(cluster.habits.is_replaced):
                    cluster.at(cluster.rng.uniform(0, 60), self.join_next)

    def move_one(self) -> None:
        """A member gets another address."""
        for leader in self._cluster.leaders():
            core = leader.core
            moved = self._cluster.rng.choice(core.membership.members)
            moved = moved._replace(port=moved.port + 1)
            if self._change(leader, partial(core.change_member, moved)):
                self._cluster.counts["moves"] += 1

    def wipe_one(self) -> None:
        """A server's disk is gone: its member never comes back, a new one takes its place."""
        cluster = self._cluster
        name = cluster.rng.choice(sorted(cluster.disks))
        if self.lost or name in cluster.retired or not self.can_do_without({name}):
            return
        server = cluster.servers.get(name)
        if server is not None:
            cluster.crash(server)
        cluster.say(f"{name} has lost its disk")
        cluster.counts["disks lost"] += 1
        self.lost.add(name)
        self._remove_lost(name)
        self.join_next()

    def can_do_without(self, names: set[MemberId]) -> bool:
        """Whether the others are a majority, whichever membership may be in force.

        Also should those of them who are learners just now get their votes.
        """
        cluster = self._cluster
        gone = names | cluster.retired | self.lost
        committed = cluster.invariants.committed
        settled_index = max(
            (e.index for e in committed if e.kind is EntryKind.MEMBERSHIP), default=0
        )
        memberships = [s.core.membership for s in cluster.servers.values()]
        for disk in cluster.disks.values():
            memberships += [
                Membership.decode(e.data)
                for e in disk.found()
                if e.kind is EntryKind.MEMBERSHIP and e.index >= settled_index
            ]
        for members in memberships:
            voters = set(members.voters)
            learners = {m.member_id for m in members.members} - voters
            if members.members and 2 * len(voters - gone) <= len(voters | (learners & gone)):
                return False
        return True

    def _remove_lost(self, name: MemberId) -> None:
        cluster = self._cluster
        for leader in cluster.leaders():
            core = leader.core
            if core.membership.get(name) is not None:
                self._change(leader, partial(core.remove_member, name))
        if name in cluster.invariants.removed:
            self.lost.discard(name)
            cluster.retired.add(name)
        else:
            cluster.at(ASK_AGAIN_TICKS, self._remove_lost, name)

    def _change(self, leader: SimServer, change: Callable[[], int]) -> bool:
        try:
            change()
        except (MembershipChangeRefusedError, NotLeaderError):
            self._cluster.counts["change refused"] += 1
            return False
        self._cluster.after(leader)
        return True
