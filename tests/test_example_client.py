"""The demonstrations, the prompt and the loader, on nodes that fail on command."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import example_client
from cluster_manager import ClusterManager
from example_client import ClaimError, KVStoreClient, help_text, main, parse_line, show
from kv_commands import COMMANDS
from kv_errors import BadRequestError, BusyError, NoSpaceError, TooLargeError
from tests.fake_cluster import FakeCluster, Fault, free_address


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster() as nodes:
        yield nodes


def run(cluster: FakeCluster, *arguments: str) -> int:
    return main([*arguments, "--nodes", ",".join(cluster.addresses)])


# ---- Demonstrations ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["basic", "replication", "json", "concurrent"])
def test_demo_when_all_holds_then_says_so_and_leaves_no_key(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A demonstration checks what it says, and removes what it stored."""
    assert run(cluster, "--demo", name) == 0

    assert "All claims held." in capsys.readouterr().out
    assert len(cluster.store) == 0


def test_demo_when_a_claim_is_false_then_exits_with_1(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is claimed that was not seen; the keys are removed all the same."""
    monkeypatch.setattr(KVStoreClient, "exists", lambda client, *keys: len(keys))

    assert run(cluster, "--demo", "basic") == 1

    assert "This does not hold: one of two keys exists" in capsys.readouterr().err
    assert len(cluster.store) == 0


def test_demo_when_the_nodes_differ_then_replication_is_not_claimed(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal applied index means equal state hash (promise G6), or the demonstration fails."""
    monkeypatch.setattr(example_client, "SETTLE_TIMEOUT_S", 0.1)
    cluster.forged_hash = {"node3": "0" * 16}

    with KVStoreClient(cluster.addresses) as client, pytest.raises(ClaimError, match="same data"):
        example_client.demo_replication(client)


@pytest.mark.slow
@pytest.mark.cluster
def test_all_demos_when_a_real_cluster_runs_then_hold_and_kill_none_of_its_nodes(
    tmp_path: Path,
) -> None:
    """The failover demonstration kills a node of the cluster that it started itself, no other."""
    manager = ClusterManager(nodes=3, base_port=None, data_dir=tmp_path)
    manager.start()
    try:
        before = [node.pid for node in manager.status().nodes]
        nodes = ",".join(f"{host}:{port}" for host, port in manager.addresses)

        assert main(["--demo", "all", "--nodes", nodes]) == 0

        assert [node.pid for node in manager.status().nodes] == before
        with KVStoreClient(nodes.split(",")) as client:
            assert client.keys() == []
    finally:
        manager.stop()


@pytest.mark.parametrize("arguments", [("--demo", "basic"), ("--load", __file__)])
def test_any_action_when_no_cluster_runs_then_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    """The first thing that goes wrong for everyone has the most helpful message."""
    monkeypatch.setattr(example_client, "CALL_TIMEOUT_S", 0.1)
    monkeypatch.setattr(example_client, "LOAD_TIMEOUT_S", 0.1)

    assert main([*arguments, "--nodes", free_address()]) == 1

    assert "python cluster_manager.py --action start" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--demo", "nothing"),
        ("--demo", "basic", "--load", "file"),
        ("--demo", "basic", "--key-field", "id"),
        ("--demo", "basic", "--nodes", "localhost"),
    ],
    ids=" ".join,
)
def test_arguments_when_wrong_then_exits_with_2(arguments: tuple[str, ...]) -> None:
    """Wrong usage has an exit status of its own."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)

    assert exited.value.code == 2


# ---- The prompt ----------------------------------------------------------------------------------


def interact(
    cluster: FakeCluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *lines: str,
) -> str:
    """What is printed for lines that come from a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert run(cluster, "--demo", "interactive") == 0
    return capsys.readouterr().out


