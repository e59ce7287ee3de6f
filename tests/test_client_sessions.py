"""Exactly once: what is sent under a serial is done once, and answered the same ever after.

The rules one by one, then random histories with lost answers, duplicates, reordering, failovers and
snapshots, and the mutants that those must catch (fault-model M12, M13). Source: thesis 6.3.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import kv_client_sessions
from kv_client_sessions import (
    ANSWERS_BYTES_MAX,
    SERIALS_MAX,
    SESSION_TTL_MS,
    Write,
)
from kv_commands import Once, encode_payload
from kv_errors import KVError
from kv_store import KeyValueStore
from kv_types import OK, RepeatedReply, Reply
from tests.states import Rows

ROOT = Path(__file__).resolve().parent.parent
NOW = 1_700_000_000_000


class Node:
    """A store, a clock that stands still until it is set, and one session."""

    def __init__(self) -> None:
        self.store = KeyValueStore()
        self.now_ms = NOW
        self.session = self.open()

    def write(self, *argv: bytes) -> Reply:
        """The reply to the next entry; an error as ``CODE text``."""
        reply = self.store.apply(self.store.applied_index + 1, encode_payload(self.now_ms, argv))
        assert self.store.state_hash == self.store.recompute_state_hash()
        return told(reply)

    def open(self) -> int:
        session = self.write(b"SESSION", b"OPEN")
        assert isinstance(session, int)
        return session

    def do(self, serial: int, line: str, first: int = 1, session: int | None = None) -> Reply:
        """The reply to ``line`` under ``serial``; of one that came again, in a list."""
        numbers = (session or self.session, serial, first)
        return self.write(b"SESSION", b"DO", *(b"%d" % n for n in numbers), *words(line))

    def get(self, key: bytes) -> Reply:
        return self.store.read([b"GET", key], self.now_ms)


def words(line: str) -> list[bytes]:
    return [word.encode() for word in line.split()]


def told(reply: Reply) -> Reply:
    if isinstance(reply, RepeatedReply):
        return ["again", told(reply.reply)]
    return f"{reply.code} {reply}" if isinstance(reply, KVError) else reply


@pytest.fixture
def node() -> Node:
    return Node()


# ---- Once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "line", "reply"),
    [
        ("SET k 1", "INCR k", 2),
        ("SET k 1", "APPEND k 23", 3),
        ("SET k 1", "GETSET k 2", b"1"),
        ("SET k 1", "GETDEL k", b"1"),
        ("SET k 1", "DEL k", 1),
        ("DEL k", "SET k 1 NX", OK),
        ("SET k 1", "SET k 2 NX", None),
        ("SET k 1", "SET k 2 IFEQ 1 GET", b"1"),
        ("SET k 1", "MSET k 2 l 3", OK),
        ("SET k 1", "FLUSHALL", OK),
        ("SET k 1", "PEXPIRE k 100 NX", 1),
        ("SET k x", "INCR k", "BAD_REQUEST value is not an integer or out of range"),
    ],
)
def test_serial_when_it_comes_again_then_the_first_answer_and_nothing_else(
    node: Node, before: str, line: str, reply: Reply
) -> None:
    """A command of any kind is done once; an error of its own is an answer like any other (T54)."""
    node.write(*words(before))
    assert node.do(1, line) == reply
    done = (node.store.state_hash, node.store.memory_bytes, node.get(b"k"))

    assert node.do(1, line) == ["again", reply]
    assert node.do(1, line) == ["again", reply]
    assert (node.store.state_hash, node.store.memory_bytes, node.get(b"k")) == done


def test_cas_when_it_comes_again_after_it_succeeded_then_has_succeeded(node: Node) -> None:
    """Done anew it would find its own write, and say MISMATCH. Source: raft-traps T54."""
    version = node.do(1, "CAS k 0 x")

    assert node.do(1, "CAS k 0 x") == ["again", version]
    refused = node.do(2, "CAS k 0 y")
    assert refused == f"MISMATCH the key is at version {version}, not at version 0"
    node.write(b"DEL", b"k")
    assert node.do(2, "CAS k 0 y") == ["again", refused]
    assert node.get(b"k") is None


def test_mismatch_when_it_comes_again_then_still_tells_the_version_it_had_found(node: Node) -> None:
    """The answer is kept whole, not just its text."""
    node.write(b"SET", b"k", b"1")
    argv = [b"SESSION", b"DO", b"%d" % node.session, b"1", b"1", b"CAS", b"k", b"99", b"x"]

    first = node.store.apply(node.store.applied_index + 1, encode_payload(NOW, argv))
    again = node.store.apply(node.store.applied_index + 1, encode_payload(NOW, argv))

    assert isinstance(again, RepeatedReply)
    assert vars(again.reply) == vars(first) == {"version": 2}
    assert again.index == node.store.applied_index - 1


def test_serials_when_they_come_in_any_order_then_each_is_done_once(node: Node) -> None:
    """Several may be under way at once, on connections that overtake each other."""
    assert [node.do(serial, f"APPEND k {serial}") for serial in (3, 1, 2)] == [1, 2, 3]
    assert node.get(b"k") == b"312"

    assert [node.do(serial, f"APPEND k {serial}") for serial in (1, 2, 3)] == [
        ["again", 2],
        ["again", 3],
        ["again", 1],
    ]


def test_serials_when_of_two_sessions_then_are_not_mixed_up(node: Node) -> None:
    """A serial means something within its session only."""
    other = node.open()

    assert node.do(1, "INCR n") == 1
    assert node.do(1, "INCR n", session=other) == 2
    assert node.do(1, "INCR n") == ["again", 1]


# ---- What is forgotten ---------------------------------------------------------------------------


def test_answers_when_the_client_has_them_then_are_forgotten_and_never_done_again(
    node: Node,
) -> None:
    """first-unanswered frees the answers before it; a late copy of those is refused, not done."""
    base = node.store.memory_bytes
    for serial in (1, 2, 3):
        node.do(serial, "INCR n")
    node.do(4, "INCR n", first=3)

    assert node.do(3, "INCR n") == ["again", 3]
    for serial in (1, 2):
        assert str(node.do(serial, "INCR n")).startswith("FORGOTTEN serials before 3")
    assert node.get(b"n") == b"4"
    node.do(1000, "DEL n", first=1000)
    assert node.store.memory_bytes < base + 1000


def test_first_unanswered_when_an_old_one_comes_late_then_does_not_go_back(node: Node) -> None:
    """Connections overtake each other: what is forgotten stays so."""
    node.do(5, "INCR n", first=5)

    assert node.do(6, "INCR n", first=2) == 2
    assert str(node.do(4, "INCR n", first=2)).startswith("FORGOTTEN")


def test_first_unanswered_when_it_jumps_far_then_costs_no_time(node: Node) -> None:
    """What is forgotten is counted by what there is, not by what there could have been."""
    node.do(1, "INCR n")

    assert node.do(2**62, "INCR n", first=2**62) == 2


def test_answer_when_too_large_to_keep_then_is_given_once(node: Node) -> None:
    """A session keeps a bounded amount; what was done is still never done again."""
    node.write(b"SET", b"k", b"x" * (ANSWERS_BYTES_MAX + 1))
    base = node.store.memory_bytes

    assert len(str(node.do(1, "GETSET k y"))) > ANSWERS_BYTES_MAX
    assert str(node.do(1, "GETSET k y")).startswith("FORGOTTEN it was done once")
    assert node.get(b"k") == b"y"
    assert node.store.memory_bytes < base


def test_answers_when_too_many_to_keep_then_the_later_ones_are_given_once(node: Node) -> None:
    """The limit is for all answers of a session that are unanswered."""
    value = b"x" * (ANSWERS_BYTES_MAX // 2 - 100)
    for key in (b"a", b"b", b"c"):
        node.write(b"SET", key, value)

    for serial, name in enumerate("abc", 1):
        assert node.do(serial, f"GETDEL {name}") == value

    assert node.do(1, "GETDEL a") == ["again", value]
    assert node.do(2, "GETDEL b") == ["again", value]
    assert str(node.do(3, "GETDEL c")).startswith("FORGOTTEN it was done once")
    node.write(b"SET", b"d", value)
    assert node.do(4, "GETDEL d", first=4) == value
    assert node.do(4, "GETDEL d", first=4) == ["again", value]


def test_serials_when_too_far_ahead_then_have_to_wait(node: Node) -> None:
    """BUSY is definite: not done, and the same serial may come again once others are answered."""
    assert node.do(SERIALS_MAX, "INCR n") == 1

    assert str(node.do(SERIALS_MAX + 1, "INCR n")).startswith("BUSY")
    assert node.get(b"n") == b"1"
    assert node.do(SERIALS_MAX + 1, "INCR n", first=2) == 2


# ---- When a session ends -------------------------------------------------------------------------


def test_session_when_closed_or_never_opened_then_is_an_explicit_error(node: Node) -> None:
    """Never "treat as new": what it had done would be done again (T53)."""
    node.do(1, "INCR n")
    assert node.write(b"SESSION", b"CLOSE", b"%d" % node.session) == 1
    assert node.write(b"SESSION", b"CLOSE", b"%d" % node.session) == 0

    gone = f"NO_SESSION there is no session {node.session} (any more): open another"
    assert node.do(1, "INCR n") == gone
    assert str(node.do(1, "INCR n", session=999)).startswith("NO_SESSION")
    assert node.get(b"n") == b"1"


def test_session_when_its_time_is_over_by_the_log_then_is_gone(node: Node) -> None:
    """An hour after its last write that was new, by stamps; to ask again is no use of it."""
    node.now_ms += 1000
    node.do(1, "INCR n")
    node.now_ms += SESSION_TTL_MS - 1
    assert node.do(1, "INCR n") == ["again", 1]

    node.now_ms += 1
    assert str(node.do(1, "INCR n")).startswith("NO_SESSION")


def test_session_when_used_in_time_then_lives_on(node: Node) -> None:
    """Each new write gives it another hour; others go in their own time, by any entry's stamp."""
    idle = node.open()
    node.now_ms += SESSION_TTL_MS - 1
    node.do(1, "INCR n")
    node.now_ms += 1
    node.write(b"SET", b"k", b"1")
    assert len(node.store.sessions) == 1
    node.now_ms += SESSION_TTL_MS - 2

    assert node.do(2, "INCR n") == 2
    assert str(node.do(1, "INCR n", session=idle)).startswith("NO_SESSION")


