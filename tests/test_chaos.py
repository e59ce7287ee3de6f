"""The chaos runs in short, the network that they use, and that a broken store does not get through.

The long ones are `make chaos`. Here the five classes that tell most have ten seconds each.
"""

from __future__ import annotations

import random
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar, cast

import pytest

from cluster_manager import SERVER_SCRIPT
from cluster_nodes import free_ports
from kv_client import KVStoreClient
from kv_config import Address
from kv_errors import KVError, NoSessionError, NoSpaceError, OutcomeUnknownError
from kv_types import Reply
from raft_frames import Hello, encode_handshake
from tests import chaos, chaos_workloads
from tests.chaos import Result, main, run
from tests.chaos_classes import CLASSES
from tests.chaos_links import CLIENT, INSIDE, OUTSIDE, Network, Weather
from tests.chaos_members import transfer_unheard
from tests.chaos_stage import CUT, FaultClass, NotDoneError, Rounds, Stage
from tests.chaos_workloads import Expiry, Notes, StaleReads
from tests.cluster import eventually
from tests.linearizability import Kind

SMOKE = ("kill", "pause", "partition", "snapshot", "transfer")
SMOKE_S = 10.0
BROKEN_S = 2.0
SEED = 7

T = TypeVar("T")


def told(result: Result) -> str:
    return "\n".join([f"kept in {result.kept}", *result.problems, *result.doubts])


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_cluster_when_chaos_reigns_then_clients_see_one_store(name: str) -> None:
    """Every answer that was given is explained, and nothing acknowledged is lost."""
    (fault,) = (fault for fault in CLASSES if fault.name == name)

    result = run(fault, SMOKE_S, SEED)

    assert result.verdict == "passed", told(result)


# ---- What must not pass ------------------------------------------------------------------------


def cut_off_primary(stage: Stage) -> None:
    primary = stage.cluster.primary()
    stage.weather("cut", stage.both_ways([primary], stage.cluster.node_ids), CUT)
    stage.hold(2.5, 3.0)


@pytest.mark.cluster
@pytest.mark.slow
def test_store_that_answers_before_it_replicates_does_not_pass() -> None:
    """What a primary acknowledged by itself is lost when it is cut off, and that is seen."""
    result = run(
        FaultClass("cut off", (cut_off_primary,)),
        BROKEN_S,
        SEED,
        server_args=("--replication", "async"),
    )

    assert result.verdict == "FAILED", told(result)
    assert any("not linearizable" in problem or "lost" in problem for problem in result.problems)
    assert result.kept is not None
    assert (result.kept / "history.jsonl").stat().st_size > 0
    shutil.rmtree(result.kept)


def broken(directory: Path, module: str, sound: str, flaw: str) -> Path:
    """A copy of the server, with one line of it changed."""
    for source in SERVER_SCRIPT.parent.glob("*.py"):
        shutil.copy(source, directory)
    path = directory / module
    text = path.read_text()
    assert text.count(sound) == 1
    path.write_text(text.replace(sound, flaw))
    return directory / SERVER_SCRIPT.name


LEASE = ("--read-mode", "lease")
READ = "if self._lease.is_valid() and core.committed_in_own_term:"
WAIT = "return self._enabled and self._clock() < self._wait_until_s"


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "sound", "flaw", "server_args"),
    [
        ("raft_node.py", READ, "if core.committed_in_own_term:", ()),
        ("raft_watch.py", WAIT, "return False", LEASE),
    ],
    ids=("M6", "lease-not-waited-for"),
)
def test_store_whose_old_primary_answers_reads_does_not_pass(
    tmp_path: Path, module: str, sound: str, flaw: str, server_args: tuple[str, ...]
) -> None:
    """One that has not heard yet that it was replaced answers what it has."""
    result = run(
        FaultClass("unheard", (transfer_unheard,)),
        BROKEN_S,
        SEED,
        server_args=server_args,
        server_script=broken(tmp_path, module, sound, flaw),
    )

    assert result.verdict == "FAILED", told(result)
    assert any("acknowledged before" in p or "linearizable" in p for p in result.problems)
    assert result.kept is not None
    shutil.rmtree(result.kept)


class Worst(random.Random):
    """Of what was not synced, nothing is left."""

    def choice(self, options: Sequence[T]) -> T:  # type: ignore[override]
        return options[0]


def power_of_all(stage: Stage) -> None:
    stage.hold(0.5, 0.5)
    stage.cluster.lose_power(stage.cluster.node_ids, Worst())


