"""The log as the core sees it: a window of entries in memory, the terms and memberships of all.

Rule 1: ``append`` only adds behind the last entry; only ``truncate_from`` takes entries away.
Rule 2: an entry leaves memory only when it is durable and applied; older ones are read from disk
by the driver, so ``entries`` answers None for them instead of reaching for a file.
Rule 3: ``term_at`` knows every index of the log, in memory or not: terms come in runs, and a year
of elections is a short list of runs.
Rule 4: what a durable state covers may be dropped at the front (``compact``); the term at the
*base*, the index before the first entry, stays known (paper section 7).

Called only by ``raft_core.py``. No I/O. On disk the same log is ``replication_log.py``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from raft_types import ENTRY_OVERHEAD_BYTES, Entry, MemberId, Membership, Snapshot

# What a healthy follower or a restarted applier may lag before the driver has to read the disk.
WINDOW_BYTES_MAX = 16 * 1024 * 1024


def entry_bytes(entry: Entry) -> int:
    """What ``entry`` takes on the wire and on disk."""
    return len(entry.data) + ENTRY_OVERHEAD_BYTES


class RaftLog:
    """Entries ``first_index..last_index``, of which the newest are in memory."""

    def __init__(
        self,
        last_index: int = 0,
        term_runs: Sequence[tuple[int, int]] = (),
        tail: Sequence[Entry] = (),
        *,
        first_index: int = 1,
        base_term: int = 0,
        window_bytes_max: int = WINDOW_BYTES_MAX,
    ) -> None:
        assert first_index <= last_index + 1
        assert not tail or tail[-1].index == last_index
        self.first_index = first_index  # last_index + 1 where the log is empty
        self.last_index = last_index
        # Durable on this server's disk up to here; never above last_index.
        self.stable_index = last_index
        # Handed out in a Ready, so on its way to the disk; stable <= handed <= last.
        self._handed_index = last_index
        # (first index, term) of each run of equal terms, by ascending index; the first run begins
        # with the base.
        self._run_starts = [first_index - 1, *(start for start, _ in term_runs)]
        self._run_terms = [base_term, *(term for _, term in term_runs)]
        # Entries _window_first..last_index.
        self._window = list(tail)
        self._window_first = last_index - len(tail) + 1
        self._window_bytes = sum(map(entry_bytes, tail))
        self._window_bytes_max = window_bytes_max

    @property
    def last_term(self) -> int:
        """The term of the last entry, or of the base where there is none."""
        return self._run_terms[-1]

    def term_at(self, index: int) -> int:
        """The term of the entry at ``index``, or of the base. IndexError anywhere else."""
        if not self.first_index - 1 <= index <= self.last_index:
            held = f"{self.first_index} to {self.last_index}"
            raise IndexError(f"no entry {index}: the log holds {held}")
        if index >= self._run_starts[-1]:
            return self._run_terms[-1]
        return self._run_terms[bisect_right(self._run_starts, index) - 1]

    def matches(self, index: int, term: int) -> bool:
        """Whether this log agrees with one that has ``term`` at ``index``.

        Before the base it does: that was committed, so every leader has the same there.
        """
        if index > self.last_index:
            return False
        return index < self.first_index - 1 or self.term_at(index) == term

    def is_up_to_date(self, last_index: int, last_term: int) -> bool:
        """Whether a log that ends so is at least as up to date as this one. Source: paper 5.4.1."""
        return (last_term, last_index) >= (self.last_term, self.last_index)

    def last_index_up_to_term(self, index: int, term: int) -> int:
        """The highest index <= ``index`` whose entry's term is <= ``term``.

        With it both sides of a refused append skip whole terms (paper 5.3). An answer before the
        base is a guess: what was there is not known.
        """
        index = min(index, self.last_index)
        while index >= self.first_index - 1 and self.term_at(index) > term:
            run = bisect_right(self._run_starts, index) - 1
            index = self._run_starts[run] - 1
        return index

    def append(self, entries: Sequence[Entry]) -> None:
        """Add entries right behind the last one."""
        for entry in entries:
            assert entry.index == self.last_index + 1
            if entry.term != self.last_term:
                assert entry.term > self.last_term
                self._run_starts.append(entry.index)
                self._run_terms.append(entry.term)
            self.last_index = entry.index
            self._window_bytes += entry_bytes(entry)
        self._window.extend(entries)

    def truncate_from(self, index: int) -> None:
        """Drop the entries from ``index`` on: they conflict with the leader's."""
        assert self.first_index <= index <= self.last_index
        self.last_index = index - 1
        self.stable_index = min(self.stable_index, self.last_index)
        self._handed_index = min(self._handed_index, self.last_index)
        while self._run_starts[-1] >= index:
            self._run_starts.pop()
            self._run_terms.pop()
        if index < self._window_first:
            self._window_first = index
        del self._window[index - self._window_first :]
        self._window_bytes = sum(map(entry_bytes, self._window))

    def compact(self, first_index: int) -> None:
        """Forget the entries before ``first_index``: a durable state has reached them."""
        if first_index <= self.first_index:
            return
        base = first_index - 1
        assert base <= self.stable_index
        run = bisect_right(self._run_starts, base) - 1
        del self._run_starts[:run], self._run_terms[:run]
        self._run_starts[0] = base
        self.first_index = first_index
        if first_index > self._window_first:
            self._shorten_window(first_index - self._window_first)

    def reset(self, index: int, term: int) -> None:
        """Empty the log; it begins after ``index``, which a durable state has reached."""
        self.first_index = self._window_first = index + 1
        self.last_index = self.stable_index = self._handed_index = index
        self._run_starts, self._run_terms = [index], [term]
        self._window, self._window_bytes = [], 0

    def entries(self, first: int, bytes_max: int) -> tuple[Entry, ...] | None:
        """Entries from ``first`` on, at least one, then up to ``bytes_max``; None: not in memory."""
        if first < self._window_first:
            return None
        start = first - self._window_first
        if self._window_bytes <= bytes_max:  # the usual case: no need to add up
            return tuple(self._window[start:])
        total = 0
        for position in range(start, len(self._window)):
            total += entry_bytes(self._window[position])
            if total > bytes_max and position > start:
                return tuple(self._window[start:position])
        return tuple(self._window[start:])

    # ---- To the disk ----

    @property
    def has_unwritten(self) -> bool:
        """Whether there are entries that no Ready has carried yet."""
        return self._handed_index < self.last_index

    def take_unwritten(self) -> tuple[Entry, ...]:
        """The entries that are to be written next, each handed out once."""
        entries = tuple(self._window[self._handed_index + 1 - self._window_first :])
        self._handed_index = self.last_index
        return entries

    def written(self, last: Entry) -> None:
        """Everything up to ``last`` is on disk, unless it was truncated meanwhile."""
        if self.matches(last.index, last.term):
            self.stable_index = max(self.stable_index, last.index)

    def trim(self, applied_index: int) -> None:
        """Let go of durable, applied entries once the window is over its budget.

        Trims to half the budget, so that the cost of moving the list is paid rarely.
        """
        if self._window_bytes <= self._window_bytes_max:
            return
        droppable = min(applied_index, self.stable_index) - self._window_first + 1
        drop, left_bytes = 0, self._window_bytes
        while drop < droppable and left_bytes > self._window_bytes_max // 2:
            left_bytes -= entry_bytes(self._window[drop])
            drop += 1
        self._shorten_window(drop)

    def _shorten_window(self, count: int) -> None:
        self._window_bytes -= sum(map(entry_bytes, self._window[:count]))
        del self._window[:count]
        self._window_first += count


