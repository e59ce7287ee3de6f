"""Stores that are broken on purpose, and the proof that the tests notice; `make mutants`.

    python -m tests.mutants --only M4 --only M9 --jobs 2 --markdown mutants.md

Each mutant of ``mutant_table.py`` changes one place of the source in a copy of the tree; those of
``test_raft_simulation.py`` change the simulated core by a switch. Then the commands run that are to
notice: a simulation until the first seed that shows it, or the named tests. Before that they must
all pass on a copy without a change.

Rule 1: caught is only what fails in a test that runs: an assertion, a violated invariant, an
exception of the product. A file that can't be imported, or a name that isn't there, catches nothing.
Rule 2: every command of a mutant has to catch it, else its row would claim too much.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.mutant_table import MUTANTS, SIMULATION, Mutant
from tests.simulator import BROKEN, first_violation
from tests.test_raft_simulation import MUTANTS as SWITCHES

ROOT: Final = Path(__file__).resolve().parent.parent
SEEDS_MAX: Final = 600
COMMAND_SECONDS_MAX: Final = 900
TEST_SECONDS_MAX: Final = 100
TEXT_MAX: Final = 130  # of what a simulation says, in the table

# An exit status of the simulation in a process of its own.
_HELD, _CAUGHT = 0, 10
# What says that the mutant itself is broken, not that it was caught.
_BROKEN: Final = re.compile(
    rf"\b({'|'.join(error.__name__ for error in BROKEN)})\b"
    r"|\b(IndentationError|ModuleNotFoundError|UnboundLocalError)\b"
)


class Verdict(NamedTuple):
    """What one command said of one mutant."""

    caught: bool
    by: str  # the test or invariant; or why not
    seconds: float


# ---- The tree ----------------------------------------------------------------------------------


def apply(mutant: Mutant, tree: Path) -> None:
    """Change the source in ``tree``. Raises ValueError unless the text stands there just once."""
    path = tree / mutant.file
    source = path.read_text()
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.name}: its text stands {count} times in {mutant.file}")
    changed = source.replace(mutant.old, mutant.new)
    ast.parse(changed, filename=mutant.file)
    path.write_text(changed)


def copy_tree(to: Path, tree: Path = ROOT) -> Path:
    """What the tests need of a tree, by default of this working tree."""
    to.mkdir()
    for path in [*tree.glob("*.py"), tree / "pyproject.toml"]:
        shutil.copy(path, to / path.name)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("tests", "benchmarks"):
        shutil.copytree(tree / name, to / name, ignore=ignored)
    return to


# ---- Commands ----------------------------------------------------------------------------------


def verdict_of(command: str, tree: Path, switch: str = "") -> Verdict:
    """Run one command in a tree."""
    began_s = time.monotonic()
    if command == SIMULATION:
        caught, by = _simulated(tree, switch)
    else:
        caught, by = _tested(command, tree)
    return Verdict(caught, by, time.monotonic() - began_s)


def _run(arguments: Sequence[str], tree: Path) -> subprocess.CompletedProcess[str] | None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None


def _simulated(tree: Path, switch: str) -> tuple[bool, str]:
    done = _run(["tests.mutants", "--simulate", "--switch", switch], tree)
    if done is None:
        return False, f"broken: no end in {COMMAND_SECONDS_MAX} s"
    if done.returncode not in (_HELD, _CAUGHT):
        return False, f"broken: {done.stderr.strip().splitlines()[-1:]}"
    said = json.loads(done.stdout)
    if said["is_broken"]:
        return False, f"broken: {said['violation']}"
    if done.returncode == _HELD:
        return False, f"not in {said['seeds']} seeds"
    return True, f"simulation seeds={said['seeds']}: {said['violation']}"


def _tested(command: str, tree: Path) -> tuple[bool, str]:
    options = ["-x", "-q", "-p", "no:cacheprovider", "-o", f"timeout={TEST_SECONDS_MAX}", "-rf"]
    done = _run(["pytest", *options, *command.split()], tree)
    if done is None:
        return False, f"broken: no end in {COMMAND_SECONDS_MAX} s"
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == pytest.ExitCode.OK:
        return False, f"passed: {command}"
    if done.returncode != pytest.ExitCode.TESTS_FAILED or failed is None:
        return False, f"broken: {(done.stdout + done.stderr)[-600:]}"
    # Of the traceback: the summary leaves the error out where a test's name is long.
    for error in re.findall(r"^E  .*", done.stdout, re.MULTILINE):
        if _BROKEN.search(error):
            return False, f"broken: {error.removeprefix('E').strip()}"
    return True, failed[1]


def simulate(switch: str) -> int:
    """In a process of its own: seeds until the first that shows a violation, told as JSON."""
    patch = pytest.MonkeyPatch()
    for mutate in SWITCHES:
        if mutate.__name__ == switch:
            mutate(patch)
    seeds, error = first_violation(range(SEEDS_MAX))
    violation = "" if error is None else str(error).splitlines()[0].partition(": ")[2]
    is_broken = error is not None and isinstance(error.__cause__, BROKEN)
    print(json.dumps({"seeds": seeds, "violation": violation, "is_broken": is_broken}))
    return _HELD if error is None else _CAUGHT


# ---- All mutants -------------------------------------------------------------------------------


def switches() -> list[Mutant]:
    """The mutants that the simulation's own tests switch on; they change no file."""
    found = []
    for mutate in SWITCHES:
        rule, _, what = (mutate.__doc__ or "").strip().partition(": ")
        found.append(
            Mutant(mutate.__name__, f"{what.rstrip('.')} ({rule})", "", "", "", (SIMULATION,))
        )
    return found


