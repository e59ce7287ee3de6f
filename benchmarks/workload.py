"""What is asked of every system, and what is kept of the answer.

Values only; ``systems.py`` turns a Workload into the load tool that suits the system.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class LoadError(Exception):
    """A measurement that does not count: the load tool failed, or the data is not there after it."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One cell of the table: an operation, the size of its values, and how many wait at a time."""

    op: str  # "SET" or "GET"
    value_bytes: int
    connections: int
    pipeline: int  # requests in flight on one connection

    @property
    def name(self) -> str:
        """As ``--only`` takes it."""
        suffix = f"-p{self.pipeline}" if self.pipeline > 1 else ""
        return f"{self.op.lower()}-{self.value_bytes}B-{self.connections}c{suffix}"

    @property
    def title(self) -> str:
        """For people."""
        who = "1 connection" if self.connections == 1 else f"{self.connections} connections"
        depth = f" x {self.pipeline} pipelined" if self.pipeline > 1 else ""
        return f"{self.op} {self.value_bytes} B, {who}{depth}"

    @property
    def key_prefix(self) -> str:
        """Keeps the sizes apart, so that a GET finds values of its own size only."""
        return f"{self.value_bytes}:"


WORKLOADS = tuple(
    Workload(op, value_bytes, connections, pipeline)
    for value_bytes in (16, 256)
    for op in ("SET", "GET")
    for connections, pipeline in ((1, 1), (50, 1), (50, 16))
)

KEY_DIGITS = 12  # what redis-benchmark puts in place of __rand_int__


def key(workload: Workload, number: int) -> bytes:
    """The key that redis-benchmark makes of this number: 15 or 16 bytes."""
    return f"{workload.key_prefix}{number:0{KEY_DIGITS}}".encode()


class Sample(NamedTuple):
    """What one run of a load tool measured."""

    rps: float  # requests a second, a pipelined one counted by itself
    p50_ms: float
    p99_ms: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def median(samples: Sequence[Sample]) -> Sample:
    """Each column's median; the columns may come from different runs."""
    return Sample(*(statistics.median(column) for column in zip(*samples, strict=True)))
