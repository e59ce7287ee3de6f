"""The manager changes a cluster that runs: members, leadership, restarts; with fake nodes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster_manager import ManagerError, _risk
from cluster_nodes import ClusterStatus, Member, NodeStatus, ask, summarize
from tests.managed import Cluster, command, eventually, managers, run


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    with managers(tmp_path, monkeypatch) as make:
        yield make


@pytest.fixture
def cluster(make: Callable[..., Cluster]) -> Cluster:
    """Three nodes that run; nothing that was said in starting them."""
    cluster = make()
    cluster.begin()
    cluster.said.clear()
    return cluster


def pids(cluster: Cluster) -> dict[str, int | None]:
    return {node.node_id: node.pid for node in cluster.status().nodes}


def members(cluster: Cluster) -> list[str]:
    return [member.node_id for member in cluster.status().members]


def aside(cluster: Cluster) -> list[str]:
    """The directories that were set aside, without the time in their names."""
    return sorted(path.name.split("-")[0] for path in cluster.data_dir.glob("*.*-*"))


# ---- Risk, in words --------------------------------------------------------------------------------


def seen(well: int, voters: int) -> ClusterStatus:
    """Of so many voters the first ``well`` are well."""
    names = [f"node{number}" for number in range(1, voters + 1)]
    nodes = [
        NodeStatus(
            name,
            6379,
            alive=True,
            role="PRIMARY" if name == "node1" else "SECONDARY",
            term=3,
            commit_index=10,
            applied_index=10,
            cluster_id="c",
            member_id=f"m-{name}",
        )
        for name in names[:well]
    ]
    nodes += [NodeStatus(name, 6379, problem="does not run") for name in names[well:]]
    rows = [Member(name, f"m-{name}", "127.0.0.1", 6379, voter=True) for name in names]
    return summarize(nodes, nodes[0], rows)


@pytest.mark.parametrize(
    ("well", "voters", "words"),
    [
        (1, 1, "1 node tolerates 0 failures"),
        (2, 2, "2 nodes tolerate 0 failures"),
        (3, 3, "3 nodes tolerate 1 failure"),
        (2, 3, "2 of 3 nodes tolerate 0 failures"),
        (1, 3, "1 of 3 nodes tolerates 0 failures"),
        (5, 5, "5 nodes tolerate 2 failures"),
        (4, 5, "4 of 5 nodes tolerate 1 failure"),
    ],
)
def test_tolerance_when_put_in_words_then_says_what_more_may_fail(well, voters, words):
    """What is down already does not count twice."""
    assert seen(well, voters).tolerance == words


@pytest.mark.parametrize(
    ("well", "voters", "voters_then", "risk"),
    [
        (3, 3, 3, ""),
        (2, 3, 3, "it takes 2 of 3 voters, and 1 would be left"),
        (1, 1, 1, "it takes 1 of 1 voter, and 0 would be left"),
        (3, 3, 2, ""),
        (2, 3, 2, "it takes 2 of 2 voters, and 1 would be left"),
        (1, 3, 3, "no majority of the voters follows a primary"),
    ],
)
def test_risk_when_a_node_that_is_well_would_go_then_counts_those_left(
    well, voters, voters_then, risk
):
    """A restart leaves the number of voters as it is, a removal makes it smaller."""
    assert _risk(seen(well, voters), "node1", voters=voters_then) == risk


def test_risk_when_a_node_that_is_down_would_go_then_there_is_none():
    """It is not counted on any more."""
    assert _risk(seen(2, 3), "node3", voters=2) == ""


# ---- Restart -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_restart_when_all_run_then_rolls_with_the_primary_last_after_handing_over(
    cluster: Cluster,
):
    """One at a time, the next only when the one before is a voter again."""
    before = pids(cluster)

    cluster.restart(cluster.said.append)

    assert cluster.said == [
        "Restarting node2 (1 of 3)...",
        "Restarting node3 (2 of 3)...",
        "node2 is the primary now, in place of node1.",
        "Restarting node1 (3 of 3)...",
        "All nodes were restarted; 3 nodes tolerate 1 failure.",
    ]
    after = pids(cluster)
    assert not set(before.values()) & set(after.values())
    assert cluster.running() == ["node1", "node2", "node3"]
    assert cluster.status().primary == "node2"


@pytest.mark.slow
@pytest.mark.cluster
def test_restart_when_a_node_is_down_then_begins_with_it(cluster: Cluster):
    """So the majority is as large as it can be when a node that serves is ended."""
    cluster.kill_node("node3")

    cluster.restart(cluster.said.append)

    assert cluster.said[0] == "Restarting node3 (1 of 3)..."
    assert cluster.status().failures_tolerated == 1


@pytest.mark.slow
@pytest.mark.cluster
def test_restart_when_a_node_does_not_come_back_then_touches_no_other(
    cluster: Cluster, monkeypatch
):
    """What is left runs on, and the exit status is 1."""
    before = pids(cluster)
    monkeypatch.setenv("FAKE_DIES", "node2")

    done = run("--action", "restart", "--data-dir", cluster.data_dir)

    assert done.returncode == 1
    assert "node2 exited with status 3" in done.stderr
    assert "Still to be restarted: node1, node2, node3." in done.stderr
    after = pids(cluster)
    assert (after["node1"], after["node3"]) == (before["node1"], before["node3"])


@pytest.mark.slow
@pytest.mark.cluster
def test_restart_when_it_would_cost_the_majority_then_refuses_and_says_why(make):
    """Two nodes tolerate nothing: the way to restart them is to stop both."""
    cluster = make(nodes=2)
    cluster.begin()
    before = pids(cluster)

    with pytest.raises(ManagerError, match="node2 is not restarted now: it takes 2 of 2 voters"):
        cluster.restart(cluster.said.append)

    assert pids(cluster) == before


@pytest.mark.slow
@pytest.mark.cluster
def test_restart_when_interrupted_then_the_node_is_not_left_down(cluster: Cluster, monkeypatch):
    """Ctrl-C while a node ends: it is started all the same."""
    monkeypatch.setenv("FAKE_STUBBORN", "node2")
    cluster.kill_node("node2")
    cluster.start_node("node2")
    eventually(lambda: cluster.status().failures_tolerated == 1)
    restarting = subprocess.Popen(
        command("--action", "restart", "--data-dir", cluster.data_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert restarting.stdout is not None
    assert restarting.stdout.readline() == b"Restarting node2 (1 of 3)...\n"
    eventually(lambda: "ignored" in cluster.node("node2").log.read_text())

    restarting.send_signal(signal.SIGINT)
    restarting.communicate(timeout=20)

    assert restarting.returncode == 130
    eventually(lambda: cluster.status().failures_tolerated == 1)
    assert len(cluster.argv("node2")) == 3


@pytest.mark.slow
@pytest.mark.cluster
def test_restart_when_nothing_runs_then_starts(make):
    """After a reboot the same command helps."""
    cluster = make(nodes=1)

    cluster.restart(cluster.said.append)

    assert cluster.said[0] == "The cluster is not running."
    assert cluster.said[-1] == "Cluster started successfully!"


# ---- Failover ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_failover_when_a_node_is_named_then_it_leads(cluster: Cluster):
    """And without a name another one does; asked again it changes nothing."""
    cluster.failover("node3", cluster.said.append)
    cluster.failover("node3", cluster.said.append)
    cluster.failover(None, cluster.said.append)

    assert cluster.said == [
        "node3 is the primary now, in place of node1.",
        "node3 is the primary already.",
        f"{cluster.status().primary} is the primary now, in place of node3.",
    ]


@pytest.mark.slow
@pytest.mark.cluster
def test_failover_when_the_primary_refuses_then_fails_with_its_words(cluster: Cluster):
    """A name that nobody has is the primary's to refuse."""
    done = run("--action", "failover", "--to", "node9", "--data-dir", cluster.data_dir)

    assert done.returncode == 1
    assert "node1 refuses FAILOVER TO node9: node9 can't lead" in done.stderr


