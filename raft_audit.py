"""Do all nodes hold the same state? Their hashes are compared while they run (promise G6).

The leader asks everyone for the state hash at an index that it has applied; each answers when it
gets there. Where a majority of the voters agrees and someone differs, the leader tells everyone,
and who differs stops serving: it may be the leader itself. Where no majority agrees nobody can be
believed, and the leader stops serving.

Pure: no I/O, no clock. ``raft_node.py`` calls it with its lock held, and carries the reports.
"""

from __future__ import annotations

from collections.abc import Iterable

from raft_types import HashReport, MemberId, Membership


class StateAudit:
    """One node's part in the comparison."""

    def __init__(self, me: MemberId) -> None:
        self._me = me
        # Why this node must not serve, for a person; set once.
        self.trouble = ""
        self.finding = ""  # of the leader: whose states differ, for a person
        self.question: HashReport | None = None  # the leader's last, not yet answered
        self._own = (0, 0)  # (index, hash) that this node last asked or answered with
        self._answers: dict[MemberId, int] = {}  # of the leader: to its last question

    def ask(
        self, term: int, peers: Iterable[MemberId], index: int, state_hash: int
    ) -> list[HashReport]:
        """As leader: the question to every peer."""
        self.question = None
        self._own = (index, state_hash)
        self._answers = {self._me: state_hash}
        return [HashReport(self._me, peer, term, index, state_hash, False) for peer in peers]

    def answer(self, applied_index: int, hash_there: int | None) -> list[HashReport]:
        """As follower: the answer, once this node has applied the index that is asked about.

        ``hash_there`` is None if the hash there is not known any more.
        """
        question = self.question
        if question is None or question.applied_index > applied_index:
            return []
        self.question = None
        if hash_there is None:
            return []
        index = question.applied_index
        self._own = (index, hash_there)
        return [HashReport(self._me, question.sender, question.term, index, hash_there, False)]

    def on_report(
        self, report: HashReport, membership: Membership, *, leads: bool
    ) -> list[HashReport]:
        """Take in a peer's report of the present term; afterwards look at ``trouble``."""
        if leads:
            return self._on_answer(report, membership)
        if report.is_verdict:
            self._judge(report.applied_index, report.state_hash)
        else:
            self.question = report
        return []

    def _on_answer(self, report: HashReport, membership: Membership) -> list[HashReport]:
        index = self._own[0]
        if report.applied_index != index:
            return []  # to an older question
        self._answers[report.sender] = report.state_hash
        if len(set(self._answers.values())) == 1:
            if len(self._answers) == len(membership.members):
                self.finding = ""
            return []
        for value in set(self._answers.values()):
            if membership.has_quorum(m for m, answer in self._answers.items() if answer == value):
                self._judge(index, value)
                names = ", ".join(
                    member.node_id
                    for member in membership.members
                    if self._answers.get(member.member_id, value) != value
                )
                self.finding = f"the state of {names} differs from the majority's"
                return [
                    HashReport(self._me, member.member_id, report.term, index, value, True)
                    for member in membership.members
                    if member.member_id != self._me
                ]
        if all(voter in self._answers for voter in membership.voters):
            self._stop_serving(
                f"the nodes' states differ at index {index} and no majority agrees",
                "restore a backup into a new cluster",
            )
        return []

    def _judge(self, index: int, state_hash: int) -> None:
        if self._own[0] == index and self._own[1] != state_hash:
            self._stop_serving(
                f"this node's state differs from the majority's at index {index}",
                "keep a copy of its directory for a report, and let it come back empty "
                "(cluster_manager.py --action replace)",
            )

    def _stop_serving(self, why: str, advice: str) -> None:
        self.trouble = self.trouble or f"{why}: it no longer serves; {advice}"