def test_session_when_a_stamp_goes_back_then_does_not_come_back(node: Node) -> None:
    """The latest stamp counts, whichever primary's clock gave it."""
    node.now_ms += SESSION_TTL_MS
    node.write(b"SET", b"k", b"1")
    node.now_ms = NOW

    assert str(node.do(1, "INCR n")).startswith("NO_SESSION")
    fresh = node.open()
    assert node.do(1, "INCR n", session=fresh) == 1


def test_sessions_when_too_many_then_the_one_unused_for_longest_goes(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening never fails, and what is in use stays."""
    monkeypatch.setattr(kv_client_sessions, "SESSIONS_MAX", 3)
    second, third = node.open(), node.open()
    node.do(1, "INCR n")

    fourth = node.open()

    assert len(node.store.sessions) == 3
    assert str(node.do(1, "INCR n", session=second)).startswith("NO_SESSION")
    assert node.do(1, "INCR n") == ["again", 1]
    assert [node.do(1, "INCR n", session=one) for one in (third, fourth)] == [2, 3]


def test_sessions_when_they_take_too_much_memory_then_the_one_unused_for_longest_goes(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand sessions of a mebibyte each would be a way to fill a node."""
    monkeypatch.setattr(kv_client_sessions, "SESSIONS_BYTES_MAX", 10_000)
    node.write(b"SET", b"k", b"x" * 5000)
    node.do(1, "GETSET k small")
    other = node.open()
    node.write(b"SET", b"l", b"x" * 5000)

    node.do(1, "GETSET l small", session=other)

    assert str(node.do(1, "GETSET k small")).startswith("NO_SESSION")
    assert node.do(1, "GETSET l small", session=other) == ["again", b"x" * 5000]


def test_flushall_when_done_then_sessions_stay(node: Node) -> None:
    """A FLUSHALL that is repeated after new writes must find that it was done."""
    node.do(1, "FLUSHALL")
    node.write(b"SET", b"k", b"new")

    assert node.do(1, "FLUSHALL") == ["again", OK]
    assert node.get(b"k") == b"new"


# ---- What no client can bring about --------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        *("SESSION FOO", "SESSION OPEN now", "SESSION CLOSE", "SESSION CLOSE x", "SESSION DO 1"),
        *("SESSION DO 1 1 1 SET k", "SESSION DO 1 1 1 CAS k x v"),
    ],
)
def test_fault_when_it_slipped_into_the_log_then_is_a_reply(node: Node, line: str) -> None:
    """Such requests are refused before; but one that got there must not stop every node."""
    assert str(node.write(*words(line))).startswith("BAD_REQUEST")