@pytest.mark.slow
@pytest.mark.cluster
def test_failover_when_there_is_no_other_voter_then_refuses_at_once(make):
    """A learner is not asked."""
    cluster = make(nodes=1)
    cluster.begin()
    cluster.add("copy", True, cluster.said.append)

    with pytest.raises(ManagerError, match="node1 is the only voter: nobody else can lead"):
        cluster.failover()


@pytest.mark.slow
@pytest.mark.cluster
def test_failover_when_the_primary_is_busy_then_is_asked_again(make, monkeypatch):
    """A change that is under way, or no primary for a moment, is no failure."""
    monkeypatch.setenv("FAKE_BUSY", "node1")
    cluster = make()
    cluster.begin()

    cluster.failover("node2", cluster.said.append)

    assert cluster.status().primary == "node2"


# ---- Add -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_add_when_the_cluster_runs_then_returns_with_a_voter_more(cluster: Cluster, make):
    """On the next port that is free; it is there at the next start, too."""
    busy, free = cluster.base_port + 3, cluster.base_port + 4
    with socket.create_server(("127.0.0.1", busy)):
        done = run("--action", "add", "--node-id", "extra", "--data-dir", cluster.data_dir)

    assert done.stdout == (
        f"Starting extra on port {free} (SECONDARY)...\n"
        "extra is a voter; 4 nodes tolerate 1 failure.\n"
    )
    assert cluster.status().voters == 4
    assert "--learner" not in cluster.argv("extra")[0]
    later = make(nodes=None)
    later.end()
    assert len(later.begin()) == 6
    assert later.status().failures_tolerated == 1


