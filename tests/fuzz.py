"""Fuzzing: good bytes changed at random, at every place where bytes come in; `make fuzz`.

    python -m tests.fuzz --target all --seconds 120 --seed 7
    python -m tests.fuzz --target log --input fuzz-log-7-1234.bin

Rule 1: coverage guides: an input that reaches a line which none before it reached is kept, and half
of the later ones are made from what was kept. So an input follows from target, seed, number and
those kept before it. A live node is another process, of which no line is seen.
Rule 2: what a target may do with an input is told in ``fuzz_targets.py``; anything else is a finding: the input is kept in a file, and the command that
replays it is printed. Exit status 1 if there was one.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple

from tests.fuzz_targets import TARGETS, Target

PRODUCT: Final = frozenset(map(str, Path(__file__).resolve().parent.parent.glob("*.py")))
# The share of inputs that are made from kept ones.
_KEPT_SHARE: Final = 0.5
_HEX_BYTES_MAX: Final = 200
_PROGRESS_EVERY_S: Final = 5.0


class Finding(NamedTuple):
    """An input that a target did not take as it must."""

    number: int  # of the execution
    data: bytes
    error: BaseException


class Outcome(NamedTuple):
    """What came of one target."""

    executions: int
    seconds: float
    finding: Finding | None
    kept: int = 0  # inputs that reached something new
    lines: int = 0  # of the product, that were reached


class Coverage:
    """The lines of some files that were reached while ``watching``; in this thread."""

    def __init__(self, files: Iterable[str] = PRODUCT) -> None:
        self._files = frozenset(files)
        self._missing: dict[CodeType, set[int]] = {}  # of each function that was called
        self.lines = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _on_call(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        missing = self._missing.get(code)
        if missing is None:
            if code.co_filename not in self._files:
                return None
            missing = self._missing[code] = {line for _, _, line in code.co_lines() if line}
            missing.discard(code.co_firstlineno)
        # Where every line was reached, nothing is traced any more: that is what makes it fast.
        return self._on_line if missing else None

    def _on_line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        missing = self._missing[frame.f_code]
        if event == "line" and frame.f_lineno in missing:
            missing.remove(frame.f_lineno)
            self.lines += 1
        return self._on_line


def make_input(target: Target, seed: int, number: int, kept: Sequence[bytes] = ()) -> bytes:
    """The input of one execution; the same for the same four."""
    rng = random.Random(f"{target.name}/{seed}/{number}")
    if kept and rng.random() < _KEPT_SHARE:
        return target.change(rng, rng.choice(kept))
    return target.make(rng)


def fuzz(
    target: Target,
    seed: int,
    *,
    seconds: float = 3600.0,
    executions: int | None = None,
    coverage: Coverage | None = None,
) -> Outcome:
    """Run an open target until the time or the number of executions is over, or it fails."""
    coverage = coverage or Coverage()
    kept: list[bytes] = []

    def outcome(executed: int, finding: Finding | None) -> Outcome:
        return Outcome(executed, time.monotonic() - began_s, finding, len(kept), coverage.lines)

    began_s = told_s = time.monotonic()
    for number in count():
        now_s = time.monotonic()
        if now_s - began_s >= seconds or number == executions:
            break
        if now_s - told_s >= _PROGRESS_EVERY_S and sys.stderr.isatty():
            told_s = now_s
            print(f"\r{target.name}: {number} executions", end="", file=sys.stderr, flush=True)
        data, lines = make_input(target, seed, number, kept), coverage.lines
        with coverage.watching():
            error = error_of(target, data)
        if error is not None:
            return outcome(number + 1, Finding(number, data, error))
        if coverage.lines > lines and not target.is_live:
            kept.append(data)
    try:
        target.check()  # what is only seen after many
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return outcome(number, Finding(number, b"", error))
    return outcome(number, None)


def error_of(target: Target, data: bytes) -> BaseException | None:
    """What a target raises for an input; None if it takes it as it must."""
    try:
        target.run(data)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return error
    return None


def report(target: Target, seed: int, finding: Finding, directory: Path) -> None:
    """Keep the input and say how to see the failure again."""
    number, data, error = finding
    traceback.print_exception(error)
    path = directory / f"fuzz-{target.name}-{seed}-{number}.bin"
    path.write_bytes(data)
    more = "..." if len(data) > _HEX_BYTES_MAX else ""
    print(f"FAILED {target.name} seed={seed} execution={number}: {type(error).__name__}: {error}")
    print(f"  {len(data)} bytes in {path}: {data[:_HEX_BYTES_MAX].hex()}{more}")
    print(f"  replay: python -m tests.fuzz --target {target.name} --input {path}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Run the targets asked for, an equal share of the time each."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--target", default="all", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=float, default=120.0, help="for all targets together")
    parser.add_argument("--seed", type=int, help="default: the time of day")
    parser.add_argument("--input", type=Path, help="one input from a file, instead of random ones")
    parser.add_argument(
        "--findings", type=Path, default=Path(), help="directory for failing inputs"
    )
    options = parser.parse_args(argv)
    names = list(TARGETS) if options.target == "all" else [options.target]
    if options.input is not None:
        if len(names) > 1:
            parser.error("--input needs one --target")
        with TARGETS[names[0]]() as target:
            target.run(options.input.read_bytes())
            target.check()
        print(f"ok {names[0]}")
        return 0

    seed = int(time.time()) if options.seed is None else options.seed
    failed = False
    for name in names:
        with TARGETS[name]() as target:
            outcome = fuzz(target, seed, seconds=options.seconds / len(names))
            if outcome.finding is not None:
                report(target, seed, outcome.finding, options.findings)
                failed = True
            rate = outcome.executions / max(outcome.seconds, 1e-9)
            state = "FAILED" if outcome.finding else "ok"
            print(
                f"{state:6} {name:12} seed={seed} executions={outcome.executions} "
                f"seconds={outcome.seconds:.1f} per_second={rate:.0f} "
                f"lines={outcome.lines} kept={outcome.kept}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    logging.disable()  # what is refused is told thousands of times
    sys.exit(main(sys.argv[1:]))