@pytest.mark.cluster
@pytest.mark.slow
def test_store_that_does_not_sync_its_log_does_not_pass_when_power_is_lost(tmp_path: Path) -> None:
    """What a majority acknowledged, and none of it has on its disk, is gone."""
    write = "self._write(fd, data, offset, self._disk.{})"
    sound, flaw = write.format("pwrite_durably"), write.format("pwrite")

    result = run(
        FaultClass("power of all", (power_of_all,), loses_power=True),
        BROKEN_S,
        SEED,
        server_script=broken(tmp_path, "replication_log.py", sound, flaw),
    )

    assert result.verdict == "FAILED", told(result)
    # Not that a node did not start, or that the test itself came to grief.
    assert any("not linearizable" in p or "lost" in p for p in result.problems), told(result)
    assert result.kept is not None
    shutil.rmtree(result.kept)


class Primary:
    """Whom a workload asks: it gives the same reply to everything."""

    def __init__(self, reply: Reply) -> None:
        self.call = self.ask = self.get = lambda *_: reply
        self.mget = lambda keys: [reply for _ in keys]


NOBODY: Address = ("127.0.0.1", 1)


def expiry_read(
    monkeypatch: pytest.MonkeyPatch, reply: Reply, set_s_ago: float, ttl_s: float
) -> tuple[Expiry, Notes]:
    """One key, set so long ago, was read once."""
    monkeypatch.setattr(Expiry, "raw", lambda _: Primary(reply))
    notes = Notes()
    expiry = Expiry([NOBODY], notes, SEED)
    at = time.monotonic() - set_s_ago
    expiry.set.append(("k", at, at, ttl_s))
    expiry.clients()[1]()
    return expiry, notes


@pytest.mark.parametrize(
    ("reply", "set_s_ago", "ttl_s", "problem"),
    [
        ("here", 0.0, 60.0, ""),
        (None, 60.0, 1.0, ""),
        (None, 0.0, 60.0, "k expired early"),
        ("here", 60.0, 1.0, "k outlived its time"),
    ],
)
def test_key_that_goes_early_or_stays_too_long_is_noticed(
    monkeypatch: pytest.MonkeyPatch, reply: Reply, set_s_ago: float, ttl_s: float, problem: str
) -> None:
    _, notes = expiry_read(monkeypatch, reply, set_s_ago, ttl_s)

    assert notes.done["expiry: reads"] == 1
    assert [told.partition(",")[0] for told in notes.problems] == ([problem] if problem else [])


def test_key_that_is_there_again_in_the_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    expiry, _ = expiry_read(monkeypatch, None, 60.0, 1.0)

    assert expiry.check(cast("KVStoreClient", Primary(None))) == []
    assert expiry.check(cast("KVStoreClient", Primary("here"))) == ["k came back"]


@pytest.mark.parametrize(("reply", "count"), [("5", 0), ("6", 0), ("4", 1), (None, 1)])
def test_read_that_is_older_than_an_acknowledged_write_is_noticed(
    monkeypatch: pytest.MonkeyPatch, reply: Reply, count: int
) -> None:
    """By the one that asks, and in the end."""
    monkeypatch.setattr(chaos_workloads, "RespConnection", lambda *_, **__: Primary(reply))
    notes = Notes()
    stale = StaleReads([NOBODY], notes, SEED)
    stale._acknowledged = 5
    stale._hunter(NOBODY)()

    assert notes.done["stale reads: reads"] == 1
    assert len(notes.problems) == count
    assert all("5 was acknowledged before" in problem for problem in notes.problems)
    assert len(stale.check(cast("KVStoreClient", Primary(reply)))) == count


def nothing(stage: Stage) -> None:
    stage.hold(0.2, 0.5)


