"""Time, chance and weather of a made-up world, and the clocks that its servers read.

Rule 1: every choice comes from the seed; the same seed gives the same history, to the last byte.
Rule 2: time is a number of ticks; what is to happen stands in one queue, ordered by when. One thing
taken from it is one step.

Used by ``sim_cluster.py`` and its parts; started by ``simulator.py``.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Collection
from itertools import count
from typing import NamedTuple

TICK_MS = 100
STARTED_MS = 1_700_000_000_000  # Unix time when a history begins
HOUR_MS = 3_600_000


class Weather(NamedTuple):
    """How bad the world is: chances from 0 to 1, times in ticks."""

    drop: float
    duplicate: float
    quick_ticks: tuple[float, float]  # the usual delay; where it varies, messages overtake
    slow: float  # the chance that a message takes up to slow_ticks
    slow_ticks: float
    sync_ticks: float
    stall: float  # the chance that a sync takes up to ten times as long
    sync_error: float  # the chance that a sync fails, which ends the server
    late: float  # the chance that a server's thread does its work only the next time
    slow_read: float  # the chance that entries read from disk wait before they are sent
    slow_step: float  # the chance that a step of a save or a restore takes up to slow_ticks
    step_crash: float  # the chance that a server crashes between two steps of a save or a restore
    evidence: float  # the chance that a server hears of a crash
    fault_ticks: float  # the mean time between faults
    cut_ticks: float  # the longest that a link stays cut
    client_ticks: float  # the mean time that a client thinks


CALM = Weather(
    drop=0,
    duplicate=0,
    quick_ticks=(0.3, 0.3),
    slow=0,
    slow_ticks=0,
    sync_ticks=0.3,
    stall=0,
    sync_error=0,
    late=0,
    slow_read=0,
    slow_step=0,
    step_crash=0,
    evidence=0,
    fault_ticks=1e9,
    cut_ticks=0,
    client_ticks=2,
)


def storm(rng: random.Random) -> Weather:
    """A weather of its own for each seed: some faults often, some not at all."""
    return Weather(
        drop=rng.choice((0, 0.02, 0.1, 0.3)),
        duplicate=rng.choice((0, 0.05, 0.3)),
        quick_ticks=rng.choice(((0.3, 0.3), (0.05, 0.8))),
        slow=rng.choice((0, 0.05, 0.3)),
        slow_ticks=rng.choice((3, 20, 80)),
        sync_ticks=rng.choice((0.1, 0.5, 3)),
        stall=rng.choice((0, 0.1)),
        sync_error=rng.choice((0, 0, 0.002)),
        late=rng.choice((0, 0.3)),
        slow_read=rng.choice((0, 0.3)),
        slow_step=rng.choice((0, 0.3, 0.8)),
        step_crash=rng.choice((0, 0.05, 0.2)),
        evidence=rng.choice((0, 0.5, 1)),
        fault_ticks=rng.choice((5, 10, 25, 60)),
        cut_ticks=rng.choice((10, 40, 120)),
        client_ticks=rng.choice((0.5, 2, 6)),
    )


class Habits(NamedTuple):
    """How often things are done one way or another, each of which is right; chances from 0 to 1."""

    links_up: float  # that a server hears of a new connection to one that has started, or is back
    looks: float  # that a link looks for entries by itself, and is not told to
    commits_told: float  # that it is told to where only the commit index has grown
    picks_leader: float  # that a fault strikes a leader and not anybody
    picks_anyone: float  # that somebody else than the leader is asked for a change
    hands_over_at_once: float  # that a transfer begins when a learner is added
    stays_learner: float  # of a newcomer
    is_replaced: float  # that a newcomer takes the place of one that was removed
    closes: float  # that a session is closed
    counts_by_reading: float  # that a counter is read


def habits(rng: random.Random) -> Habits:
    """Of one seed."""
    return Habits(
        links_up=rng.choice((0, 0.5, 0.9)),
        looks=rng.choice((0, 0.1, 0.5)),
        commits_told=rng.choice((0, 0.9, 1)),
        picks_leader=rng.choice((0.3, 0.6, 0.9)),
        picks_anyone=rng.choice((0, 0.1, 0.3)),
        hands_over_at_once=rng.choice((0, 1, 1)),
        stays_learner=rng.choice((0, 0, 0.6)),
        is_replaced=rng.choice((0.3, 0.7, 1)),
        closes=rng.choice((0.01, 0.1, 0.3)),
        counts_by_reading=rng.choice((0.1, 0.3, 0.6)),
    )


# What of the weather can be left out, by name (``simulator.py --without``).
NUISANCES = {
    "drop": {"drop": 0},
    "duplicate": {"duplicate": 0},
    "reorder": {"quick_ticks": (0.3, 0.3)},
    "delay": {"slow": 0},
    "slow-disk": {"sync_ticks": 0.3, "stall": 0},
    "sync-error": {"sync_error": 0},
    "late": {"late": 0},
    "slow-read": {"slow_read": 0},
    "slow-step": {"slow_step": 0},
    "step-crash": {"step_crash": 0},
    "evidence": {"evidence": 0},
}


class SimClock:
    """A server's wall clock: wrong by as much, and running as fast, as chance would have it."""

    def __init__(self, rng: random.Random) -> None:
        skews_ms = (0, 3000, 30_000, HOUR_MS)
        self.skew_ms = rng.choice((-1, 1)) * rng.choice(skews_ms)
        self.rate = rng.choice((1, 1, 0.5, 2))

    def now_ms(self, now_ticks: float) -> int:
        """Unix time, as this server would have it."""
        return STARTED_MS + self.skew_ms + int(now_ticks * TICK_MS * self.rate)


