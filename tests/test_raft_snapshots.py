"""State on disk, a log that is cut, and snapshots to followers: real processes, small logs.

With ``--max-log 1MiB`` a few thousand writes are enough for all of it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.cluster import SHORT_TIMERS, Cluster

VALUE = "x" * 500
SMALL_LOG = ("--max-log", "1MiB")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(*SHORT_TIMERS, *SMALL_LOG) as cluster:
        yield cluster


def fill(cluster: Cluster, node_id: str, count: int, prefix: str = "key") -> None:
    """Write ``count`` keys through one node, a hundred a command."""
    with cluster.resp(node_id) as connection:
        for first in range(0, count, 100):
            pairs = [(f"{prefix}:{i}", f"{VALUE}{i}") for i in range(first, first + 100)]
            assert connection.ask("MSET", *(word for pair in pairs for word in pair)) == "OK"


def _is_cut(cluster: Cluster, node_id: str) -> bool:
    return log_bytes(cluster, node_id) < 2 * 1024**2 and first_index(cluster, node_id) > 1


def log_bytes(cluster: Cluster, node_id: str) -> int:
    directory: Path = cluster.node(node_id).directory
    total = 0
    for path in directory.glob("log-*.seg"):
        with contextlib.suppress(FileNotFoundError):  # dropped since it was listed
            total += path.stat().st_size
    return total


def first_index(cluster: Cluster, node_id: str) -> int:
    answer = cluster.status(node_id)
    return 0 if answer is None else int(answer["first_index"])


def test_log_when_much_is_written_then_it_does_not_grow_with_it(cluster: Cluster) -> None:
    """And a restart of all finds every key, from the state and the log's tail."""
    primary = cluster.primary()
    fill(cluster, primary, 10_000)  # 5 MiB of log
    for node_id in ("node1", "node2", "node3"):
        cluster.eventually(partial(_is_cut, cluster, node_id), f"the log of {node_id} is cut")
    before = cluster.in_step()

    cluster.kill("node1", "node2", "node3")
    cluster.start("node1", "node2", "node3")

    after = cluster.in_step()
    assert (after["keys"], after["state_hash"]) == (before["keys"], before["state_hash"])
    assert cluster.ask(cluster.primary(), "GET key:9999")["value"] == f"{VALUE}9999"


def test_follower_when_it_is_behind_the_log_then_gets_the_state(cluster: Cluster) -> None:
    """Deleted keys included: what it had itself is replaced, not added to."""
    primary = cluster.primary()
    late = cluster.secondaries()[0]
    fill(cluster, primary, 1000, "early")
    reached = cluster.in_step()["applied_index"]
    cluster.kill(late)
    with cluster.resp(primary) as connection:
        for i in range(1000):
            connection.ask("DEL", f"early:{i}")
    fill(cluster, primary, 10_000)
    cluster.eventually(lambda: first_index(cluster, primary) > reached + 1, "the log is cut")

    cluster.start(late)

    answer = cluster.in_step()
    assert answer["keys"] == 10_000
    assert first_index(cluster, late) > 1


def test_install_when_the_follower_is_killed_again_and_again_then_it_still_succeeds(
    cluster: Cluster,
) -> None:
    """Wherever it is interrupted, it starts and goes on."""
    primary = cluster.primary()
    late = cluster.secondaries()[0]
    reached = cluster.in_step()["applied_index"]
    cluster.kill(late)
    fill(cluster, primary, 20_000)
    cluster.eventually(lambda: first_index(cluster, primary) > reached + 1, "the log is cut")

    for _ in range(5):
        cluster.start(late)
        cluster.eventually(lambda: cluster.status(late) is not None, f"{late} answers")
        cluster.kill(late)
        fill(cluster, primary, 400, "meanwhile")
    cluster.start(late)

    assert cluster.in_step()["keys"] == 20_400


def test_node_when_its_directory_was_lost_then_comes_back_by_the_same_command(
    cluster: Cluster,
) -> None:
    """As a new member under the old name; the old one's vote counts no more."""
    primary = cluster.primary()
    lost = cluster.secondaries()[0]
    fill(cluster, primary, 10_000)
    old_id = cluster.ask(lost, "STATUS")["member_id"]
    cluster.kill(lost)
    directory: Path = cluster.node(lost).directory
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".pid":
            path.unlink()

    cluster.start(lost)

    def is_voter_again() -> bool:
        answer = cluster.ask(cluster.primary(), "CLUSTER")
        voters = {m["node_id"]: m["member_id"] for m in answer["members"] if m["voter"]}
        return len(voters) == 3 and voters[lost] != old_id

    cluster.eventually(is_voter_again, f"{lost} is a voter under a new id")
    assert cluster.in_step()["keys"] == 10_000


def test_members_when_a_node_is_removed_then_it_says_so_and_exits(cluster: Cluster) -> None:
    """With its own exit status; the others go on with a majority of two."""
    primary = cluster.primary()
    removed = cluster.secondaries()[0]
    process = cluster.process(removed)
    assert process is not None

    assert cluster.ask(primary, f"MEMBER REMOVE {removed}")["status"] == "OK"

    assert process.wait(30) == 79
    assert cluster.ask(primary, "STATUS")["voters"] == 2
    assert cluster.ask(primary, "SET still works")["status"] == "OK"


def test_members_when_the_primary_is_removed_then_another_leads(cluster: Cluster) -> None:
    """It commits its own removal, and makes way."""
    primary = cluster.primary()
    process = cluster.process(primary)
    assert process is not None
    assert cluster.ask(primary, "SET before 1")["status"] == "OK"

    cluster.ask(primary, f"MEMBER REMOVE {primary}")

    assert process.wait(30) == 79
    new = cluster.primary(among=cluster.others(primary))
    assert cluster.ask(new, "GET before")["value"] == 1
    assert cluster.ask(new, "STATUS")["voters"] == 2


def test_failover_when_asked_for_then_the_named_node_leads(cluster: Cluster) -> None:
    """And what was written before is there."""
    primary = cluster.primary()
    target = cluster.secondaries()[1]
    fill(cluster, primary, 200)

    answer = cluster.ask(primary, f"FAILOVER TO {target}")

    assert answer["status"] == "OK", answer
    assert answer["primary"]["node_id"] == target
    assert cluster.primary() == target
    assert cluster.ask(target, "GET key:199")["value"] == f"{VALUE}199"
