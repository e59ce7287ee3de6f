"""The comparison of states in a simulated cluster, by the node's own ``raft_audit.py`` (G6).

Rule 1: all states are equal, which the invariants see to; a server that is to differ only says so.
Rule 2: nobody is stopped who did not differ, whatever is lost, late, repeated or restarted, as
long as those who do not differ are a majority.

Used by ``sim_cluster.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raft_types import HashReport, MemberId, Role

if TYPE_CHECKING:
    from tests.sim_cluster import SimServer, Simulation

# Until somebody restarts a server that serves no more.
RESTART_TICKS = 40
# As late as a report may come.
LATE_TICKS = 100


class Audits:
    """The driver's part in the comparison, for all servers."""

    def __init__(self, cluster: Simulation) -> None:
        self._cluster = cluster
        self._ask_ticks = cluster.rng.choice((10, 60))
        self._differed_at: dict[MemberId, float] = {}  # when it did last

    def lie(self, server: SimServer) -> None:
        """From now on this server's state differs, as far as others can see; only a restart helps."""
        self._cluster.say(f"the state of {server.name} differs")
        server.lie = self._cluster.rng.choice((1, 1, 2))  # often several in the same way

    def compare(self, server: SimServer) -> None:
        """As the driver does from time to time: ask the others, as leader, or answer."""
        core, audit, question = server.core, server.audit, server.audit.question
        if server.lie:
            self._differed_at[server.name] = self._cluster.now
        applied_index, reports = server.applied_index, []
        if core.role is Role.LEADER:
            if self._cluster.now >= server.next_audit:
                server.next_audit = self._cluster.now + self._ask_ticks
                state_hash = server.store.state_hash ^ server.lie
                reports = audit.ask(core.term, core.progress, applied_index, state_hash)
        elif question is not None:
            there = server.store.hash_at(question.applied_index)
            reports = audit.answer(applied_index, None if there is None else there ^ server.lie)
        self._cluster.send_reports(server, reports)

    def on_report(self, server: SimServer, report: HashReport) -> None:
        """A peer's question, answer or verdict has come."""
        core, audit, counts = server.core, server.audit, self._cluster.counts
        if report.term != core.term:
            return
        was_well, leads = not audit.trouble, core.role is Role.LEADER
        counts["states compared"] += leads and report.applied_index == audit._own[0]
        self._cluster.send_reports(server, audit.on_report(report, core.membership, leads=leads))
        if audit.trouble and was_well:
            self._cluster.say(f"{server.name} serves no more: {audit.trouble}")
            counts["differing states found"] += 1
            if not server.lie:
                counts["stopped by a majority that differs"] += 1
                misled = self._is_misled(server)
                text = f"G6: {server.name} is stopped without a cause"
                self._cluster.invariants.require(misled, text)
            core.step_down()
            self._cluster.at(RESTART_TICKS, self._restart, server)

    def _is_misled(self, server: SimServer) -> bool:
        """Whether those who do not differ are no majority."""
        cluster = self._cluster
        lately = cluster.now - LATE_TICKS
        differ = [name for name, at_ticks in self._differed_at.items() if at_ticks >= lately]
        # The leader may know of other members than this server.
        return any(
            not members.has_quorum(voter for voter in members.voters if voter not in differ)
            for members in (other.core.membership for other in cluster.servers.values())
        )

    def _restart(self, server: SimServer) -> None:
        if server.up:
            self._cluster.crash(server)
            self._cluster.restart(server.name)
