"""The client against nodes that redirect, hang, die and lose answers on command."""

from __future__ import annotations

import errno
import itertools
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kv_client
import kv_client_sessions
from kv_client import Address, JSONValue, KVStoreClient, Versioned
from kv_commands import encode_payload
from kv_errors import (
    BadRequestError,
    BusyError,
    KVError,
    MismatchError,
    NoPrimaryError,
    NoSpaceError,
    OutcomeUnknownError,
)
from kv_protocol import encode_request
from kv_types import OK, Reply
from tests.fake_cluster import FakeCluster, FakeNode, Fault, free_address, silent_listener, unknown


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster() as nodes:
        yield nodes


@pytest.fixture
def client(cluster: FakeCluster) -> Iterator[KVStoreClient]:
    with KVStoreClient(cluster.addresses, timeout_s=5) as connected:
        yield connected


Call = Callable[[KVStoreClient], object]

# By command.
WRITES: dict[str, Call] = {
    "INCRBY": lambda client: client.incr("n"),
    "DECRBY": lambda client: client.decr("n"),
    "APPEND": lambda client: client.append("k", "x"),
    "CAS": lambda client: client.cas("k", 1, 0),
    "DEL": lambda client: client.delete("k"),
    "PEXPIRE": lambda client: client.expire("k", 5),
    "PERSIST": lambda client: client.persist("k"),
    "SET": lambda client: client.set("k", 1, nx=True),
    "MSET": lambda client: client.mset({"k": 1}),
    "FLUSHALL": lambda client: client.flushall(),
}
READS: dict[str, Call] = {
    "GET": lambda client: client.get("k"),
    "GETS": lambda client: client.gets("k"),
    "MGET": lambda client: client.mget(["k"]),
    "EXISTS": lambda client: client.exists("k"),
    "KEYS": lambda client: client.keys(),
    "PTTL": lambda client: client.ttl("k"),
}