class World:
    """The queue of what is to happen, and the one source of chance."""

    def __init__(
        self, seed: int, trace: Callable[[str], None] | None, without: Collection[str]
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.storm = storm(self.rng)
        for name in sorted(NUISANCES.keys() & set(without)):
            self.storm = self.storm._replace(**NUISANCES[name])  # type: ignore[arg-type]
        self.weather = self.storm  # or CALM
        self.habits = habits(self.rng)
        self.is_over = False  # the last storm has ended: nobody begins anything new
        self.counts: Counter[str] = Counter()  # what has happened, so that a test can ask for it
        self.tracing = trace is not None
        self._trace = trace
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = count()

    def at(self, delay: float, action: Callable[..., None], *args: object) -> None:
        """Do this so many ticks from now."""
        self.at_time(self.now + delay, action, *args)

    def at_time(self, time: float, action: Callable[..., None], *args: object) -> None:
        """Do this then."""
        heapq.heappush(self._queue, (time, next(self._order), action, args))

    def delay(self) -> float:
        """How long a message is under way."""
        slow = self.chance(self.weather.slow)
        span = (1, self.weather.slow_ticks) if slow else self.weather.quick_ticks
        return self.rng.uniform(*span)

    def run_until(self, end: float) -> None:
        """Let time pass up to ``end``."""
        while self._queue and self._queue[0][0] <= end:
            self._step()
        self.now = end

    def run_steps(self, steps: int) -> None:
        """Let the next ``steps`` things happen."""
        end = self.steps + steps
        while self._queue and self.steps < end:
            self._step()

    def _step(self) -> None:
        self.now, _, action, args = heapq.heappop(self._queue)
        self.steps += 1
        action(*args)

    def pause(self, mean: float) -> float:
        """A time until something happens that happens every ``mean`` ticks."""
        return self.rng.expovariate(1 / mean)

    def chance(self, chance: float) -> bool:
        """Whether something happens that does so with this chance."""
        return chance > 0 and self.rng.random() < chance

    def say(self, what: str) -> None:
        """A line of the trace."""
        if self._trace is not None:
            self._trace(f"{self.now:8.2f} {what}")