def test_command_when_unknown_in_the_log_then_the_node_stops(node: Node) -> None:
    """In a session as without one: this node is older than the log, or broken."""
    with pytest.raises(ValueError, match="unknown command"):
        node.do(1, "LPUSH k v")


# ---- Memory -------------------------------------------------------------------------------------


def test_memory_bytes_when_all_sessions_are_gone_is_zero_again(node: Node) -> None:
    """The estimate is kept by adding and taking away, and nothing is lost on the way."""
    other = node.open()
    for serial in range(1, 20):
        node.do(serial, "APPEND k x", first=max(1, serial - 7))
        node.do(serial, "GETSET k y", first=serial, session=other)
    node.write(b"SESSION", b"CLOSE", b"%d" % other)
    node.now_ms += SESSION_TTL_MS
    node.write(b"DEL", b"k")

    assert (node.store.memory_bytes, node.store.state_hash, len(node.store.sessions)) == (0, 0, 0)


MEMORY_PROGRAM = """
import json
import psutil
import kv_client_sessions, kv_store
from kv_commands import encode_payload

kv_client_sessions.SESSIONS_BYTES_MAX = 1 << 40
store, process = kv_store.KeyValueStore(), psutil.Process()
before = process.memory_info().rss
index = 0
for _ in range(10_000):
    opened = index = index + 1
    store.apply(index, encode_payload(1_700_000_000_000, [b"SESSION", b"OPEN"]))
    for serial in range(1, ANSWERS + 1):
        index += 1
        argv = [b"SESSION", b"DO", b"%d" % opened, b"%d" % serial, b"1", b"INCR", b"n"]
        store.apply(index, encode_payload(1_700_000_000_000, argv))
rss = process.memory_info().rss - before
print(json.dumps({"rss": rss, "estimate": store.memory_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("answers", [1, 30])
def test_memory_when_ten_thousand_sessions_are_open_is_well_estimated(answers: int) -> None:
    """What --max-memory and the sessions' own limit go by is about what the process has."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM.replace("ANSWERS", str(answers))],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=120,
    )

    measured = json.loads(run.stdout)
    assert measured["estimate"] == pytest.approx(measured["rss"], rel=0.2)