def params(calls: dict[str, Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("command", "call"), calls.items(), ids=list(calls))


# ---- Values --------------------------------------------------------------------------------------


def test_values_when_stored_then_are_read_back(client: KVStoreClient) -> None:
    """set, get, mget, mset, exists, keys and delete do what Redis' commands of the name do."""
    assert client.set("a", {"x": [1, None]})
    client.mset({"b": 2, "c": "three"})

    assert client.get("a") == {"x": [1, None]}
    assert client.mget(["c", "nothing", "b"]) == ["three", None, 2]
    assert client.exists("a", "b", "nothing") == 2
    assert sorted(client.keys()) == ["a", "b", "c"]
    assert client.keys("[ab]?") == []
    assert client.dbsize() == 3
    assert client.delete("a", "nothing") == 1
    assert client.get("a") is None
    assert client.get("a", "default") == "default"
    client.flushall()
    assert client.dbsize() == 0


def test_conditions_when_they_fail_then_nothing_is_set(client: KVStoreClient) -> None:
    """set tells by False that nx found the key or xx did not."""
    assert not client.set("k", 1, xx=True)
    assert client.set("k", 2, nx=True)
    assert not client.set("k", 3, nx=True)
    assert client.get("k") == 2


def test_counters_when_changed_then_the_sum_is_told(client: KVStoreClient) -> None:
    """incr, decr and append tell the result."""
    assert client.incr("n") == 1
    assert client.incr("n", 9) == 10
    assert client.decr("n", 3) == 7
    assert client.get("n") == 7
    assert client.append("s", "ab") == 2
    assert client.append("s", "ü") == 4


def test_cas_when_the_version_is_old_then_tells_the_present_one(client: KVStoreClient) -> None:
    """cas succeeds under the present version only; 0 stands for no key."""
    assert client.gets("k") is None
    first = client.cas("k", "a", 0)
    assert client.gets("k") == Versioned("a", first)

    with pytest.raises(MismatchError) as raised:
        client.cas("k", "b", 0)

    assert raised.value.version == first
    assert client.cas("k", "b", first) > first


def test_ttl_when_there_is_none_then_differs_from_no_key(client: KVStoreClient) -> None:
    """ttl: seconds left, inf for never, None for no such key; any time above 0 is at least 1 ms."""
    client.set("k", 1)
    assert client.ttl("k") == math.inf
    assert client.expire("k", 100)
    assert 99 < cast(float, client.ttl("k")) <= 100
    assert client.persist("k")
    assert not client.persist("k")
    assert client.ttl("nothing") is None
    assert not client.expire("nothing", 1)
    assert client.set("k", 1, ttl_s=1e-9)
    with pytest.raises(BadRequestError):
        client.set("k", 1, ttl_s=0)


def test_keys_when_no_utf8_then_come_and_go_unharmed(client: KVStoreClient) -> None:
    """A key of any bytes, stored by another client, can be listed and read."""
    client.execute("SET", b"\xff\x00", "v")

    (key,) = client.keys()

    assert client.get(key) == "v"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.slow
def test_any_json_value_when_stored_then_round_trips_with_its_type() -> None:
    """What goes in comes out, type and all; text that looks like JSON stays text."""
    with FakeCluster(1) as nodes, KVStoreClient(nodes.addresses) as client:

        @settings(deadline=None)
        @given(JSON | JSON.map(repr) | st.sampled_from(["1", "null", '"', "{}", " 1 ", "1e5"]))
        def check(value: JSONValue) -> None:
            client.set("k", value)
            assert repr(client.get("k", "missing")) == repr(value)

        check()


@pytest.mark.parametrize("value", [math.nan, b"bytes", {1, 2}])
def test_value_when_json_cannot_hold_it_then_is_refused(
    client: KVStoreClient, value: object
) -> None:
    """What would not come back as it was is not stored."""
    with pytest.raises((TypeError, ValueError)):
        client.set("k", cast(JSONValue, value))

    assert client.get("k") is None


# ---- Finding the primary -------------------------------------------------------------------------


def test_redirect_when_told_then_is_followed_and_remembered(cluster: FakeCluster) -> None:
    """MOVED leads to the primary, which is asked first from then on."""
    cluster.primary = cluster.nodes[2]
    with KVStoreClient(cluster.addresses[1:2]) as client:
        client.set("k", 1)
        client.set("k", 2)

        assert client.last_node == cluster.addresses[2]
    assert cluster.received == {"node2": 1, "node3": 4}  # a session is opened and closed, too


def test_members_when_learned_then_survive_the_address_that_was_given(cluster: FakeCluster) -> None:
    """One address is enough: the others come from the cluster (raft-traps T56)."""
    with KVStoreClient(cluster.addresses[:1]) as client:
        client.set("k", 1)
        cluster.nodes[0].kill()
        cluster.primary = cluster.nodes[1]

        assert client.get("k") == 1
        assert sorted(client.nodes) == sorted(cluster.addresses)


@pytest.mark.slow
def test_redirect_when_it_leads_to_a_dead_node_then_waits_for_the_next_primary(
    cluster: FakeCluster,
) -> None:
    """Secondaries that still name a dead primary are asked again until they know better."""
    cluster.nodes[0].kill()
    with KVStoreClient(cluster.addresses[1:], timeout_s=5) as client:
        timer = threading.Timer(0.15, setattr, (cluster, "primary", cluster.nodes[2]))
        timer.start()
        client.set("k", 1)
        timer.join()

    assert cluster.done["SET"] == 1


class Pauses:
    """A client's time that passes only while it pauses, however busy the machine is."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    clock = Pauses()
    monkeypatch.setattr(kv_client, "time", clock)
    return clock


def test_redirect_when_nodes_point_at_each_other_then_ends_with_the_deadline(
    pauses: Pauses,
) -> None:
    """A redirect loop is slowed by pauses and ended by the deadline (raft-traps T55)."""
    with FakeCluster(1) as one, FakeCluster(1) as other:
        one.primary, other.primary = other.nodes[0], one.nodes[0]
        with (
            KVStoreClient(one.addresses, timeout_s=5.0) as client,
            pytest.raises(NoPrimaryError),
        ):
            client.incr("n")

        assert pauses.now_s == 5.0
        assert sum((one.received + other.received).values()) < 30


@pytest.mark.slow
def test_no_primary_when_one_comes_in_time_then_is_waited_for(cluster: FakeCluster) -> None:
    """CLUSTERDOWN is no answer while there is time."""
    cluster.primary = None
    timer = threading.Timer(0.1, setattr, (cluster, "primary", cluster.nodes[1]))
    timer.start()
    with KVStoreClient(cluster.addresses) as client:
        assert client.incr("n") == 1
    timer.join()


def test_no_node_when_the_deadline_passes_then_says_what_each_said() -> None:
    """Nobody there: not done, within the deadline, with every node's excuse."""
    nodes = [free_address(), free_address()]
    with KVStoreClient(nodes, timeout_s=0.2) as client:
        started_s = time.monotonic()
        with pytest.raises(NoPrimaryError) as raised:
            client.incr("n")

    assert 0.2 <= time.monotonic() - started_s < 3
    assert client.last_node is None
    assert all(f"{node}: Connection refused" in str(raised.value) for node in nodes)


def test_node_when_it_hangs_then_no_request_is_risked_on_it(cluster: FakeCluster) -> None:
    """A new connection has to answer CLUSTER first: the kernel accepts for a hung process too."""
    with silent_listener() as hung:
        host, port = hung.getsockname()
        # Asked in turn, so that one of the two first calls meets the hung one.
        with KVStoreClient([f"{host}:{port}", cluster.addresses[0]], timeout_s=1.5) as client:
            assert [client.incr("n"), client.incr("n")] == [1, 2]


def test_node_when_it_is_no_kv_store_then_is_passed_over(cluster: FakeCluster) -> None:
    """Something else that listens on a node's port is an excuse, not a crash."""
    with silent_listener() as listener:

        def speak() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP\r\n")

        threading.Thread(target=speak, daemon=True).start()
        host, port = listener.getsockname()
        with KVStoreClient([f"{host}:{port}", cluster.addresses[0]]) as client:
            assert [client.incr("n"), client.incr("n")] == [1, 2]


# ---- Not done, or unknown ------------------------------------------------------------------------


@params(WRITES | READS)
@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.DONE_AND_DROPPED, unknown()], ids=str)
def test_request_when_its_answer_is_lost_then_is_sent_again_and_done_once(
    cluster: FakeCluster, client: KVStoreClient, command: str, call: Call, fault: Fault
) -> None:
    """A read may be done twice; a write has a serial, under which it is not (thesis 6.3)."""
    cluster.faults.append(fault)

    call(client)

    read_twice = call in READS.values() and fault is Fault.DONE_AND_DROPPED
    assert cluster.done[command] == (2 if read_twice else 1)


