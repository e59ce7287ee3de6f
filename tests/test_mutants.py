"""The mutants can still be made, and the machinery that judges them is not fooled.

That each is caught is shown by `make mutants`, which takes minutes.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.mutant_table import MUTANTS, SIMULATION, Mutant
from tests.mutants import ROOT, apply, copy_tree, judge, switches

EVERY = [*MUTANTS, *switches()]


def test_every_mutant_changes_one_place_of_the_present_source(tmp_path: Path) -> None:
    """Whoever changes that place changes its mutant too, or there would be one proof less."""
    for mutant in MUTANTS:
        shutil.copy(ROOT / mutant.file, tmp_path / mutant.file)
        apply(mutant, tmp_path)
        assert mutant.old != mutant.new


def test_every_mutant_names_tests_that_there_are() -> None:
    """And every mutant of the fault model is there, under a name of its own."""
    names = [mutant.name for mutant in EVERY]
    assert len(set(names)) == len(names)
    assert {f"M{number}" for number in range(1, 22)} <= set(names)
    for command in {command for mutant in EVERY for command in mutant.commands}:
        if command != SIMULATION:
            file, _, test = command.partition("::")
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), command


def test_every_mutant_is_in_the_table_of_the_testing_guide() -> None:
    """With what was measured, and what it does."""
    page = (ROOT / "docs" / "TESTING_GUIDE.md").read_text()

    missing = [m.name for m in EVERY if f"| {m.name} | {m.what} | " not in page]
    assert not missing
    assert all(len(m.what) > 10 for m in EVERY)
    assert "**not caught**" not in page


QUICK = "tests/test_raft_log.py::test_up_to_date_compares_last_terms_then_lengths"
UP_TO_DATE = "        return (last_term, last_index) >= (self.last_term, self.last_index)\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("new", "caught", "by"),
    [
        ("        return last_index >= self.last_index\n", True, QUICK),
        ("        return not (last_term, last_index) < (self.last_term, self.last_index)\n", False, "passed"),
        ("        return last_of_all_terms >= self.last_term\n", False, "broken: NameError"),
    ],
    ids=["wrong", "the same", "no such name"],
)  # fmt: skip
def test_mutant_when_judged_then_only_a_test_that_runs_and_fails_catches_it(
    tmp_path: Path, new: str, caught: bool, by: str
) -> None:
    """A mutant that can't run proves nothing, and one that does no harm must be told."""
    mutant = Mutant("quick", "", "raft_log.py", UP_TO_DATE, new, (QUICK,))

    (verdict,) = judge(mutant, copy_tree(tmp_path / "unmutated"))

    assert verdict.caught is caught
    assert verdict.by.startswith(by)


def test_mutant_when_its_text_is_not_there_just_once_then_refused(tmp_path: Path) -> None:
    """It would change nothing, or more than it says."""
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")

    for old in ("x = 1\n", "y = 1\n"):
        with pytest.raises(ValueError, match="its text stands"):
            apply(Mutant("two", "", "a.py", old, "z = 1\n", ()), tmp_path)