_NOTHING = (0, Membership())  # before the first change


class MembershipLog:
    """Who belonged to the cluster from which index on: every change in the log, and the one before.

    The latest is in force as soon as its entry is appended, and goes when the entry is truncated
    (thesis 4.1, raft-traps T62).
    """

    def __init__(self, member_id: MemberId, changes: Iterable[tuple[int, Membership]]) -> None:
        self._member_id = member_id  # of this server
        self._changes = sorted(dict(changes).items())
        # This server is known to have been a member there, by a committed change.
        self.admitted_index: int | None = None

    @property
    def latest(self) -> Membership:
        """The one in force; without members where the log has none."""
        return self._changes[-1][1] if self._changes else _NOTHING[1]

    @property
    def latest_index(self) -> int:
        """The entry that the one in force came with; 0 if there is none."""
        return self._changes[-1][0] if self._changes else 0

    def at(self, index: int) -> tuple[int, Membership]:
        """The one in force at ``index``, after the index it came with."""
        return next((c for c in reversed(self._changes) if c[0] <= index), _NOTHING)

    def is_removed(self, commit_index: int) -> bool:
        """Whether this server belonged to the cluster and, by a committed change, does no more.

        One that is yet to be added finds itself in no membership either, and so does one that has
        not come as far as the change that added it.
        """
        if self.latest.get(self._member_id) is not None:
            return False
        self._remember(commit_index)
        if self.admitted_index is None or self.admitted_index > commit_index:
            return False
        return self.at(commit_index)[1].get(self._member_id) is None

    def may_stand(self, commit_index: int) -> bool:
        """Whether this server may campaign: it votes, or did so at the last commit it knows of.

        Until its removal is committed it may be the only one who can win. Source: thesis 4.2.2.
        """
        last_committed, _ = self.at(commit_index)
        return any(m.is_voter(self._member_id) for i, m in self._changes if i >= last_committed)

    def append(self, index: int, membership: Membership) -> None:
        """The entry at ``index`` brings a new one."""
        assert index > self.latest_index or not self._changes
        self._changes.append((index, membership))

    def truncate_from(self, index: int) -> None:
        """The entries from ``index`` on are gone."""
        while self._changes and self._changes[-1][0] >= index:
            self._changes.pop()

    def compact(self, first_index: int) -> None:
        """The entries before ``first_index`` are gone, and with them all but the last change."""
        base_index, _ = self.at(first_index - 1)
        self._remember(base_index)
        self._changes = [change for change in self._changes if change[0] >= base_index]

    def restore(self, snapshot: Snapshot, commit_index: int) -> None:
        """The state at ``snapshot.index`` takes the place of what came before it.

        Of that, ``commit_index`` tells what was committed.
        """
        self._remember(commit_index)
        later = [change for change in self._changes if change[0] > snapshot.index]
        self._changes = [(snapshot.membership_index, snapshot.membership), *later]

    def _remember(self, commit_index: int) -> None:
        if self.admitted_index is None:
            mine = (i for i, m in self._changes if i <= commit_index and m.get(self._member_id))
            self.admitted_index = next(mine, None)
