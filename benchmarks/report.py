"""Results as values, as JSON, as a table and as a plot.

The JSON holds every run, not only the medians, and the facts about the machine that explain them;
no host name, user or path.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.workload import Sample, Workload, median, percentile

FSYNC_TRIALS = 200
FSYNC_BYTES = 4096


class Cell(NamedTuple):
    """One workload on one system."""

    workload: Workload
    system: str


@dataclass
class Results:
    """All that one call of compare.py has measured."""

    date: str
    machine: Mapping[str, str | float | None]
    load: Mapping[str, float]  # seconds a run, rounds, keys
    titles: dict[str, str] = field(default_factory=dict)  # by system; the first is the compared one
    versions: dict[str, str] = field(default_factory=dict)
    samples: dict[Cell, list[Sample]] = field(default_factory=dict)
    failovers_s: list[float] = field(default_factory=list)

    def median(self, workload: Workload, system: str) -> Sample | None:
        """Over the rounds; None where nothing was measured."""
        samples = self.samples.get(Cell(workload, system))
        return median(samples) if samples else None

    def workloads(self) -> list[Workload]:
        """In the order of the table."""
        return list(dict.fromkeys(cell.workload for cell in self.samples))


# ---- The run and the machine ---------------------------------------------------------------------


def today() -> str:
    """In UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def machine_facts(directory: Path) -> dict[str, str | float | None]:
    """What explains the numbers; ``directory`` is on the disk that all systems use."""
    sync_ms = _fdatasync_ms(directory / "fsync-trial")
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "fdatasync_4k_p50_ms": round(percentile(sync_ms, 0.50), 3),
        "fdatasync_4k_p99_ms": round(percentile(sync_ms, 0.99), 3),
    }


def _fdatasync_ms(path: Path) -> list[float]:
    """What one synced append costs: the floor under every write with fsync."""
    times_ms = []
    with path.open("wb", buffering=0) as file:
        for _ in range(FSYNC_TRIALS):
            file.write(bytes(FSYNC_BYTES))
            start_s = time.perf_counter()
            os.fdatasync(file.fileno())
            times_ms.append((time.perf_counter() - start_s) * 1000)
    path.unlink()
    return times_ms


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---- JSON ----------------------------------------------------------------------------------------


def write_json(results: Results, path: Path) -> None:
    document = {
        "date": results.date,
        "machine": results.machine,
        "load": results.load,
        "versions": results.versions,
        "throughput": [
            {
                "workload": cell.workload.name,
                "system": cell.system,
                "median": _rounded(median(samples)),
                "runs": [_rounded(sample) for sample in samples],
            }
            for cell, samples in results.samples.items()
        ],
        "failover_s": failover_summary(results.failovers_s),
    }
    write_document(document, path)


def write_document(document: Mapping[str, object], path: Path) -> None:
    """One JSON object, a line for each value in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _rounded(sample: Sample) -> dict[str, float]:
    return {name: round(number, 3) for name, number in sample._asdict().items()}


def failover_summary(failovers_s: Sequence[float]) -> dict[str, object] | None:
    """All of them and what they come to; None if there are none."""
    if not failovers_s:
        return None
    return {
        "kills": len(failovers_s),
        "p50": round(statistics.median(failovers_s), 3),
        "p99": round(percentile(failovers_s, 0.99), 3),  # of 20 kills: the longest
        "all": [round(seconds, 3) for seconds in failovers_s],
    }


# ---- Table ---------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """Markdown: requests a second (p50 / p99 in ms), and how often ours is the peer's."""
    ours, *peers = results.titles
    heads = ["requests/s (p50 / p99 ms)", results.titles[ours]]
    for peer in peers:
        heads += [results.titles[peer], "ratio"]
    rows = []
    for workload in results.workloads():
        own = results.median(workload, ours)
        row = [workload.title, _cell(own)]
        for peer in peers:
            theirs = results.median(workload, peer)
            row += [_cell(theirs), f"{own.rps / theirs.rps:.2f}" if own and theirs else "-"]
        rows.append(row)
    return markdown(heads, rows)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns, but for the first, are set flush right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in (heads, rule, *rows)
    )


def _cell(sample: Sample | None) -> str:
    if sample is None:
        return "-"
    return f"{sample.rps:,.0f} ({sample.p50_ms:.2f} / {sample.p99_ms:.2f})"


def failover_line(failovers_s: Sequence[float]) -> str:
    """One sentence."""
    return (
        f"kill -9 of the primary to the next acknowledged write: "
        f"p50 {statistics.median(failovers_s):.2f} s, p99 {percentile(failovers_s, 0.99):.2f} s "
        f"({len(failovers_s)} kills)"
    )


# ---- Plot ----------------------------------------------------------------------------------------


def plot(results: Results, path: Path) -> None:
    """Throughput and latency of every workload side by side.

    Dots, not bars: on a logarithmic axis a bar's length says nothing. The file's suffix chooses
    the format; SVG is written so that the same results give the same file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    import matplotlib.pyplot as plt

    workloads = results.workloads()
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(12, 1.5 + 0.4 * len(workloads)), layout="constrained"
    )
    step = 0.6 / len(results.titles)
    for number, (system, title) in enumerate(results.titles.items()):
        found = [
            (row + (number + 0.5) * step - 0.3, sample)
            for row, workload in enumerate(workloads)
            if (sample := results.median(workload, system))
        ]
        places = [place for place, _ in found]
        p50_ms = [sample.p50_ms for _, sample in found]
        p99_ms = [sample.p99_ms for _, sample in found]
        colour = f"C{number}"
        label = f"{title} ({results.versions[system]})"
        left.plot([sample.rps for _, sample in found], places, "o", color=colour, label=label)
        right.hlines(places, p50_ms, p99_ms, color=colour)
        right.plot(p50_ms, places, "o", color=colour)
    left.set_xscale("log")
    left.set_xlabel("requests a second (further right is better)")
    left.set_yticks(range(len(workloads)), [workload.title for workload in workloads])
    left.invert_yaxis()
    right.set_xscale("log")
    right.set_xlabel("latency in ms, p50 (dot) to p99 (further left is better)")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(f"3 nodes on one machine of {results.machine['cores']} cores, fsync on")
    figure.legend(loc="outside lower center", ncols=len(results.titles))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, metadata=metadata)
    plt.close(figure)