@pytest.mark.cluster
@pytest.mark.slow
def test_run_in_which_one_workload_did_nothing_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the others did: nobody looked for a stale read."""

    def asleep(self: StaleReads, address: Address) -> Callable[[], None]:
        return lambda: None

    monkeypatch.setattr(StaleReads, "_hunter", asleep)

    result = run(FaultClass("nothing", (nothing,), nodes=1), BROKEN_S, SEED)

    assert result.verdict == "INVALID", told(result)
    assert [doubt.partition(" were")[0] for doubt in result.doubts] == [
        "too little traffic: 0 reads of stale reads"
    ]
    assert result.kept is not None
    shutil.rmtree(result.kept)


def refused(stage: Stage) -> None:
    stage.hold(0.2, 0.5)
    raise NotDoneError("no majority is risked")


@pytest.mark.cluster
@pytest.mark.slow
def test_run_in_which_every_fault_was_refused_is_invalid() -> None:
    """A command that was not obeyed is no fault that was survived."""
    result = run(FaultClass("refused", (refused,), nodes=1), BROKEN_S, SEED)

    assert result.verdict == "INVALID", told(result)
    assert "refused came to nothing" in str(result.rounds)
    assert result.doubts == ["nothing failed"]
    assert result.kept is not None
    assert "came to nothing: no majority" in (result.kept / "faults.txt").read_text()
    shutil.rmtree(result.kept)


@pytest.mark.parametrize(
    ("done", "undone", "doubts"),
    [
        ({"a": 3, "b": 1}, {"a": 4}, 0),
        ({"a": 3}, {"b": 1}, 0),
        ({"a": 3}, {"b": 2}, 1),  # of one kind nothing is proved
        ({"a": 2}, {"a": 3}, 1),
        ({}, {"a": 1}, 1),
    ],
)
def test_rounds_when_too_few_took_effect_then_they_are_doubted(
    done: dict[str, int], undone: dict[str, int], doubts: int
) -> None:
    assert len(Rounds(Counter(done), Counter(undone)).doubts()) == doubts


@pytest.mark.cluster
@pytest.mark.slow
def test_run_in_which_a_refusal_has_no_cause_does_not_pass() -> None:
    """A definite error is no excuse: nothing that fails here takes memory."""
    result = run(
        FaultClass("nothing", (nothing,), nodes=1),
        BROKEN_S,
        SEED,
        server_args=("--max-memory", "32KiB"),
    )

    assert result.verdict == "FAILED", told(result)
    assert any("was told OUT_OF_MEMORY" in problem for problem in result.problems)
    assert result.kept is not None
    shutil.rmtree(result.kept)


def test_notes_when_a_request_is_refused_keep_the_code_whoever_asked() -> None:
    """Of requests in a history and of those beside it; a read without an answer is no refusal."""
    notes = Notes()

    def refuse(error: KVError) -> None:
        raise error

    with notes.noting(Kind.WRITE, "k", 1):
        refuse(NoSpaceError("full"))
    with notes.judging():
        refuse(NoSessionError("gone"))
    with notes.judging():
        refuse(OutcomeUnknownError("lost"))

    assert notes.refusals == {"NO_SPACE": "full", "NO_SESSION": "gone"}
    assert notes.counts == {"ok": 0, "definite": 2, "unknown": 0}


# ---- The network -------------------------------------------------------------------------------


class Echo:
    """A node that sends back what it gets."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server((INSIDE, port))
        self.accepted: list[socket.socket] = []

    def accept(self) -> socket.socket:
        self.listener.settimeout(5.0)
        sock, _ = self.listener.accept()
        sock.settimeout(5.0)
        self.accepted.append(sock)
        return sock

    def close(self) -> None:
        for sock in (self.listener, *self.accepted):
            sock.close()


PEER_PORT_OFFSET = 10_000


