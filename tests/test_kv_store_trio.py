"""Three nodes as their clients meet them: redirects, a time without a primary, stale reads, expiry."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator

import pytest

from kv_commands import crc16_slot
from kv_errors import NoPrimaryError, NotPrimaryError, OutcomeUnknownError
from kv_protocol import encode_request
from tests.cluster import SHORT_TIMERS, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def shared_trio() -> Iterator[Cluster]:
    """Three nodes for all tests of this module."""
    with Cluster(*SHORT_TIMERS) as cluster:
        yield cluster


@pytest.fixture
def trio(shared_trio: Cluster) -> Cluster:
    """Three nodes, all healthy when the test begins."""
    shared_trio.heal()
    return shared_trio


# ---- R1, R2, R3: what carries clients across a failover ----------------------------------------


def test_secondary_when_asked_for_a_key_then_moved_names_slot_and_primary(trio: Cluster) -> None:
    """R1. The slot of ``foo`` is 12182 in Redis' own documentation of CLUSTER KEYSLOT."""
    primary = trio.primary()
    host, port = trio.address(primary)
    secondary = trio.address(trio.others(primary)[0])

    with socket.create_connection(secondary) as sock:
        sock.sendall(encode_request([b"GET", b"foo"]) + encode_request([b"SET", b"{tag}x", b"1"]))
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as file:
            moved = file.read()

    slot = crc16_slot(b"tag")
    assert moved == f"-MOVED 12182 {host}:{port}\r\n-MOVED {slot} {host}:{port}\r\n".encode()


def test_primary_when_it_steps_down_then_it_closes_its_client_connections(trio: Cluster) -> None:
    """R2. A write that waits is told that its outcome is unknown, first (promise G4)."""
    primary = trio.primary()
    with trio.resp(primary) as idle, trio.resp(primary) as writer:
        assert idle.ask("SET", "k", "before") == "OK"
        trio.suspend(*trio.others(primary))
        writer.send("SET", "k", "during")

        assert list(idle.replies()) == []
        (reply,) = writer.replies()

    assert isinstance(reply, OutcomeUnknownError)


def leave_alone(trio: Cluster, node_id: str) -> None:
    """Kill the others, the primary last: this one is not to lead, not for a moment.

    Who stops leading closes its clients' connections.
    """
    primary = trio.primary()
    trio.kill(*trio.others(node_id, primary), primary)


def test_no_primary_when_it_stays_so_then_a_command_is_held_and_refused(trio: Cluster) -> None:
    """R3. Held for 1 to 2 s, then CLUSTERDOWN, which clients retry by themselves."""
    alone = trio.others(trio.primary())[0]
    leave_alone(trio, alone)
    trio.eventually(lambda: _has_no_primary(trio, alone), "it knows of no primary")

    for request in (["GET", "k"], ["SET", "k", "v"]):
        with trio.resp(alone) as connection:
            began_s = time.monotonic()
            reply = connection.ask(*request)
            elapsed_s = time.monotonic() - began_s

        assert isinstance(reply, NoPrimaryError)
        assert str(reply) == "no primary is known"
        assert 1.0 < elapsed_s < 3.0


def test_no_primary_when_a_pipeline_changes_between_reads_and_writes_then_it_is_held_once(
    trio: Cluster,
) -> None:
    """Not once for each change: a thousand of them would be held for half an hour."""
    alone = trio.others(trio.primary())[0]
    leave_alone(trio, alone)
    trio.eventually(lambda: _has_no_primary(trio, alone), "it knows of no primary")

    with trio.resp(alone) as connection:
        began_s = time.monotonic()
        for _ in range(20):
            connection.send("GET", "k")
            connection.send("SET", "k", "v")
        replies = list(itertools.islice(connection.replies(), 40))

    assert all(isinstance(reply, NoPrimaryError) for reply in replies)
    assert 1.0 < time.monotonic() - began_s < 10.0  # 40 s at least, if each change were held


def _has_no_primary(cluster: Cluster, node_id: str) -> bool:
    status = cluster.status(node_id)
    return status is not None and status["primary"] is None