def test_answer_when_it_was_lost_then_is_that_of_the_first_time(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """Also where asking anew would be answered otherwise: it has its own doing before it now."""
    for _ in range(4):
        cluster.faults.extend([Fault.DONE_AND_DROPPED, None])

    assert client.set("lock", "mine", nx=True)
    assert client.append("log", "entry") == 5
    version = client.cas("k", "a", 0)
    assert client.delete("lock") == 1

    assert client.gets("k") == Versioned("a", version)


def test_mismatch_when_it_is_the_answer_to_a_write_sent_again_then_is_certain(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """The store's own answer, kept under the serial, is no guess about the last attempt."""
    version = client.cas("k", "a", 0)
    cluster.faults.append(Fault.DONE_AND_DROPPED)

    with pytest.raises(MismatchError) as raised:
        client.cas("k", "b", 0)

    assert raised.value.version == version


def test_session_when_the_cluster_has_ended_it_then_the_next_write_opens_another(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """What was certainly not done there may be done in another one."""
    assert client.incr("n") == 1
    end_sessions(cluster)

    assert client.incr("n") == 2
    assert len(cluster.store.sessions) == 1


def test_session_when_it_ends_behind_a_write_without_an_answer_then_that_is_unknown(
    cluster: FakeCluster, client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of what was done went with it: in another session it might be done twice."""
    client.incr("n")
    answer = cluster.answer

    def end_after(node: FakeNode, argv: list[bytes]) -> Reply | Fault:
        reply = answer(node, argv)
        if reply is Fault.DONE_AND_DROPPED:
            end_sessions(cluster)
        return reply

    monkeypatch.setattr(cluster, "answer", end_after)
    cluster.faults.append(Fault.DONE_AND_DROPPED)

    with pytest.raises(OutcomeUnknownError, match="no session"):
        client.incr("n")

    assert client.get("n") == 2
    assert client.incr("n") == 3


def test_session_when_writes_are_interrupted_then_the_next_ones_go_on(
    cluster: FakeCluster, client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A serial that nobody waits for any more must not hold up those to come (SERIALS_MAX)."""
    monkeypatch.setattr(kv_client_sessions, "SERIALS_MAX", 3)
    client.set("k", 1)
    with monkeypatch.context() as patch:
        patch.setattr(kv_client._Connection, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.incr("n")

    assert [client.incr("n") for _ in range(5)] == [1, 2, 3, 4, 5]


def interrupted(connection: object, data: bytes, deadline: float) -> None:
    raise KeyboardInterrupt


def test_session_when_the_client_is_closed_then_is_closed_too(cluster: FakeCluster) -> None:
    """It would take memory on every node for an hour."""
    with KVStoreClient(cluster.addresses) as client:
        client.set("k", 1)
        assert len(cluster.store.sessions) == 1

    assert len(cluster.store.sessions) == 0


def test_session_when_threads_write_at_once_then_they_share_it(cluster: FakeCluster) -> None:
    """One for a client, opened once."""
    with KVStoreClient(cluster.addresses) as client, ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: client.incr("n"), range(100))) == list(range(1, 101))
        assert len(cluster.store.sessions) == 1


def test_session_when_it_is_only_read_then_there_is_none(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """A client that only reads costs the cluster nothing."""
    client.get("k")
    client.ping()

    assert len(cluster.store.sessions) == 0


def test_session_when_it_cannot_be_opened_then_reads_of_the_batch_are_answered(
    cluster: FakeCluster, client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the writes are certainly not done."""
    answer = cluster.answer

    def refuse_sessions(node: FakeNode, argv: list[bytes]) -> Reply | Fault:
        return NoSpaceError("the disk is full") if argv[0] == b"SESSION" else answer(node, argv)

    monkeypatch.setattr(cluster, "answer", refuse_sessions)
    written, read = client.execute_many([["SET", "k", "1"], ["GET", "k"]])

    assert isinstance(written, NoSpaceError)
    assert read is None


def end_sessions(cluster: FakeCluster) -> None:
    """As an hour without a write does."""
    for session_id in list(cluster.store.sessions._sessions):
        argv = [b"SESSION", b"CLOSE", b"%d" % session_id]
        cluster.store.apply(cluster.store.applied_index + 1, encode_payload(1, argv))


@pytest.fixture
def breaking_send(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the next send loses the connection before its last byte."""
    whole = kv_client._Connection.send
    due: list[bool] = []

    def send(connection: kv_client._Connection, data: bytes, deadline: float) -> None:
        if not due:
            whole(connection, data, deadline)
            return
        due.clear()
        whole(connection, data[:-1], deadline)
        raise ConnectionResetError("reset")

    monkeypatch.setattr(kv_client._Connection, "send", send)
    return lambda: due.append(True)


def test_request_when_its_last_byte_never_left_then_is_sent_again(
    cluster: FakeCluster, client: KVStoreClient, breaking_send: Callable[[], None]
) -> None:
    """A request that cannot have arrived whole is certainly not done."""
    client.incr("n")
    breaking_send()

    assert client.incr("n") == 2


def test_batch_when_its_last_byte_never_left_then_each_is_done_once(
    cluster: FakeCluster, client: KVStoreClient, breaking_send: Callable[[], None]
) -> None:
    """What was sent before the break may have been done; the last one certainly was not."""
    client.incr("n")
    breaking_send()

    assert client.execute_many([["INCR", "n"], ["INCR", "m"]]) == [2, 1]
    assert cluster.done == {"INCRBY": 1, "INCR": 2}


def test_idle_connection_when_the_node_has_closed_it_then_is_not_used(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """The first incr after a failover must not have an unknown outcome for nothing."""
    client.incr("n")
    cluster.nodes[0].hang_up()

    assert client.incr("n") == 2
    assert cluster.nodes[0].accepted == 2


@pytest.mark.slow
def test_silent_primary_when_asked_to_read_then_another_attempt_is_made(
    cluster: FakeCluster,
) -> None:
    """A repeatable request does not spend its whole time on one silent node."""
    with KVStoreClient(cluster.addresses[:1], timeout_s=1.5) as client:
        client.set("k", 1)
        cluster.faults.append(Fault.DONE_AND_SILENT)

        assert client.get("k") == 1


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (WRITES["SET"], OutcomeUnknownError),
        (WRITES["INCRBY"], OutcomeUnknownError),
        (READS["GET"], NoPrimaryError),
    ],
    ids=["set", "incr", "get"],
)
def test_silence_when_the_deadline_passes_then_only_a_read_is_surely_not_done(
    cluster: FakeCluster, request_: Call, error: type[Exception]
) -> None:
    """Time-out is unknown for whatever changes something (thesis 6.3)."""
    cluster.faults.extend([Fault.DONE_AND_SILENT] * 10)
    with KVStoreClient(cluster.addresses[:1], timeout_s=1.0) as client:
        started_s = time.monotonic()
        with pytest.raises(error):
            request_(client)

    assert 1.0 <= time.monotonic() - started_s < 5


def test_repeated_write_when_the_next_attempt_is_refused_then_stays_unknown(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """A definite error speaks of the last attempt only, and the first may have been done (G4)."""
    cluster.faults.extend([Fault.DONE_AND_DROPPED, NoSpaceError("the disk is full")])

    with pytest.raises(OutcomeUnknownError, match="the disk is full"):
        client.set("k", 1)

    assert client.get("k") == 1


def test_refused_write_when_it_was_the_only_attempt_then_is_definite(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """Definite errors reach the caller as their class."""
    cluster.faults.append(NoSpaceError("the disk is full"))

    with pytest.raises(NoSpaceError):
        client.set("k", 1)


def test_busy_primary_when_it_recovers_then_the_request_is_done(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """BUSY is not done, so it is tried again there, without an excursion to the secondaries."""
    client.incr("n")
    before = cluster.received.copy()
    cluster.faults.extend([BusyError("the queue is full")] * 2)

    assert client.incr("n") == 2
    assert cluster.received - before == {"node1": 3}


def test_busy_primary_when_it_stays_so_then_busy_is_the_answer(
    cluster: FakeCluster, pauses: Pauses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline does not turn BUSY into another error; no attempt is begun when it has come."""
    cluster.faults.extend([BusyError("the queue is full")] * 100)
    begun_s: list[float] = []
    attempt = KVStoreClient._attempt

    def noted(client: KVStoreClient, *args: Any) -> KVError | None:
        begun_s.append(pauses.now_s)
        return attempt(client, *args)

    monkeypatch.setattr(KVStoreClient, "_attempt", noted)
    with (
        KVStoreClient(cluster.addresses, timeout_s=5.0) as client,
        pytest.raises(BusyError),
    ):
        client.incr("n")

    assert pauses.now_s == 5.0
    assert begun_s[-1] < 5.0 < len(begun_s)


def test_pauses_when_they_grow_then_double_up_to_the_limit_with_chance() -> None:
    """Back-off with jitter (raft-traps T55): many clients do not come back all at once."""
    pauses = list(itertools.islice(kv_client._pauses(), 12))

    for number, pause_s in enumerate(pauses):
        limit_s = min(kv_client.PAUSE_S_MIN * 2**number, kv_client.PAUSE_S_MAX)
        assert limit_s / 2 <= pause_s <= limit_s
    assert len(set(pauses)) == len(pauses)


# ---- Many at once --------------------------------------------------------------------------------


def test_batch_when_some_fail_then_errors_stand_in_their_place(client: KVStoreClient) -> None:
    """execute_many answers each request for itself, in order."""
    replies = client.execute_many(
        [["SET", "k", "text"], ["INCR", "k"], ["GET", "k"], ["NOSUCH", "x"]]
    )

    assert replies[0] == OK
    assert isinstance(replies[1], BadRequestError)
    assert replies[2] == b"text"
    assert isinstance(replies[3], BadRequestError)


def test_batch_when_the_connection_breaks_then_each_request_is_judged_for_itself(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """Refused, done without an answer, or never seen: in the end each is done once."""
    client.ping()
    cluster.faults.extend([BusyError("wait"), Fault.DONE_AND_DROPPED])

    replies = client.execute_many(
        [["SET", "a", "1"], ["INCR", "n"], ["INCR", "n"], ["SET", "b", "1"]]
    )

    assert replies == [OK, 1, 2, OK]
    assert cluster.done == {"INCR": 2, "SET": 2}


@pytest.mark.slow
def test_batch_when_large_then_neither_side_waits_for_the_other(client: KVStoreClient) -> None:
    """Replies are read while requests are sent: 16 MiB each way fit into no socket's buffers."""
    value = "x" * 32 * 1024

    replies = client.execute_many([["SET", "k", value], ["GET", "k"]] * 512)

    assert replies == [OK, value.encode()] * 512


def test_chunk_when_one_request_is_over_the_limit_then_goes_alone(client: KVStoreClient) -> None:
    """A request larger than a chunk is still sent."""
    value = "x" * (3 * kv_client.CHUNK_BYTES_MAX)

    replies = client.execute_many([["SET", "a", "1"], ["SET", "b", value], ["GET", "b"]])

    assert replies == [OK, OK, value.encode()]


@pytest.mark.slow
def test_threads_when_they_share_a_client_then_lose_nothing(cluster: FakeCluster) -> None:
    """Each call has a connection for itself, and no more are opened than threads."""
    with KVStoreClient(cluster.addresses[:1]) as client, ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda _: client.incr("n"), range(800)))

    assert sorted(sums) == list(range(1, 801))
    assert cluster.nodes[0].accepted <= 8


# ---- The client itself ---------------------------------------------------------------------------


def test_status_when_asked_then_tells_of_one_node_or_of_all(
    cluster: FakeCluster, client: KVStoreClient
) -> None:
    """Any node answers STATUS for itself; None stands for one that does not."""
    cluster.nodes[2].kill()
    first, second, third = cluster.addresses

    assert client.status(second)["role"] == "SECONDARY"
    assert client.status()["cluster_id"] == "c" * 16
    statuses = client.statuses()
    assert {node: status and status["role"] for node, status in statuses.items()} == {
        first: "PRIMARY",
        second: "SECONDARY",
        third: None,
    }
    with pytest.raises(OSError, match="refused"):
        client.status(third)


@pytest.mark.parametrize("word", ["READONLY", "hello", "QUIT"])
def test_request_when_it_would_change_the_connection_then_is_refused(
    client: KVStoreClient, word: str
) -> None:
    """On a pool, READONLY would let some later get of another thread be stale."""
    with pytest.raises(BadRequestError, match=word):
        client.execute(word)


def test_backup_when_asked_for_then_says_whose_matter_it_is(client: KVStoreClient) -> None:
    """Its answer is no reply; the text is one for a person."""
    with pytest.raises(BadRequestError, match=r"^BACKUP is not for this client: .*--action backup"):
        client.execute("BACKUP")


def test_ttl_when_it_is_endless_then_the_key_never_expires(client: KVStoreClient) -> None:
    """What ``ttl`` tells of a key can be given to another."""
    client.set("k", 1, ttl_s=math.inf)

    assert client.ttl("k") == math.inf
    with pytest.raises(BadRequestError, match="persist"):
        client.expire("k", math.inf)


def test_node_that_closes_on_a_request_when_it_said_why_then_that_is_the_answer(
    client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hung up while the client was sending; what it had said before is there to be read."""
    send = kv_client._Connection.send

    def hung_up_on(connection: kv_client._Connection, data: bytes, deadline: float) -> None:
        if b"CAS" not in data:
            send(connection, data, deadline)
            return
        send(connection, encode_request([b"CAS", b"too", b"few"]), deadline)
        connection._socket.recv(1, socket.MSG_PEEK)  # the error has arrived
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(kv_client._Connection, "send", hung_up_on)

    with pytest.raises(BadRequestError, match="wrong number of arguments"):
        client.cas("k", "v", 0)


def test_client_when_given_one_text_of_nodes_then_takes_it_apart(cluster: FakeCluster) -> None:
    """As on the command lines."""
    with KVStoreClient(",".join(cluster.addresses)) as client:
        client.set("k", 1)

        assert client.get("k") == 1


def test_client_when_closed_then_says_so(cluster: FakeCluster) -> None:
    """No call silently opens new connections after close."""
    client = KVStoreClient(cluster.addresses)
    with client:
        client.set("k", 1)

    with pytest.raises(RuntimeError, match="closed"):
        client.get("k")


@pytest.mark.parametrize("text", ["", "localhost", "localhost:", ":6379", "h:0", "h:65536", "h:x"])
def test_address_when_malformed_then_is_refused(text: str) -> None:
    """An address is HOST:PORT; a mistake shows at once, not at the first call."""
    with pytest.raises(ValueError, match=r"."):
        KVStoreClient([text])


def test_address_when_ipv6_then_round_trips_in_brackets() -> None:
    """A host with colons is written in brackets."""
    assert str(Address.parse("[::1]:6379")) == "[::1]:6379"
    assert Address.parse("[::1]:6379") == ("::1", 6379)