@pytest.mark.slow
@pytest.mark.cluster
def test_add_when_a_learner_is_asked_for_then_it_never_votes(cluster: Cluster):
    """Not at a later start either, and no failure more is tolerated."""
    cluster.add("copy", True, cluster.said.append)

    assert cluster.said == [
        f"Starting copy on port {cluster.base_port + 3} (LEARNER)...",
        "copy has caught up, and stays a learner; 3 nodes tolerate 1 failure.",
    ]
    cluster.end()
    assert f"Starting copy on port {cluster.base_port + 3} (LEARNER)..." in cluster.begin()
    assert ["--learner" in argv for argv in cluster.argv("copy")] == [True, True]
    row = cluster.status().row("copy")
    assert (row.role, row.voter, row.learner, row.problem) == ("LEARNER", False, True, None)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("DIES", "exited with status 3"), ("LEARNER", "is not a voter yet")],
)
def test_add_when_it_fails_then_everything_is_as_before(make, monkeypatch, behaviour, said):
    """Neither a member nor a process nor a line in the record is left of it."""
    monkeypatch.setenv(f"FAKE_{behaviour}", "node4")
    cluster = make(start_timeout_s=2.5)
    cluster.begin()
    before = cluster.recorded()

    with pytest.raises(ManagerError, match=f"node4 was not added: (?s:.*)node4 {said}"):
        cluster.add("node4", report=cluster.said.append)

    assert members(cluster) == ["node1", "node2", "node3"]
    assert cluster.recorded() == before
    assert not list(cluster.data_dir.glob("node4.pid"))


