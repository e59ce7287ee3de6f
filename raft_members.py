"""Whom a leader replicates to, and what it does about members that time makes ready or gives up.

Rule 1: no server that may not be there decides whether the others go on. So a learner votes once
it has caught up and is heard of, one that is never heard of is dropped, and no change is made
after which too few of the voters answer (thesis 4.1 and 4.2, raft-traps T63).
Rule 2: a server that was removed is told so, by the log itself, or it would wait for ever.

Carved out of ``raft_core.py``, the only caller. No I/O.
"""

from __future__ import annotations

from raft_progress import Progress
from raft_types import Member, MemberId, Membership, RaftConfig, Room


class Followers:
    """All who receive the log in the current leadership; times are the leader's ticks."""

    def __init__(self, member_id: MemberId, config: RaftConfig, notices: list[str]) -> None:
        """``notices``: what a person should know is added to it."""
        self._member_id = member_id  # the leader
        self._config = config
        self.progress: dict[MemberId, Progress] = {}
        # Those of them who are no members, until when they are told, and their match index then.
        self._outsiders: dict[MemberId, tuple[int, int]] = {}
        self._notices = notices

    def clear(self) -> None:
        """The leadership is over, or begins."""
        self.progress.clear()
        self._outsiders.clear()

    def follow(self, membership: Membership, last_index: int, now_ticks: int) -> None:
        """These are the members from now on."""
        for member in membership.members:
            self._outsiders.pop(member.member_id, None)
            if member.member_id != self._member_id:
                self._add(member.member_id, last_index, now_ticks)
        for member_id in self.progress:
            if membership.get(member_id) is None and member_id not in self._outsiders:
                self.tell_longer(member_id, now_ticks)

    def _add(self, member_id: MemberId, last_index: int, now_ticks: int) -> None:
        if member_id not in self.progress:
            self.progress[member_id] = Progress(last_index + 1, now_ticks)

    def tell_outsider(self, member_id: MemberId, last_index: int, now_ticks: int) -> None:
        """Who is no member speaks to us: it was one and does not know, or will be one soon."""
        self._add(member_id, last_index, now_ticks)
        self.tell_longer(member_id, now_ticks)

    def tell_longer(self, member_id: MemberId, now_ticks: int) -> None:
        """This outsider gets the log for another while."""
        until_ticks = now_ticks + 2 * self._config.election_ticks_max
        self._outsiders[member_id] = (until_ticks, self.progress[member_id].match_index)

    def forget_outsiders(self, membership_index: int, now_ticks: int) -> None:
        """Stop sending to those who have had the time to get the entry that tells them."""
        for member_id, (until_ticks, match_before) in list(self._outsiders.items()):
            progress = self.progress[member_id]
            if now_ticks < until_ticks or progress.is_receiving_snapshot:
                continue
            if match_before < progress.match_index < membership_index:
                self.tell_longer(member_id, now_ticks)  # far behind, and on its way
            else:
                del self._outsiders[member_id], self.progress[member_id]

    def answering(self, now_ticks: int) -> list[MemberId]:
        """The leader, and whom it has heard within the minimum election timeout."""
        oldest = now_ticks - self._config.election_ticks_min
        heard = [m for m, progress in self.progress.items() if progress.heard_ticks > oldest]
        return [self._member_id, *heard]

    def failures_tolerated(self, membership: Membership, now_ticks: int) -> int:
        """How many of the voters that answer may fail with a majority left."""
        serving = [
            member_id
            for member_id in self.answering(now_ticks)
            if membership.is_voter(member_id)
            and (member_id == self._member_id or not self.progress[member_id].has_lost)
        ]
        return max(0, len(serving) - membership.quorum)

    def room(self, membership: Membership, own: Room) -> Room:
        """What a majority of the disks has left, and the leader's ``own``."""
        left = {member: Room.NONE - progress.room for member, progress in self.progress.items()}
        left[self._member_id] = Room.NONE - own
        return max(own, Room(Room.NONE - membership.majority_index(left)))

    def note_loss(self, member_id: MemberId, membership: Membership) -> None:
        """This follower lacks what it acknowledged; that it does must not be counted on again.

        Its match index stays (raft-traps T29), so that it gets no more in this leadership: a vote
        of a server that forgets may lose what is committed.
        """
        progress = self.progress[member_id]
        if not progress.has_lost and (member := membership.get(member_id)) is not None:
            progress.has_lost = True
            self._notices.append(_loss(member))

    def troubles(self, membership: Membership) -> list[str]:
        """Which members have lost what they acknowledged, for a person."""
        return [
            _loss(member)
            for member in membership.members
            if (progress := self.progress.get(member.member_id)) is not None and progress.has_lost
        ]

    # ---- Changes of membership ----

    def objection_to(self, changed: Membership, now_ticks: int) -> str:
        """Why the voters after this change could not go on, for a person; "" if they could.

        The change is in force at once; without a majority it could neither be committed nor taken
        back.
        """
        answering = self.answering(now_ticks)
        if changed.has_quorum(answering):
            return ""
        count = len(set(answering).intersection(changed.voters))
        return (
            f"of the {len(changed.voters)} voters after this change only {count} answer now, and "
            f"{changed.quorum} are needed; bring the others back first"
        )

    def next_change(
        self, membership: Membership, last_index: int, now_ticks: int
    ) -> Membership | None:
        """The membership that is due by itself: a learner gets its vote, or is dropped."""
        for member in membership.members:
            if member.voter or member.stays_learner or member.member_id == self._member_id:
                continue
            progress = self.progress[member.member_id]
            if self._has_caught_up(progress, last_index, now_ticks):
                return membership.with_member(member._replace(voter=True))
            if why := self._hopeless(member, progress, now_ticks):
                self._notices.append(f"learner {member.node_id} is dropped: {why}")
                return membership.without_member(member.member_id)
        return None

    def _hopeless(self, member: Member, progress: Progress, now_ticks: int) -> str:
        """Why this learner is waited for no longer, for a person; "" if it is."""
        if progress.heard_ticks <= now_ticks - self._config.learner_ticks_max:
            # Most often its address was mistyped. It is in nobody's way, but holds its name.
            return (
                f"it was not heard of for too long; if {member.host} with peer port "
                f"{member.peer_port} is not its address, add it anew"
            )
        is_late = progress.followed_since_ticks <= now_ticks - self._config.catch_up_ticks_max
        if is_late and not progress.is_receiving_snapshot:
            return (
                "it does not catch up; see its log, add it when there is less to do, or --learner"
            )
        return ""

    def _has_caught_up(self, progress: Progress, last_index: int, now_ticks: int) -> bool:
        """Whether its round of catching up took less than a timeout; if not, the next one begins.

        Source: thesis 4.2.1.
        """
        if progress.match_index < progress.catch_up_index or not progress.match_index:
            return False
        # Caught up lately, and still there: a dead voter would only raise the quorum.
        oldest = min(progress.catch_up_since_ticks, progress.heard_ticks)
        if oldest > now_ticks - self._config.election_ticks_min:
            return True
        progress.catch_up_index = last_index
        progress.catch_up_since_ticks = now_ticks
        return False


def _loss(member: Member) -> str:
    return (
        f"{member.node_id} has lost entries that it had acknowledged, and gets no more: take it out "
        "(cluster_manager.py --action remove) and let it in as a new member (--action add)"
    )