def test_no_primary_when_one_is_elected_meanwhile_then_the_held_command_is_answered(
    trio: Cluster,
) -> None:
    """R3. So a failover is a pause for who asks a secondary, and no error."""
    old = trio.primary()
    secondary = trio.others(old)[0]
    with trio.resp(secondary) as connection:
        connection.ask("PING")
        trio.kill(old)
        trio.eventually(lambda: not _follows(trio, secondary, old), "it has seen the death")

        reply = connection.ask("SET", "held", "1")

    assert reply == "OK" or isinstance(reply, NotPrimaryError), reply
    if isinstance(reply, NotPrimaryError):
        assert (reply.host, reply.port) != trio.address(old)


def _follows(cluster: Cluster, node_id: str, primary: str) -> bool:
    status = cluster.status(node_id)
    return bool(status and status["primary"] and status["primary"]["node_id"] == primary)


def test_readonly_when_given_then_this_connection_reads_stale_until_readwrite(
    trio: Cluster,
) -> None:
    """Opt-in, for reads only, and for one connection only."""
    primary = trio.primary()
    version = trio.ask(primary, "SET stale ok")["version"]
    secondary = trio.others(primary)[0]
    trio.eventually(
        lambda: trio.ask(secondary, "STATUS")["applied_index"] >= version, "it is there"
    )

    with trio.resp(secondary) as connection, trio.resp(secondary) as other:
        assert connection.ask("READONLY") == "OK"
        assert connection.ask("GET", "stale") == b"ok"
        assert isinstance(connection.ask("SET", "stale", "no"), NotPrimaryError)
        assert isinstance(other.ask("GET", "stale"), NotPrimaryError)
        assert connection.ask("READWRITE") == "OK"
        assert isinstance(connection.ask("GET", "stale"), NotPrimaryError)


def test_cluster_when_asked_of_any_node_then_it_lists_the_members(trio: Cluster) -> None:
    """CLUSTER is how clients and the manager learn the addresses."""
    primary = trio.primary()
    for node_id in trio.node_ids:
        members = trio.ask(node_id, "CLUSTER")["members"]

        assert {m["node_id"]: m["port"] for m in members} == {
            n: trio.address(n)[1] for n in trio.node_ids
        }
        assert [m["node_id"] for m in members if m["role"] == "PRIMARY"] == [primary]
        assert all(m["voter"] for m in members)


# ---- Expiry ------------------------------------------------------------------------------------


def test_expired_key_when_the_primary_dies_then_it_is_gone_everywhere_for_good(
    trio: Cluster,
) -> None:
    """Promise G5: through a failover and a restart of all nodes; and never before its time."""
    others = trio.in_step()["keys"]
    with trio.client() as client:
        client.set("short", "1", ttl_s=2.0)
        client.set("long", "1", ttl_s=600.0)
        expires_s = time.monotonic() + 2.0
        trio.kill(trio.primary())

        left_s = client.ttl("short")

        assert left_s is None or left_s <= 2.0
        if left_s is None:
            assert time.monotonic() >= expires_s, "expired before its time"
        trio.eventually(lambda: client.get("short") is None, "it expires")
        assert time.monotonic() >= expires_s - 0.1
        trio.heal()
        trio.eventually(lambda: _key_counts(trio) == {others + 1}, "it is gone everywhere")

        trio.kill(*trio.node_ids)
        trio.heal()

        assert client.get("short") is None
        assert _key_counts(trio) == {others + 1}
        assert 0 < (client.ttl("long") or 0) <= 600.0
    trio.in_step()


def _key_counts(cluster: Cluster) -> set[int]:
    """How many keys the nodes hold: a key that is only hidden, for it is due, counts."""
    return {cluster.ask(node_id, "STATUS")["keys"] for node_id in cluster.node_ids}


def test_readonly_when_nobody_can_purge_then_due_keys_are_not_shown_and_others_are(
    trio: Cluster,
) -> None:
    """With the majority gone, this is how the data is saved: an error for all would save none."""
    with trio.client() as client:
        client.set("keep", 1)
        client.set("short", 1, ttl_s=0.2)
    alone = trio.secondaries()[0]
    trio.in_step()
    leave_alone(trio, alone)

    with trio.resp(alone) as connection:
        connection.ask("READONLY")
        trio.eventually(lambda: connection.ask("GET", "short") is None, "it is due")
        assert connection.ask("MGET", "keep", "short") == [b"1", None]
        assert connection.ask("EXISTS", "keep", "short") == 1
        assert connection.ask("TTL", "short") == -2
        keys = connection.ask("KEYS", "*")
        assert isinstance(keys, list) and b"keep" in keys and b"short" not in keys
