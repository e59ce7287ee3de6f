"""What ``operations.py`` finds: a value for each measurement, its rows in the table, its targets.

Values only. A target is a property that the project promises itself on a quiet machine with two
cores; a row that does not reach its target says so, and one that has none is there to be known.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

from benchmarks.report import markdown
from benchmarks.workload import LoadError, Sample, percentile
from benchmarks.writers import CLIENTS, CONNECTIONS, RATE, VALUE_BYTES, Write

MEMORY_MB_MAX = 600
SERVE_S_MAX = 8.0
START_S_MAX = 30.0
P99_RATIO_MAX = 3.0  # to the p99 alone
REJOIN_S_MAX = 30.0
RATE_SHARE_MIN = 0.99
PAUSE_MS_MAX = 100.0
LAG_MS_MAX = 10.0
# "No effect", as far as turns of seconds on a shared machine can tell.
RPS_RATIO_MIN = 0.95
TAIL_RATIO_MAX = 1.2
IDLE_PERCENT_MAX = 2.0


class Row(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    target: str = ""
    is_met: bool | None = None  # None: there is no target


@dataclass(frozen=True, slots=True)
class Result:
    """Of one measurement."""

    def rows(self) -> list[Row]:
        raise NotImplementedError


def _below(what: str, figure: float, limit: float, unit: str, more: str = "") -> Row:
    """A figure that is to be lower than ``limit``."""
    digits = 1 if figure < 100 else 0
    return Row(what, f"{figure:.{digits}f} {unit}{more}", f"< {limit:g} {unit}", figure < limit)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    verdicts = {None: "", True: "met", False: "MISSED"}
    cells = [(row.what, row.found, row.target, verdicts[row.is_met]) for row in rows]
    return markdown(["", "measured", "target", "verdict"], cells)


def rounded(found: object) -> object:
    """The same with fewer digits: more than 0.1 ms is noise."""
    match found:
        case float():
            return round(found, 4)
        case Sample():
            return rounded(found._asdict())
        case dict():
            return {name: rounded(part) for name, part in found.items()}
        case list():
            return [rounded(part) for part in found]
    return found


# ---- Latency under the open loop -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latency:
    """Of the writes of the open loop that fell due in a period."""

    seconds: float
    rate: float  # writes that were answered in it, a second
    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, writes: Sequence[Write], begin_s: float, end_s: float) -> Self:
        latencies_ms = [w.latency_s * 1000 for w in writes if begin_s <= w.due_s < end_s]
        if not latencies_ms:
            raise LoadError("nothing was written meanwhile")
        answered = sum(begin_s <= w.due_s + w.latency_s < end_s for w in writes)
        return cls(
            seconds=end_s - begin_s,
            rate=answered / (end_s - begin_s),
            p50_ms=percentile(latencies_ms, 0.50),
            p99_ms=percentile(latencies_ms, 0.99),
            max_ms=max(latencies_ms),
        )

    def __str__(self) -> str:
        return f"{self.p99_ms:.1f} ms (p50 {self.p50_ms:.1f}, max {self.max_ms:.0f})"

    def rate_row(self, when: str) -> Row:
        """Whether the load was the one that it was to be."""
        is_met = self.rate >= RATE_SHARE_MIN * RATE
        return Row(f"writes achieved {when}", f"{self.rate:,.0f}/s", f"{RATE:,}/s", is_met)


# ---- Results -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load(Result):
    """N keys into an empty cluster."""

    keys: int
    seconds: float
    memory_mb: Mapping[str, float]  # by node, resident, right after it

    def rows(self) -> list[Row]:
        what = f"load of {self.keys:,} keys of 16 bytes with values of {VALUE_BYTES}, pipelined"
        found = f"{self.keys / self.seconds:,.0f} records/s, {self.seconds:.1f} s"
        least, most = min(self.memory_mb.values()), max(self.memory_mb.values())
        return [
            Row(what, found),
            Row(
                "memory of a node after it",
                f"{least:.0f} to {most:.0f} MB",
                f"< {MEMORY_MB_MAX} MB",
                most < MEMORY_MB_MAX,
            ),
        ]


@dataclass(frozen=True, slots=True)
class Restart(Result):
    """After ``kill -9``."""

    one_s: float  # from the kill
    all_answer_s: float  # from the start of the first
    one_leads_s: float

    def rows(self) -> list[Row]:
        return [
            _below("restart of one node, kill -9 to serving again", self.one_s, SERVE_S_MAX, "s"),
            _below("start of all three: until all answer", self.all_answer_s, START_S_MAX, "s"),
            _below("until one leads", self.one_leads_s, START_S_MAX, "s"),
        ]


@dataclass(frozen=True, slots=True)
class WriteLatency(Result):
    """SET at a fixed rate: alone, beside a node that comes back empty, and while states are saved."""

    alone: Latency
    saves_alone: Mapping[str, int]  # by node, in that time: none, or it was not alone
    rejoin_s: float  # of the empty node: from its start until it votes and has caught up
    by_snapshot: bool  # or by the log alone, which then held everything
    rejoin: Latency
    saving: Latency
    saves: Mapping[str, int]  # by node, in that time
    entries_cut: Mapping[str, int]  # from the log, by node, in that time

    def rows(self) -> list[Row]:
        load = f"SET on {CONNECTIONS} connections, {RATE:,}/s, p99"
        how = "snapshot" if self.by_snapshot else "log, no snapshot was due"
        saves = " ".join(map(str, self.saves.values()))
        cut = " ".join(f"{entries:,}" for entries in self.entries_cut.values())
        return [
            Row(f"{load}: alone", f"{self.alone}, {sum(self.saves_alone.values())} saves"),
            self.alone.rate_row("alone"),
            _below(
                "a node whose directory was wiped: until it votes and has caught up",
                *(self.rejoin_s, REJOIN_S_MAX, "s"),
                f" by {how}",
            ),
            self._beside(f"{load}: meanwhile", self.rejoin),
            self.rejoin.rate_row("meanwhile"),
            self._beside(f"{load}: over {self.saving.seconds:.0f} s of saves", self.saving),
            Row("saves of the nodes in that time; entries cut from their logs", f"{saves}; {cut}"),
            self.saving.rate_row("in that time"),
        ]

    def _beside(self, what: str, latency: Latency) -> Row:
        ratio = latency.p99_ms / self.alone.p99_ms
        found = f"{latency}, {ratio:.2f} times alone"
        return Row(what, found, f"<= {P99_RATIO_MAX:g} times alone", ratio <= P99_RATIO_MAX)


@dataclass(frozen=True, slots=True)
class HandOver(Result):
    """Clients that write in a loop, while the primary goes in an orderly way."""

    failover_pauses_s: Sequence[float]  # the longest of any client, one for each FAILOVER
    failover_errors: Sequence[str]
    stop_pauses_s: Sequence[float]  # one for each SIGTERM
    stop_errors: Sequence[str]

    def rows(self) -> list[Row]:
        return [
            *self._rows("FAILOVER", self.failover_pauses_s, self.failover_errors),
            *self._rows("SIGTERM of the primary", self.stop_pauses_s, self.stop_errors),
        ]

    @staticmethod
    def _rows(what: str, pauses_s: Sequence[float], errors: Sequence[str]) -> list[Row]:
        p50_ms, max_ms = statistics.median(pauses_s) * 1000, max(pauses_s) * 1000
        title = f"{what}, {len(pauses_s)} times: longest pause of {CLIENTS} clients"
        return [
            _below(title, max_ms, PAUSE_MS_MAX, "ms", f" (p50 {p50_ms:.1f})"),
            Row(f"{what}: errors of KVStoreClient", str(len(errors)), "0", not errors),
        ]


def longest_pauses_s(
    answered_s: Sequence[Sequence[float]], periods: Sequence[tuple[float, float]]
) -> list[float]:
    """For each period: the longest time between two answers, of any client, that reaches into it.

    Raises LoadError if a client has no answer before one, or none after it.
    """
    return [max(_longest_s(times_s, *period) for times_s in answered_s) for period in periods]


def _longest_s(times_s: Sequence[float], begin_s: float, end_s: float) -> float:
    first, last = bisect_left(times_s, begin_s), bisect_right(times_s, end_s)
    if first == 0 or last == len(times_s):
        raise LoadError("a client was not answered any more")
    return max(after - before for before, after in pairwise(times_s[first - 1 : last + 1]))


@dataclass(frozen=True, slots=True)
class Lag(Result):
    """From the OK of a SET until both secondaries show it."""

    lags_ms: Sequence[float]
    look_ms_p50: float  # what one GET of a secondary takes: what is seen is seen so much later

    def rows(self) -> list[Row]:
        p50_ms, p99_ms = percentile(self.lags_ms, 0.50), percentile(self.lags_ms, 0.99)
        return [
            Row(
                f"OK of a SET until both secondaries show it, p99 of {len(self.lags_ms)}",
                f"{p99_ms:.2f} ms (p50 {p50_ms:.2f}; a look at both takes {2 * self.look_ms_p50:.2f})",
                f"<= {LAG_MS_MAX:g} ms",
                p99_ms <= LAG_MS_MAX,
            )
        ]


@dataclass(frozen=True, slots=True)
class Turn:
    """The same load without and with idle connections, one shortly after the other."""

    without: Sample
    beside: Sample


@dataclass(frozen=True, slots=True)
class IdleConnections(Result):
    """Throughput beside connections that are open and silent."""

    count: int
    turns: Mapping[str, Sequence[Turn]]  # by operation

    def rows(self) -> list[Row]:
        return [row for op in self.turns for row in self._rows(op, self.turns[op])]

    def _rows(self, op: str, turns: Sequence[Turn]) -> list[Row]:
        rps, without_rps, p99_ms, without_p99_ms = (
            statistics.median(column)
            for column in zip(
                *((t.beside.rps, t.without.rps, t.beside.p99_ms, t.without.p99_ms) for t in turns),
                strict=True,
            )
        )
        # Of pairs, which the noise of minutes hits alike.
        rps_ratio = statistics.median(t.beside.rps / t.without.rps for t in turns)
        p99_ratio = statistics.median(t.beside.p99_ms / t.without.p99_ms for t in turns)
        what = f"{op} on 50 connections, beside {self.count:,} idle ones and without"
        return [
            Row(
                f"{what}: requests/s",
                f"{rps:,.0f} and {without_rps:,.0f}: {rps_ratio:.2f} times",
                f"no effect: >= {RPS_RATIO_MIN:g} times",
                rps_ratio >= RPS_RATIO_MIN,
            ),
            Row(
                f"{what}: p99",
                f"{p99_ms:.1f} and {without_p99_ms:.1f} ms: {p99_ratio:.2f} times",
                f"no effect: <= {TAIL_RATIO_MAX:g} times",
                p99_ratio <= TAIL_RATIO_MAX,
            ),
        ]


@dataclass(frozen=True, slots=True)
class IdleProcessor(Result):
    """What nodes that nobody asks anything take of a core."""

    seconds: float
    percent: Mapping[str, float]  # by node

    def rows(self) -> list[Row]:
        each = " ".join(f"{percent:.2f}" for percent in self.percent.values())
        limit = f"< {IDLE_PERCENT_MAX:g} % of a core"
        is_met = max(self.percent.values()) < IDLE_PERCENT_MAX
        return [Row(f"processor time, {self.seconds:.0f} s idle", f"{each} %", limit, is_met)]


@dataclass(frozen=True, slots=True)
class Backup(Result):
    """The state as a file, while the open loop goes on; and a cluster made of it."""

    keys: int
    size_bytes: int
    backup_s: float  # with its check
    latency: Latency
    verify_s: float
    restore_s: float  # until all nodes of the new cluster vote and have everything

    def rows(self) -> list[Row]:
        size = f"{self.size_bytes / 2**20:.0f} MiB"
        return [
            Row(f"backup of {self.keys:,} keys", f"{self.backup_s:.1f} s, {size}"),
            Row(f"SET on {CONNECTIONS} connections, {RATE:,}/s, p99: meanwhile", str(self.latency)),
            self.latency.rate_row("meanwhile"),
            Row("verify", f"{self.verify_s:.1f} s"),
            Row("restore, to three nodes that vote", f"{self.restore_s:.1f} s"),
        ]