# ---- Random histories ----------------------------------------------------------------------------


class Client:
    """Appends tokens to one key under one session; knows what it was answered."""

    def __init__(self, name: str, session: int) -> None:
        self.name = name
        self.session = session
        self.begun = 0
        self.unanswered: list[int] = []
        self.answers: dict[int, Reply] = {}

    def token(self, serial: int) -> str:
        return f"<{self.name}{serial}>"

    def begin(self) -> int:
        """The next serial."""
        self.begun += 1
        self.unanswered.append(self.begun)
        return self.begun

    def request(self, serial: int) -> list[bytes]:
        first = min(self.unanswered, default=serial)
        line = f"SESSION DO {self.session} {serial} {min(first, serial)} APPEND k "
        return words(line + self.token(serial))

    def take(self, serial: int, reply: Reply) -> None:
        """An answer has arrived."""
        if isinstance(reply, RepeatedReply):
            reply = reply.reply
        if serial in self.answers:  # an answer to a copy of the request
            reply = self.answers[serial] if isinstance(reply, KVError) else reply
            assert reply == self.answers[serial], "a serial has one answer"
            return
        assert isinstance(reply, int), f"a client that waits is told the result, not {reply!r}"
        self.answers[serial] = reply
        self.unanswered.remove(serial)


class World:
    """Nodes that follow one log, a primary among them, and a network that keeps what it likes."""

    NODES = 3
    compares = True

    def __init__(self, make_store: type[KeyValueStore]) -> None:
        self.stores = [make_store() for _ in range(self.NODES)]
        self.disks = [Rows() for _ in range(self.NODES)]
        self.log = [encode_payload(NOW, [b"SESSION", b"OPEN"])] * 2
        self.origins: list[tuple[Client, int] | None] = [None, None]  # who waits for which entry
        self.primary = 0
        self.clients = [Client("a", 1), Client("b", 2)]
        self.network: list[tuple[Client, int, list[bytes]]] = []
        for node in range(self.NODES):
            self.apply(node, 2, hears=False)

    # Each move takes a number that picks among what is possible.

    def begin(self, pick: int) -> None:
        """A client has something new to write, and sends it."""
        client = self.clients[pick % 2]
        self.send(client, client.begin())

    def retry(self, pick: int) -> None:
        """A client that got no answer asks again."""
        waiting = [(c, serial) for c in self.clients for serial in c.unanswered]
        if waiting:
            self.send(*waiting[pick % len(waiting)])

    def send(self, client: Client, serial: int) -> None:
        self.network.append((client, serial, client.request(serial)))

    def arrive(self, pick: int) -> None:
        """A request reaches the primary, which puts it into its log."""
        if self.network:
            self.propose(self.network.pop(pick % len(self.network)))

    def arrive_and_stay(self, pick: int) -> None:
        """The same, but a copy of it is still under way."""
        if self.network:
            self.propose(self.network[pick % len(self.network)])

    def propose(self, request: tuple[Client, int, list[bytes]]) -> None:
        client, serial, argv = request
        self.log.append(encode_payload(NOW, argv))
        self.origins.append((client, serial))

    def commit(self, pick: int) -> None:
        """The primary applies some entries, and the answers arrive."""
        self.apply(self.primary, 1 + pick % 4, hears=True)

    def commit_unheard(self, pick: int) -> None:
        """The same, and the answers are lost."""
        self.apply(self.primary, 1 + pick % 4, hears=False)

    def follow(self, pick: int) -> None:
        """A node that is behind applies what the primary has applied."""
        node = pick % self.NODES
        self.apply(node, self.lag(node), hears=False)

    def lag(self, node: int) -> int:
        return self.committed - self.stores[node].applied_index

    @property
    def committed(self) -> int:
        return max(store.applied_index for store in self.stores)

    def apply(self, node: int, count: int, *, hears: bool) -> None:
        store = self.stores[node]
        first = store.applied_index
        for index, data in enumerate(self.log[first : first + count], first + 1):
            reply = store.apply(index, data)
            origin = self.origins[index - 1]
            if hears and origin is not None:
                client, serial = origin
                client.take(serial, reply)

    def fail_over(self, pick: int) -> None:
        """Another node leads: some of what was not committed is lost, the rest will be."""
        kept = self.committed + pick % (len(self.log) - self.committed + 1)
        del self.log[kept:], self.origins[kept:]
        self.primary = (self.primary + 1) % self.NODES
        self.apply(self.primary, self.lag(self.primary), hears=False)

    def send_snapshot(self, pick: int) -> None:
        """A node gets the state of another instead of the log."""
        source, target = pick % self.NODES, (pick // self.NODES) % self.NODES
        if self.stores[target].applied_index < self.stores[source].applied_index:
            self.save(source)
            self.disks[target] = self.disks[source].copy()
            self.restart(target, self.stores[source])

    def save(self, node: int) -> None:
        """A node flushes what has changed."""
        store = self.stores[node]
        for part in store.begin_flush().slices(nullcontext()):
            self.disks[node].write(part)
        store.end_flush(saved=True)

    def restart(self, node: int, saved: KeyValueStore) -> None:
        """A node has nothing but what is on its disk."""
        store = self.stores[node] = self.disks[node].load(saved.applied_index, NOW)
        assert store.state_hash == saved.state_hash or not self.compares
        assert store.memory_bytes == saved.memory_bytes or not self.compares

    def save_and_restart(self, pick: int) -> None:
        """A node is killed just after a flush."""
        node = pick % self.NODES
        if node != self.primary:
            self.save(node)
            self.restart(node, self.stores[node])

    def finish(self) -> None:
        """All copies arrive, all clients ask until they are answered, all nodes catch up."""
        for _ in range(3):
            while self.network:
                self.arrive(0)
            self.apply(self.primary, len(self.log), hears=True)
            self.fail_over(0)
            for client in self.clients:
                for serial in client.unanswered:
                    self.send(client, serial)
        for node in range(self.NODES):
            self.apply(node, len(self.log), hears=False)

    def check(self) -> None:
        """Each serial was done once, and its answer is where it stands in the value."""
        if self.compares:
            assert len({store.state_hash for store in self.stores}) == 1
            assert self.stores[0].state_hash == self.stores[0].recompute_state_hash()
        value = self.stores[0].read([b"GET", b"k"], NOW) or b""
        assert isinstance(value, bytes)
        text = value.decode()
        counts = Counter(text.replace("<", " ").replace(">", "").split())
        for client in self.clients:
            assert not client.unanswered
            for serial in range(1, client.begun + 1):
                assert counts.pop(f"{client.name}{serial}") == 1
                token = client.token(serial)
                assert client.answers[serial] == text.index(token) + len(token)
        assert not counts


MOVES = st.sampled_from(
    [
        *(World.begin, World.retry, World.arrive, World.arrive_and_stay),
        *(World.commit, World.commit_unheard, World.follow, World.fail_over, World.send_snapshot),
        World.save_and_restart,
    ]
)
# Long, for it takes a loss, a failover and a repetition in this order to show anything.
HISTORIES = st.lists(st.tuples(MOVES, st.integers(0, 1000)), min_size=40, max_size=80)


def run(world: World, history: list[tuple[object, int]]) -> None:
    for move, pick in history:
        assert callable(move)
        move(world, pick)
    world.finish()
    world.check()


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(HISTORIES)
def test_serial_when_lost_repeated_and_reordered_over_failovers_then_is_done_once(
    history: list[tuple[object, int]],
) -> None:
    """Whatever becomes of requests, answers, primaries and uncommitted entries: once, and told."""
    run(World(KeyValueStore), history)


class WithoutDedup(KeyValueStore):
    """A mutant that does whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions.do_once = _do_again  # type: ignore[method-assign]


def _do_again(
    once: Once, write: Write, argv: Sequence[bytes], now_ms: int, index: int
) -> tuple[Reply, int]:
    return write(argv, now_ms, index), 0


class DedupOnThePrimary(World):
    """Mutant M13: the primary knows what it has done; the others only do it."""

    def apply(self, node: int, count: int, *, hears: bool) -> None:
        sessions = self.stores[node].sessions
        if node != self.primary:
            sessions.do_once = _do_again  # type: ignore[method-assign]
        super().apply(node, count, hears=hears)
        vars(sessions).pop("do_once", None)


class RowsWithoutAnswers(World):
    """Mutant M12: sessions are saved, what was done under them is not."""

    def save(self, node: int) -> None:
        super().save(node)
        for session_id, data in self.disks[node].sessions.values():
            self.disks[node].sessions[session_id] = (session_id, data[:8])


class Incurious(World):
    """Compares no hashes, which would catch each mutant at once: what matters is what it does."""

    compares = False


@pytest.mark.slow
@pytest.mark.parametrize(
    "make_world",
    [
        lambda: World(WithoutDedup),
        lambda: DedupOnThePrimary(KeyValueStore),
        lambda: RowsWithoutAnswers(KeyValueStore),
        lambda: type("", (Incurious, DedupOnThePrimary), {})(KeyValueStore),
        lambda: type("", (Incurious, RowsWithoutAnswers), {})(KeyValueStore),
    ],
    ids=["no_dedup", "M13", "M12", "M13_without_hashes", "M12_without_hashes"],
)
def test_mutant_when_it_forgets_what_was_done_then_is_caught(
    make_world: Callable[[], World],
) -> None:
    """The histories above would see it. Source: fault-model M12, M13."""

    @settings(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # the smallest failure is of no interest
    )
    @given(HISTORIES)
    def histories(history: list[tuple[object, int]]) -> None:
        run(make_world(), history)

    with pytest.raises((AssertionError, BaseExceptionGroup)):
        histories()
