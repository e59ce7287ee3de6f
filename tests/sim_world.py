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
    fault_ticks: float  # the mean time between faults
    cut_ticks: float  # the longest that a link stays cut
    client_ticks: float  # the mean time that a client thinks


CALM = Weather(0, 0, (0.3, 0.3), 0, 0, 0.3, 0, 0, 0, 1e9, 0, 2)


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
        fault_ticks=rng.choice((5, 10, 25, 60)),
        cut_ticks=rng.choice((10, 40, 120)),
        client_ticks=rng.choice((0.5, 2, 6)),
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