class Place:
    """A network with one node behind it."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.network = Network(1)
        stack.callback(self.network.close)
        (self.port,) = free_ports(1)
        self.node = Echo(self.port)
        self.peers = Echo(self.port + PEER_PORT_OFFSET)
        stack.callback(self.node.close)
        stack.callback(self.peers.close)
        self.network.serve("b", self.port, self.port + PEER_PORT_OFFSET)

    def dial(self, port: int) -> socket.socket:
        def connected() -> socket.socket | None:
            try:
                return socket.create_connection((OUTSIDE, port), timeout=5.0)
            except ConnectionRefusedError:
                return None

        return self.stack.enter_context(eventually(connected, "the port is open"))

    def link(self, sender: str) -> tuple[socket.socket, socket.socket]:
        """A connection from a node of that name to b: both ends, after the first frame."""
        hello = Hello("a" * 16, "b" * 16, "c" * 16, "d" * 16, False, sender)
        caller = self.dial(self.port + PEER_PORT_OFFSET)
        frame = encode_handshake(hello)
        for byte in frame:  # however it comes
            caller.sendall(bytes([byte]))
        callee = self.peers.accept()
        assert exactly(callee, len(frame)) == frame
        return caller, callee


def exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := sock.recv(count - len(data))):
        data += piece
    return data


def frame_of(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


@pytest.fixture
def place() -> Iterator[Place]:
    """A network with one node behind it, which is called b."""
    with ExitStack() as stack:
        yield Place(stack)


def test_network_when_the_weather_is_fair_carries_all_bytes_both_ways(place: Place) -> None:
    client = place.dial(place.port)
    node = place.node.accept()
    data = bytes(range(256)) * 1000

    client.sendall(data)
    assert exactly(node, len(data)) == data
    node.sendall(data)
    assert exactly(client, len(data)) == data
    client.close()
    assert node.recv(1) == b""


def test_network_when_a_link_is_cut_then_the_others_are_not_and_it_comes_late(
    place: Place,
) -> None:
    """Directed: from a to b is dead, from c to b is well."""
    from_a, at_b = place.link("a")
    from_c, at_b_too = place.link("c")

    place.network.change([("a", "b")], Weather(cut=True))
    from_a.sendall(frame_of(b"late"))
    from_c.sendall(frame_of(b"now"))

    assert exactly(at_b_too, 7) == frame_of(b"now")
    at_b.settimeout(0.1)
    with pytest.raises(TimeoutError):
        at_b.recv(1)
    place.network.heal()
    at_b.settimeout(5.0)
    assert exactly(at_b, 8) == frame_of(b"late")


def test_network_when_frames_are_lost_then_whole_ones(place: Place) -> None:
    caller, callee = place.link("a")

    place.network.change([("a", "b")], Weather(lose=1.0))
    caller.sendall(frame_of(b"lost") + frame_of(b"cut")[:5])
    for _ in range(2):  # the second order comes after all that had arrived at the first one
        place.network.change([], Weather())
    place.network.change([("a", "b")], Weather(repeat=1.0))
    caller.sendall(b"ut")

    assert exactly(callee, 14) == frame_of(b"cut") * 2


def test_network_when_it_delays_then_it_takes_that_long(place: Place) -> None:
    client = place.dial(place.port)
    node = place.node.accept()

    place.network.change([(CLIENT, "b")], Weather(delay_s=0.2))
    began = time.monotonic()
    client.sendall(b"x")
    assert exactly(node, 1) == b"x"

    assert time.monotonic() - began >= 0.2


def test_network_when_connections_are_reset_or_half_open_then_the_ends_see_that(
    place: Place,
) -> None:
    first, second = place.dial(place.port), place.dial(place.port)
    ends = {sock.getpeername(): sock for sock in (place.node.accept(), place.node.accept())}

    place.network.half_open(lambda link: link == (CLIENT, "b"))
    first.sendall(b"into the void")
    assert [end.recv(1) for end in ends.values()] == [b"", b""]
    third = place.dial(place.port)
    place.node.accept()
    place.network.reset(lambda link: link == (CLIENT, "b"))

    for sock in (first, second, third):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_network_when_the_node_is_gone_then_it_refuses_until_it_is_back(place: Place) -> None:
    """The evidence by which a peer knows that the process has died."""
    place.dial(place.port)
    place.node.accept()
    place.node.close()
    with pytest.raises(ConnectionResetError):
        place.dial(place.port).recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((OUTSIDE, place.port), timeout=5.0)

    place.node = Echo(place.port)
    place.stack.callback(place.node.close)

    client = place.dial(place.port)
    client.sendall(b"x")
    assert exactly(place.node.accept(), 1) == b"x"


# ---- The program -------------------------------------------------------------------------------


def test_program_when_asked_for_a_list_then_says_what_each_class_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--list"]) == 0

    said = capsys.readouterr().out
    assert all(f"{fault.name}:\n  F" in said for fault in CLASSES)


def test_program_when_all_stands_among_names_then_runs_each_class_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a name that does not exist runs nothing."""
    ran: list[str] = []

    def noted(fault: FaultClass, seconds: float, seed: int, **_: object) -> Result:
        ran.append(fault.name)
        return Result(fault.name, seed)

    monkeypatch.setattr(chaos, "run", noted)

    assert main(["--class", "all,kill"]) == 0
    assert ran == [fault.name for fault in CLASSES]
    with pytest.raises(SystemExit):
        main(["--class", "kill,kil"])
    assert "there is no class kil" in capsys.readouterr().err
    assert len(ran) == len(CLASSES)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "verdict"), [(ZeroDivisionError, "FAILED"), (KeyboardInterrupt, "INVALID")]
)
def test_run_when_it_does_not_come_to_its_end_then_what_is_known_is_kept(
    error: type[BaseException], verdict: str
) -> None:
    """Whatever ended it: what was a mistake of the test may have hidden one of the store."""

    def broken(stage: Stage) -> None:
        raise error

    result = run(FaultClass("broken", (broken,), nodes=1), BROKEN_S, SEED)

    assert result.verdict == verdict
    assert result.kept is not None
    assert (result.kept / "verdict.txt").read_text().count("\n") > 1
    assert (result.kept / "history.jsonl").stat().st_size > 0
    shutil.rmtree(result.kept)


# ---- The verdict -------------------------------------------------------------------------------


def test_result_when_there_are_problems_or_doubts_is_no_pass() -> None:
    assert Result("a", 1).verdict == "passed"
    assert Result("a", 1, doubts=["too little traffic"]).verdict == "INVALID"
    assert Result("a", 1, doubts=["undecided"], problems=["lost"]).verdict == "FAILED"
    statuses = {
        Result("a", 1, doubts=["d"]).exit_status,
        Result("a", 1, problems=["p"]).exit_status,
    }
    assert statuses == {1, 2}
