"""A few seconds of fuzzing for every place where bytes come in, and proof that a finding is told.

The long run is `make fuzz`. What it once found is a test of the module that was wrong.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import raft_frames
from tests.fuzz import fuzz, main, make_input
from tests.fuzz_targets import TARGETS

SEED = 20261124
# By target: about half a second each.
EXECUTIONS = {
    "requests": 200,
    "commands": 300,
    "replies": 1000,
    "frames": 3000,
    "handshakes": 5000,
    "log": 150,
    "sealed-log": 150,
    "state": 150,
    "backup": 40,
    "sealed-backup": 40,
    "config": 300,
    "client-port": 50,
    "peer-port": 150,
}
LIVE = ("client-port", "peer-port")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.cluster] * (name in LIVE)) for name in TARGETS],
)
def test_target_when_fed_changed_bytes_then_takes_them_as_it_must(name: str) -> None:
    """Refused by name, or taken as what they are; the table of ``fuzz_targets.py`` says which."""
    with TARGETS[name]() as target:
        outcome = fuzz(target, SEED, executions=EXECUTIONS[name])

    if outcome.finding is not None:
        number, data, error = outcome.finding
        raise AssertionError(f"seed={SEED} execution={number}: {data.hex()}") from error
    assert outcome.executions == EXECUTIONS[name]


def test_input_when_made_again_then_the_same() -> None:
    """A seed is enough to see a failure again."""
    with TARGETS["frames"]() as one, TARGETS["frames"]() as other:
        for number in range(20):
            assert make_input(one, 5, number) == make_input(other, 5, number)
        assert make_input(one, 5, 1) != make_input(one, 6, 1)


def test_runner_when_a_target_fails_then_it_keeps_the_input_and_says_how_to_replay_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fuzzer that can't fail proves nothing."""

    def trusting(data: bytes, offset: int) -> list[object]:
        raise KeyError(data[offset])

    monkeypatch.setattr(raft_frames, "decode_entries", trusting)
    options = ["--target", "frames", "--seconds", "20", "--seed", "1", "--findings", str(tmp_path)]

    assert main(options) == 1

    said = capsys.readouterr().out
    replay = re.search(r"replay: python -m tests\.fuzz (--target frames --input \S+)", said)
    assert replay is not None, said
    with pytest.raises((KeyError, IndexError)):
        main(replay[1].split())
    monkeypatch.undo()
    assert main(replay[1].split()) == 0