def judge(mutant: Mutant, unmutated: Path) -> list[Verdict]:
    """Apply a mutant to a copy of this tree beside it, and run its commands there."""
    tree = copy_tree(unmutated.with_name(mutant.name), unmutated)
    if mutant.file:
        apply(mutant, tree)
    switch = "" if mutant.file else mutant.name
    verdicts = [verdict_of(command, tree, switch) for command in mutant.commands]
    shutil.rmtree(tree)
    return verdicts


def check_unmutated(mutants: Iterable[Mutant], tree: Path) -> str:
    """Why the commands do not pass on an unchanged tree; "" if they do."""
    commands = dict.fromkeys(command for mutant in mutants for command in mutant.commands)
    tests = [command for command in commands if command != SIMULATION]
    wanted = [SIMULATION] * (SIMULATION in commands) + ([" ".join(tests)] if tests else [])
    for command in wanted:
        verdict = verdict_of(command, tree)
        held = verdict.by.startswith(("not in", "passed"))
        print(f"unmutated: {'ok' if held else 'FAILED'} {verdict.seconds:.0f} s", flush=True)
        if not held:
            return verdict.by
    return ""


def as_markdown(rows: Sequence[tuple[Mutant, list[Verdict]]]) -> str:
    """The table of the testing guide."""
    lines = ["| mutant | what it does | caught by |", "|---|---|---|"]
    for mutant, verdicts in rows:
        caught_by = "; ".join(map(_cell, verdicts))
        lines.append(f"| {mutant.name} | {mutant.what} | {caught_by} |")
    return "\n".join(lines) + "\n"


def _cell(verdict: Verdict) -> str:
    by = verdict.by.removeprefix("tests/").partition("[")[0]
    by = f"`{by}`" if "::" in by else verdict.by[:TEXT_MAX]
    by = by.replace("|", "/").replace("\n", " ").replace("ViolationError ", "")
    return f"{by}, {verdict.seconds:.1f} s" if verdict.caught else f"**not caught**: {by}"


def main(argv: Sequence[str]) -> int:
    """Judge all mutants, or those that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("--only", action="append", help="a mutant by its name; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--simulate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--switch", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.simulate:
        return simulate(options.switch)
    known = [*MUTANTS, *switches()]
    unknown = set(options.only or ()) - {mutant.name for mutant in known}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in known if not options.only or mutant.name in options.only]
    directory = Path(tempfile.mkdtemp(prefix="kv-mutants-"))
    try:
        return _judge_all(chosen, directory, options.jobs, options.markdown)
    finally:
        shutil.rmtree(directory)


def _judge_all(chosen: Sequence[Mutant], directory: Path, jobs: int, markdown: Path | None) -> int:
    # Once, so that the working tree may change meanwhile.
    unmutated = copy_tree(directory / "unmutated")
    problem = check_unmutated(chosen, unmutated)
    if problem:
        print(f"the tests fail without a mutant: {problem}")
        return 1
    rows = {}
    with ThreadPoolExecutor(jobs) as pool:
        judged = {pool.submit(judge, mutant, unmutated): mutant for mutant in chosen}
        for number, future in enumerate(as_completed(judged), 1):
            mutant, verdicts = judged[future], future.result()
            rows[mutant.name] = verdicts
            for caught, by, seconds in verdicts:
                state = "caught" if caught else "SURVIVED"
                print(
                    f"{number}/{len(chosen)} {state:8} {mutant.name} {seconds:.1f} s {by}",
                    flush=True,
                )
    ordered = [(mutant, rows[mutant.name]) for mutant in chosen]
    if markdown is not None:
        markdown.write_text(as_markdown(ordered))
    survivors = [m.name for m, verdicts in ordered if not all(v.caught for v in verdicts)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught", *survivors)
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