@pytest.mark.slow
@pytest.mark.cluster
def test_add_when_interrupted_then_everything_is_as_before(cluster: Cluster, monkeypatch):
    """Ctrl-C leaves no half a member."""
    monkeypatch.setenv("FAKE_LEARNER", "node4")
    before = cluster.recorded()
    adding = subprocess.Popen(
        command("--action", "add", "--node-id", "node4", "--data-dir", cluster.data_dir),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    eventually(lambda: "node4" in members(cluster))

    adding.send_signal(signal.SIGINT)
    adding.communicate(timeout=20)

    assert adding.returncode == 130
    assert members(cluster) == ["node1", "node2", "node3"]
    assert cluster.recorded() == before


@pytest.mark.slow
@pytest.mark.cluster
def test_add_when_the_name_is_taken_then_refuses_and_names_the_way(cluster: Cluster):
    """Two living processes under one name would vote for each other."""
    with pytest.raises(ManagerError, match=r"there is a node2 already.*--action replace"):
        cluster.add("node2")

    assert members(cluster) == ["node1", "node2", "node3"]


def test_add_when_nothing_runs_then_refuses_and_changes_nothing(make):
    """A change of the members is an entry of the log, which needs a majority."""
    cluster = make()

    with pytest.raises(ManagerError, match="no majority of the voters follows a primary"):
        cluster.add("node4")

    assert cluster.running() == []


# ---- Remove --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_remove_when_done_then_the_node_is_gone_and_its_data_kept(cluster: Cluster):
    """Then the name may be used again, by a new member."""
    removed = cluster.status().member("node2")
    assert removed is not None

    done = run("--action", "remove", "--node-id", "node2", "--data-dir", cluster.data_dir)

    said = done.stdout.splitlines()
    assert said[0] == "node2 is no longer a member."
    assert said[1].startswith(f"node2 has ended; its data is kept in {cluster.data_dir}/node2.rem")
    assert said[2:] == ["2 nodes tolerate 0 failures."]
    assert [node.node_id for node in cluster.status().nodes] == ["node1", "node3"]
    assert aside(cluster) == ["node2.removed"]
    assert not list(cluster.data_dir.glob("node2.pid"))

    cluster.add("node2", report=cluster.said.append)

    added = cluster.status().member("node2")
    assert added is not None
    assert added.member_id != removed.member_id
    assert added.port == removed.port


@pytest.mark.slow
@pytest.mark.cluster
def test_remove_when_it_is_the_primary_then_it_hands_over_first(cluster: Cluster):
    """Nobody has to wait for an election."""
    cluster.remove("node1", cluster.said.append)

    assert cluster.said[0] == "node2 is the primary now, in place of node1."
    assert members(cluster) == ["node2", "node3"]
    assert cluster.status().healthy


@pytest.mark.slow
@pytest.mark.cluster
def test_remove_when_the_rest_would_have_no_majority_then_refuses(cluster: Cluster):
    """Of three with one down, only the one that is down may go."""
    cluster.kill_node("node3")

    with pytest.raises(ManagerError, match="node2 is not removed now: without it, it takes 2 of 2"):
        cluster.remove("node2", cluster.said.append)

    assert cluster.running() == ["node1", "node2"]
    cluster.remove("node3", cluster.said.append)
    assert cluster.said[-1] == "2 nodes tolerate 0 failures."


@pytest.mark.slow
@pytest.mark.cluster
def test_remove_when_it_is_the_last_voter_then_refuses(make):
    """A cluster does not end by losing its last member."""
    cluster = make(nodes=1)
    cluster.begin()

    with pytest.raises(ManagerError, match="node1 is the last voter: --action stop"):
        cluster.remove("node1")


@pytest.mark.slow
@pytest.mark.cluster
def test_remove_when_the_node_is_on_another_host_then_only_its_membership_ends(cluster: Cluster):
    """A machine that is gone for good is a member that nobody else can remove."""
    join_from_elsewhere(cluster, "far")
    eventually(lambda: "far" in members(cluster))

    cluster.remove("far", cluster.said.append)

    assert cluster.said == ["far is no longer a member.", "3 nodes tolerate 1 failure."]
    with pytest.raises(ManagerError, match="there is no far in this cluster of node1, node2"):
        cluster.remove("far")


def join_from_elsewhere(cluster: Cluster, node_id: str, port: int = 1) -> None:
    """A member that is no node of this manager: a learner, whose process has gone."""
    path = cluster.data_dir / "fake.json"
    fields = json.loads(path.read_text())
    gone = {"host": "127.0.0.1", "port": port, "voter": False, "process": [2**22, 0]}
    fields["members"]["m-far"] = {"node_id": node_id, **gone}
    new = path.with_suffix(".test")
    new.write_text(json.dumps(fields))
    new.rename(path)


# ---- Removed by someone else -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_status_when_a_client_removed_a_node_then_says_so_and_start_forgets_it(cluster: Cluster):
    """MEMBER REMOVE over the wire: the node ends by itself, and is not started for ever after."""
    ask(cluster.node("node1").reached_at, "MEMBER REMOVE node3")
    eventually(lambda: cluster.running() == ["node1", "node2"])

    table = run("--action", "status", "--data-dir", cluster.data_dir)

    assert table.returncode == 0
    assert "node3 was removed from the cluster." in table.stdout
    assert "2 nodes tolerate 0 failures." in table.stdout

    said = cluster.begin()

    assert said[1] == f"Starting node3 on port {cluster.base_port + 2} (SECONDARY)..."
    assert said[2].startswith("node3 was removed from the cluster. node3 has ended; its data is k")
    assert said[3:] == ["Cluster started successfully!"]
    assert [node.node_id for node in cluster.nodes] == ["node1", "node2"]


@pytest.mark.slow
@pytest.mark.cluster
def test_status_when_a_node_complains_then_shows_what_it_says(make, monkeypatch):
    """A full disk makes nobody unhealthy, but somebody has to know."""
    monkeypatch.setenv("FAKE_TROUBLED", "node1")
    cluster = make(nodes=1)
    cluster.begin()

    table = run("--action", "status", "--data-dir", cluster.data_dir)

    assert table.returncode == 0
    assert "node1 reports: the disk is full." in table.stdout


@pytest.mark.slow
@pytest.mark.cluster
def test_status_when_a_node_installs_a_snapshot_then_shows_how_far_it_is(make, monkeypatch):
    """Catching up may take long, so who waits for it is told."""
    monkeypatch.setenv("FAKE_INSTALLING", "node2")
    cluster = make(nodes=1, start_timeout_s=1.5)
    cluster.begin()
    waited_for: list[str] = []
    with pytest.raises(ManagerError, match="node2 is installing a snapshot: 42%"):
        cluster.add("node2", False, cluster.said.append, waited_for.append)
    assert "node2 is installing a snapshot: 42%" in waited_for

    monkeypatch.setenv("FAKE_INSTALLING", "node1")
    cluster.end()
    cluster.start_node("node1")
    eventually(lambda: cluster.status().members)
    table = run("--action", "status", "--data-dir", cluster.data_dir)

    assert "installing 42%" in table.stdout


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_nodes_were_removed_and_more_are_asked_for_then_uses_free_names(cluster, make):
    """What is recorded keeps its name and its port."""
    cluster.remove("node2", cluster.said.append)
    four = make(nodes=4)

    four.begin()

    ports = {node.node_id: node.port - four.base_port for node in four.nodes}
    assert ports == {"node1": 0, "node2": 1, "node3": 2, "node4": 3}
    assert four.status().voters == 4


@pytest.mark.slow
@pytest.mark.cluster
def test_monitor_when_another_manager_adds_a_node_then_watches_it_too(cluster: Cluster, make):
    """The record is read again at every look."""
    other = make(nodes=None)
    other.add("node4", report=other.said.append)
    other.kill_node("node4")

    events = cluster.watch()

    assert events[0] == "node4 ended; it is restarted now."
    eventually(lambda: cluster.status().voters == 4 and cluster.status().failures_tolerated == 1)


# ---- Replace -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_replace_when_a_directory_is_lost_then_a_new_member_has_the_name(cluster: Cluster):
    """The old member's vote is never counted again."""
    old = cluster.status().member("node2")
    cluster.kill_node("node2")
    shutil.rmtree(cluster.node("node2").directory)

    cluster.replace("node2", cluster.said.append)

    new = cluster.status().member("node2")
    assert old is not None
    assert new is not None
    assert new.member_id != old.member_id
    assert cluster.said == [
        "node2 is no longer a member.",
        "node2 has ended; it had no data on disk.",
        f"Starting node2 on port {cluster.base_port + 1} (SECONDARY)...",
        "node2 is a voter; 3 nodes tolerate 1 failure.",
    ]
    assert [node.node_id for node in cluster.nodes] == ["node1", "node2", "node3"]


@pytest.mark.slow
@pytest.mark.cluster
def test_replace_when_the_directory_is_damaged_then_it_is_kept(cluster: Cluster):
    """What the disk spoilt may still be wanted for a report."""
    cluster.kill_node("node2")
    (cluster.node("node2").directory / "identity.json").write_text("torn {")

    cluster.replace("node2", cluster.said.append)

    assert aside(cluster) == ["node2.removed"]
    assert cluster.status().failures_tolerated == 1


@pytest.mark.slow
@pytest.mark.cluster
def test_replace_when_a_machine_is_gone_then_the_node_comes_up_here(cluster: Cluster):
    """A member of another host is replaced by one on this host."""
    join_from_elsewhere(cluster, "far")
    eventually(lambda: "far" in members(cluster))

    cluster.replace("far", cluster.said.append)

    assert cluster.said[-1] == "far is a voter; 4 nodes tolerate 1 failure."
    assert cluster.node("far").port == cluster.base_port + 3


@pytest.mark.slow
@pytest.mark.cluster
def test_replace_when_the_node_runs_then_refuses(cluster: Cluster):
    """A node that serves is not lost."""
    with pytest.raises(ManagerError, match="node2 runs, and is replaced only when it is lost"):
        cluster.replace("node2")
    with pytest.raises(ManagerError, match="there is no node9 to replace"):
        cluster.replace("node9")

    assert cluster.status().failures_tolerated == 1


@pytest.mark.slow
@pytest.mark.cluster
def test_replace_when_the_node_answers_on_another_host_then_refuses(cluster: Cluster):
    """It is asked itself, for this host knows nothing of its process."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1024)
            connection.sendall(b'{"status": "OK", "member_id": "m-far"}\n')

    with socket.create_server(("127.0.0.1", 0)) as listener:
        join_from_elsewhere(cluster, "far", port=listener.getsockname()[1])
        eventually(lambda: "far" in members(cluster))
        far = threading.Thread(target=answer, name="far")
        far.start()
        with pytest.raises(ManagerError, match="far runs, and is replaced only when it is lost"):
            cluster.replace("far")
        far.join()

    assert "far" in members(cluster)


@pytest.mark.slow
@pytest.mark.cluster
def test_replace_when_the_new_one_fails_then_may_be_repeated(cluster: Cluster, monkeypatch):
    """The old member is gone by then: the node stays on the record, for the next try."""
    cluster.kill_node("node2")
    shutil.rmtree(cluster.node("node2").directory)
    with monkeypatch.context() as patched:
        patched.setenv("FAKE_DIES", "node2")
        with pytest.raises(ManagerError, match="node2 exited with status 3"):
            cluster.replace("node2", cluster.said.append)

    cluster.replace("node2", cluster.said.append)

    assert cluster.said[-1] == "node2 is a voter; 3 nodes tolerate 1 failure."