def test_prompt_when_asked_then_tells_reply_node_and_time(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer comes with the node that gave it and the milliseconds it took."""
    out = interact(cluster, capsys, monkeypatch, 'set doc {"a": 1}', "", "GET doc", "GET nothing")

    node = re.escape(cluster.addresses[0])
    told = re.sub(rf"\n  \[{node}, [0-9.]+ ms\]\n", "|", out)
    assert told == 'OK|{\n  "a": 1\n}|(nothing)|'


def test_prompt_when_a_request_fails_then_goes_on(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error is an answer, and quit ends the session."""
    bad = ["NOSUCH x", "SET k", "INCR", 'GET "x', "GET / HTTP/1.1", "*1", "READONLY", "SET k text"]
    out = interact(cluster, capsys, monkeypatch, *bad, "INCR k", "GET k", "quit", "GET k")

    assert out.count("(BAD_REQUEST)") == 8
    assert out.count('"text"') == 1


def test_prompt_when_the_primary_dies_then_goes_on_with_the_next(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failover between two lines is not seen, but for the node that answers."""

    def typed() -> Iterator[str]:
        yield "INCR n"
        cluster.nodes[0].kill()
        cluster.primary = cluster.nodes[1]
        yield "INCR n"

    with KVStoreClient(cluster.addresses) as client:
        example_client.interact(client, typed())

    first, second = re.findall(r"(\d)\n  \[(\S+),", capsys.readouterr().out)
    assert first == ("1", cluster.addresses[0])
    assert second == ("2", cluster.addresses[1])


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "PURGE"])
def test_help_when_asked_for_a_command_then_shows_its_usage(name: str) -> None:
    """There is help for every command, and none for what only servers write."""
    assert COMMANDS[name].usage in help_text(name)
    assert re.search(rf"^  {name} ", help_text(None), re.MULTILINE)


@pytest.mark.parametrize("name", ["PURGE", "NOSUCH"])
def test_help_when_there_is_no_such_command_then_says_so(name: str) -> None:
    """Internal commands are not offered."""
    assert help_text(name) == f"No command {name}."
    assert f"{name} " not in help_text(None)


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        ("", []),
        ("  \n", []),
        ("get k\n", [b"get", b"k"]),
        ('SET k {"a": [1,  2]}', [b"SET", b"k", b'{"a": [1,  2]}']),
        ('DEL "two words" c', [b"DEL", b"two words", b"c"]),
        ("*3 x", [b"*3", b"x"]),
        ("GET \udcff", [b"GET", b"\xff"]),
    ],
)
def test_line_when_parsed_then_is_what_a_node_would_read(line: str, argv: list[bytes]) -> None:
    """The prompt has the grammar of the line language."""
    assert parse_line(line) == argv


def test_reply_when_shown_then_types_can_be_told_apart() -> None:
    """Text is quoted, numbers are not; lists are numbered; text of several lines stays so."""
    assert show(b"5") == "5"
    assert show(b'"5"') == '"5"'
    assert show(b"text") == '"text"'
    assert show(b"a:1\r\nb:2\r\n") == "a:1\r\nb:2"
    assert show([b"a", None, 3]) == '1) "a"\n2) (nothing)\n3) 3'
    assert show([[1, 2], b'{"a": 1}']) == '1) 1) 1\n   2) 2\n2) {\n     "a": 1\n   }'
    assert show([]) == "(none)"
    assert show({b"a": 1}) == '"a": 1'
    assert show(BadRequestError("no")) == "(BAD_REQUEST) no"


@pytest.mark.slow
def test_prompt_when_typed_at_then_remembers_lines_and_survives_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are kept for the next session; Ctrl-C drops the one begun, Ctrl-D ends."""
    monkeypatch.setattr(example_client, "HISTORY_FILE", tmp_path / "history")
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text("GET k\nhalf a line\x03GET m\n\x04")

        assert list(example_client.lines_from_prompt()) == ["GET k", "GET m"]
    assert "+GET k" in (tmp_path / "history").read_text()


def test_tab_when_pressed_then_offers_every_command_and_help_for_it() -> None:
    """Completion knows the command table, less what only servers write, or is no use here."""
    offered = example_client.completions()

    no_use = {"HELLO", "CLIENT", "READONLY", "READWRITE", "RESET", "BACKUP"}
    assert offered.keys() == COMMANDS.keys() - {"PURGE"} - no_use | {"help"}
    assert offered["HELP"] == offered["help"] == dict.fromkeys(COMMANDS.keys() - {"PURGE"})
    assert offered["GET"] is None


# ---- The loader ----------------------------------------------------------------------------------


def jsonl(path: Path, *lines: object) -> Path:
    file = path / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(text + "\n" for text in texts))
    return file


def pairs(count: int) -> list[object]:
    return [{"key": f"k{number}", "value": {"number": number}} for number in range(count)]


def value(cluster: FakeCluster, key: str) -> object:
    with KVStoreClient(cluster.addresses) as client:
        return client.get(key)


def test_load_when_all_is_well_then_stores_every_line(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line of output tells how many were stored; no progress file stays."""
    file = jsonl(tmp_path, *pairs(1203))

    assert run(cluster, "--load", str(file)) == 0

    assert len(cluster.store) == 1203
    assert value(cluster, "k1202") == {"number": 1202}
    assert "Stored 1,203 of 1,203 lines" in capsys.readouterr().out.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [file]


def test_load_when_a_key_field_is_named_then_stores_whole_objects(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    """Any JSON object can be stored under one of its fields."""
    file = jsonl(tmp_path, {"id": 7, "name": "Ada"}, "", {"id": "x", "name": "Bob"})

    assert run(cluster, "--load", str(file), "--key-field", "id") == 0

    assert value(cluster, "7") == {"id": 7, "name": "Ada"}
    assert value(cluster, "x") == {"id": "x", "name": "Bob"}


def test_load_when_a_value_is_empty_text_then_it_is_stored(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a value like any other, and "Stored" counts it. (It was left out without a word.)"""
    file = jsonl(tmp_path, {"key": "e", "value": ""}, {"key": "e2", "value": "x"})

    assert run(cluster, "--load", str(file)) == 0

    assert value(cluster, "e") == ""
    assert "Stored 2 of 2 lines" in capsys.readouterr().out


def test_load_when_more_lines_are_bad_than_are_told_then_says_that_there_are(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who mends the five that are named is not to believe that it was all."""
    file = jsonl(tmp_path, *["{"] * 7)

    assert run(cluster, "--load", str(file)) == 1

    out = capsys.readouterr().out
    assert "line 5:" in out and "line 6:" not in out
    assert out.count("and more, which are counted only") == 1
    assert "7 bad" in out


def test_nodes_when_malformed_then_the_argument_and_what_is_expected_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In words for a person."""
    with pytest.raises(SystemExit):
        main(["--demo", "basic", "--nodes", "nohost"])

    assert "argument --nodes: expected HOST:PORT, not 'nohost'" in capsys.readouterr().err


def test_load_when_lines_are_bad_then_stores_the_others_and_tells(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad line costs itself only, is named by its number, and makes the exit status 1."""
    bad = ["{", "[1]", '{"key": 1}', '{"key": null, "value": 1}', '{"key": "n", "value": NaN}']
    file = jsonl(tmp_path, {"key": "a", "value": 1}, *bad, {"key": "b", "value": 2})

    assert run(cluster, "--load", str(file)) == 1

    out = capsys.readouterr().out
    assert "Stored 2 of 7 lines" in out and "5 bad" in out
    assert [f"line {number}: " in out for number in range(1, 8)] == [False, *[True] * 5, False]
    assert len(cluster.store) == 2


def test_load_when_a_node_refuses_a_line_then_it_counts_as_bad(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would be refused again tomorrow does not stop the others."""
    file = jsonl(tmp_path, *pairs(10))
    cluster.faults.append(TooLargeError("the request is too large"))

    assert run(cluster, "--load", str(file)) == 1

    out = capsys.readouterr().out
    assert "line 1: the request is too large" in out
    assert "Stored 9 of 10 lines" in out


@pytest.mark.slow
def test_load_when_stopped_then_the_same_command_goes_on(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was acknowledged is not sent again, and the count is that of the whole file."""
    file = jsonl(tmp_path, *pairs(1200))
    with KVStoreClient(cluster.addresses) as client:
        client.get("warm up")  # so that the next faults meet the load
    no_fault: list[Fault | NoSpaceError | None] = [None] * 500
    cluster.faults.extend([*no_fault, NoSpaceError("the disk is full")])

    assert run(cluster, "--load", str(file)) == 1
    stored_first = cluster.done["SET"]
    assert "the disk is full" in capsys.readouterr().err

    assert run(cluster, "--load", str(file)) == 0
    assert cluster.done["SET"] == stored_first + 700
    out = capsys.readouterr().out
    assert "Resuming after line 500" in out
    assert "Stored 1,200 of 1,200 lines" in out
    assert len(cluster.store) == 1200
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("progress", ["{", '{"offset": 1}', "[]"])
def test_load_when_the_progress_file_is_damaged_then_says_what_to_do(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: str
) -> None:
    """Nothing is guessed about what was stored."""
    file = jsonl(tmp_path, *pairs(1))
    (tmp_path / "data.jsonl.progress").write_text(progress)

    assert run(cluster, "--load", str(file)) == 1

    assert "data.jsonl.progress" in capsys.readouterr().err


def test_load_when_the_file_has_changed_then_does_not_resume(
    cluster: FakeCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A position that is not the end of a line of this file is of another file."""
    file = jsonl(tmp_path, *pairs(2))
    position = example_client.LoadPosition("c" * 16, offset=3, lines=1, stored=1)
    position.save(tmp_path / "data.jsonl.progress")

    assert run(cluster, "--load", str(file)) == 1

    assert "has changed" in capsys.readouterr().err


def test_load_when_the_cluster_is_another_then_starts_afresh(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    """Progress counts for the cluster that holds the data."""
    file = jsonl(tmp_path, *pairs(3))
    position = example_client.LoadPosition("d" * 16, offset=file.stat().st_size, lines=3, stored=3)
    position.save(tmp_path / "data.jsonl.progress")

    assert run(cluster, "--load", str(file)) == 0

    assert len(cluster.store) == 3


@pytest.mark.slow
def test_load_when_the_primary_dies_then_goes_on_with_the_next(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    """A batch whose answers are lost is sent again, and each line is stored once."""
    file = jsonl(tmp_path, *pairs(1200))
    cluster.faults.extend([None] * 700)
    cluster.faults.append(Fault.DONE_AND_DROPPED)

    assert run(cluster, "--load", str(file)) == 0

    assert len(cluster.store) == 1200
    assert cluster.done["SET"] == 1200
    assert cluster.received["node1"] > 1201  # and the session


def test_load_when_a_key_comes_twice_then_the_last_line_wins(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    """A batch has no order around a failover, so it never holds a key twice."""
    lines = [{"key": "k", "value": number} for number in range(5)]
    # Refused for a moment: sent with the others, it would be stored after them.
    cluster.faults.append(BusyError("the queue is full"))

    assert run(cluster, "--load", str(jsonl(tmp_path, *lines))) == 0

    assert value(cluster, "k") == 4
