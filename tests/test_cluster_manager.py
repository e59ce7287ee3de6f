"""The manager: founding once, starting, watching and stopping, with fake nodes (fake_node.py)."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import cluster_nodes
from cluster_manager import _OPTIONS, ACTIONS, ClusterBusyError, ManagerError, main
from cluster_nodes import ClusterStatus, Member, NodeStatus, free_ports, summarize
from kv_config import PEER_PORT_OFFSET, ConfigError
from tests.managed import FAKE_NODE, Cluster, command, eventually, managers, run


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    with managers(tmp_path, monkeypatch) as make:
        yield make


@pytest.fixture
def cluster(make: Callable[..., Cluster]) -> Cluster:
    return make()


def write_record(cluster: Cluster, base_port: int) -> None:
    """As a founding of node1 alone would leave it."""
    nodes = {"node1": {"port": base_port, "learner": False}}
    record = {"format": 2, "cluster_id": "c", "base_port": base_port, "nodes": nodes}
    (cluster.data_dir / "cluster.json").write_text(json.dumps(record))


# ---- Start ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_nothing_runs_then_prints_exactly_the_lines_of_the_design(cluster: Cluster):
    """Scripts compare this output; the nodes outlive the program. Source: design.md, 3."""
    port = cluster.base_port

    done = run("--action", "start", "--base-port", port, "--data-dir", cluster.data_dir)

    assert done.stdout == (
        "Starting KV Store Cluster (3 nodes: 1 primary + 2 secondary)...\n"
        f"Starting node1 on port {port} (PRIMARY)...\n"
        f"Starting node2 on port {port + 1} (SECONDARY)...\n"
        f"Starting node3 on port {port + 2} (SECONDARY)...\n"
        "Cluster started successfully!\n"
    )
    assert (done.stderr, done.returncode) == ("", 0)
    status = cluster.status()
    assert [(node.role, node.voter) for node in status.nodes] == [
        ("PRIMARY", True),
        ("SECONDARY", True),
        ("SECONDARY", True),
    ]
    node = psutil.Process(status.nodes[2].pid)
    assert os.getsid(node.pid) == node.pid, "a hang-up of the terminal would reach it"


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_all_run_then_says_so_and_starts_nothing(cluster: Cluster):
    """Run twice it says that the cluster runs already, and succeeds."""
    cluster.begin()
    pids = [node.pid for node in cluster.status().nodes]

    again = run("--action", "start", "--data-dir", cluster.data_dir)

    assert again.stdout == "The cluster runs already (3 nodes, primary node1).\n"
    assert again.returncode == 0
    assert [node.pid for node in cluster.status().nodes] == pids


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_one_node_is_dead_then_starts_that_one(cluster: Cluster):
    """Nodes that run are left alone; what is missing is started."""
    cluster.begin()
    pid = cluster.status().nodes[0].pid
    cluster.kill_node("node3")

    said = cluster.begin()

    assert said == [
        "2 of 3 nodes run already.",
        f"Starting node3 on port {cluster.base_port + 2} (SECONDARY)...",
        "Cluster started successfully!",
    ]
    assert cluster.running() == ["node1", "node2", "node3"]
    assert cluster.status().nodes[0].pid == pid


@pytest.fixture
def namesake(tmp_path: Path) -> Iterator[psutil.Popen]:
    """A process that only waits, as node1 by its flags. Its name is one that is easily misread."""
    program = tmp_path / "a) S 1 (b"
    program.symlink_to(Path(sys.executable).resolve())
    code = "import signal; signal.pause()"
    process = psutil.Popen([str(program), "-c", code, "--node-id=node1"])
    eventually(process.cmdline)  # a moment after exec, the kernel has none yet
    yield process
    process.kill()
    process.wait()


def write_pid_file(cluster: Cluster, place: int, pid: int, start: Mapping[str, object]) -> None:
    cluster.data_dir.mkdir(exist_ok=True)
    cluster.nodes[place].pid_file.write_text(json.dumps({"pid": pid, **start, "port": 1}))


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_a_pid_file_is_stale_then_its_process_is_not_taken_for_the_node(
    cluster: Cluster, namesake: psutil.Popen
):
    """A pid that another process has by now is told apart by its start and its flags."""
    own = psutil.Process()
    write_pid_file(cluster, 0, namesake.pid, {"create_time": namesake.create_time() - 60})
    write_pid_file(cluster, 1, own.pid, cluster_nodes.start_of(own))
    cluster.nodes[2].pid_file.write_text("torn {")

    assert cluster.running() == []
    assert cluster.end() == ["The cluster is not running."]
    assert len(cluster.begin()) == 5
    assert namesake.poll() is None


def test_start_of_a_process_when_its_name_looks_like_fields_then_is_still_read_right(
    namesake: psutil.Popen,
):
    """The clock ticks from the boot to its start, and which boot that was. Source: proc(5)."""
    start = cluster_nodes.start_of(namesake)

    up_s = float(Path("/proc/uptime").read_text().split()[0])
    assert isinstance(ticks := start["start_ticks"], int)
    assert up_s - 300 < ticks / os.sysconf("SC_CLK_TCK") <= up_s  # less than a test may take
    assert start["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize("other", [{"boot_id": "another"}, {"start_ticks": 1}])
def test_running_when_the_pid_file_is_of_another_start_then_the_process_is_not_the_node(
    cluster: Cluster, namesake: psutil.Popen, other: Mapping[str, object]
):
    """Another boot or another moment of this one: the pid was given anew."""
    start = cluster_nodes.start_of(namesake)

    for mark in ({**start, **other}, {"create_time": "?"}, {}):
        write_pid_file(cluster, 0, namesake.pid, mark)
        assert cluster.running() == []

    write_pid_file(cluster, 0, namesake.pid, start)
    assert cluster.running() == ["node1"]


@pytest.mark.parametrize(("off_s", "running"), [(0.5, ["node1"]), (-0.5, ["node1"]), (60, [])])
def test_running_when_the_pid_file_has_a_creation_time_then_that_counts(
    cluster: Cluster,
    namesake: psutil.Popen,
    off_s: float,
    running: list[str],
    monkeypatch,
):
    """So it is without /proc, and so earlier versions wrote it on Linux, too."""
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 1000.0)  # else the clock moves it
    write_pid_file(cluster, 0, namesake.pid, {"create_time": 1000.0 + off_s})

    assert cluster.running() == running


def test_start_of_a_process_when_there_is_no_proc_then_is_its_creation_time(
    namesake: psutil.Popen, tmp_path: Path, monkeypatch
):
    """On macOS there is nothing better."""
    monkeypatch.setattr(cluster_nodes, "PROC", tmp_path / "missing")

    monkeypatch.setattr(psutil.Process, "create_time", lambda _: 1000.0)

    assert cluster_nodes.start_of(namesake) == {"create_time": 1000.0}


@pytest.mark.parametrize("offset", [1, 1 + PEER_PORT_OFFSET])
def test_start_when_a_port_is_in_use_then_names_who_uses_it(cluster: Cluster, offset: int):
    """Before anything is started, both ports of every node are tried."""
    port = cluster.base_port + offset

    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(ManagerError, match=rf"port {port} \(node2.* is in use by pid {os.getpid()}"),
    ):
        cluster.begin()

    assert cluster.running() == []
    assert cluster.argv("node1") == []


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_a_node_dies_then_shows_its_last_lines_and_stops_the_others(
    cluster: Cluster, monkeypatch
):
    """The reason is in the log: its last 15 lines, and the exit status, are shown."""
    monkeypatch.setenv("FAKE_DIES", "node2")

    with pytest.raises(ManagerError) as caught:
        cluster.begin()

    lines = str(caught.value).splitlines()
    assert lines[0].startswith("node2 exited with status 3 while it was starting.")
    assert lines[0].endswith(f"The end of {cluster.node('node2').log}:")
    assert [line.strip() for line in lines[1:]] == [f"line {number}" for number in range(5, 20)]
    assert cluster.running() == []
    assert not list(cluster.data_dir.glob("*.pid"))


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_it_fails_then_only_what_it_started_is_stopped(cluster: Cluster, monkeypatch):
    """A start that fails leaves the nodes that ran before as they were."""
    cluster.begin()
    cluster.kill_node("node3")
    monkeypatch.setenv("FAKE_DIES", "node3")

    done = run("--action", "start", "--data-dir", cluster.data_dir)

    assert done.returncode == 1
    assert "node3 exited with status 3" in done.stderr
    assert "line 19" in done.stderr
    assert cluster.running() == ["node1", "node2"]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("interrupted", [False, True])
def test_start_when_a_cluster_is_brought_back_too_slowly_then_its_nodes_are_left_to_it(
    cluster: Cluster, make, monkeypatch, interrupted: bool
):
    """Replaying a long log takes its time, and an end would cost those that run their majority."""
    cluster.begin()
    cluster.end()
    monkeypatch.setenv("FAKE_BEHIND", "node3")
    hasty = make(start_timeout_s=2.0)
    error: type[BaseException] = ManagerError

    def interrupt(line: str) -> None:
        if "node3" in line:
            raise KeyboardInterrupt

    if interrupted:
        error = KeyboardInterrupt
    with pytest.raises(error):
        hasty.start(print, interrupt if interrupted else print)

    assert hasty.running() == ["node1", "node2", "node3"]


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_one_node_of_a_cluster_dies_then_the_majority_is_left_running(
    cluster: Cluster, monkeypatch
):
    """Once there is data to serve, one bad node is no reason to stop serving it."""
    cluster.begin()
    cluster.end()
    monkeypatch.setenv("FAKE_DIES", "node2")

    with pytest.raises(ManagerError, match=r"node2 exited with status 3(?s:.*)A majority"):
        cluster.begin()

    assert cluster.running() == ["node1", "node3"]
    assert cluster.status().healthy


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("LEARNER", "node2 is not a voter yet"), ("BEHIND", "node2 has applied 6 of 7 entries")],
)
def test_start_when_a_node_is_not_ready_in_time_then_says_what_it_waited_for(
    make, monkeypatch, behaviour, said
):
    """Ready is a voter that has what was committed; a start has a deadline and names what is not."""
    monkeypatch.setenv(f"FAKE_{behaviour}", "node2")
    cluster = make(nodes=2, start_timeout_s=1.5)

    with pytest.raises(ManagerError, match=f"not ready in time: {said}"):
        cluster.begin()

    assert cluster.running() == []


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_interrupted_then_stops_what_it_started_and_exits_with_130(
    cluster: Cluster, monkeypatch
):
    """Ctrl-C leaves nothing half-started behind."""
    monkeypatch.setenv("FAKE_LEARNER", "node3")
    argv = ("--action", "start", "--base-port", cluster.base_port, "--data-dir", cluster.data_dir)
    starting = subprocess.Popen(command(*argv), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    eventually(lambda: cluster.running() == ["node1", "node2", "node3"])

    starting.send_signal(signal.SIGINT)
    _, stderr = starting.communicate(timeout=20)

    assert starting.returncode == 130
    assert b"interrupted" in stderr
    assert cluster.running() == []
    assert not list(cluster.data_dir.glob("*.pid"))


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_more_nodes_are_asked_for_then_the_new_ones_join(make):
    """A cluster grows by naming more nodes; it never shrinks by naming fewer."""
    two = make(nodes=2)
    two.begin()
    three = make(nodes=3, base_port=two.base_port)

    said = three.begin()

    assert said[0] == "2 of 3 nodes run already."
    assert three.status().failures_tolerated == 1
    with pytest.raises(ManagerError, match="has 3 nodes from port"):
        two.begin()
    assert make(nodes=None).begin()[-1] == "The cluster runs already (3 nodes, primary node1)."


def test_start_when_the_ports_differ_from_the_founding_then_refuses(cluster: Cluster):
    """Members know each other by their addresses; other ports would be other nodes."""
    cluster.data_dir.mkdir()
    write_record(cluster, cluster.base_port + 1)

    with pytest.raises(ManagerError, match=f"--base-port {cluster.base_port + 1}"):
        cluster.begin()


# ---- Founding ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_founding_when_started_again_then_is_not_repeated(cluster: Cluster):
    """Only the very first start passes --primary, and only to node1."""
    cluster.begin()
    founded = cluster.cluster_id()
    cluster.end()

    cluster.begin()

    assert cluster.cluster_id() == founded
    starts = {node.node_id: cluster.argv(node.node_id) for node in cluster.nodes}
    assert ["--primary" in argv for argv in starts["node1"]] == [True, False]
    assert not any("--primary" in argv for argv in starts["node2"] + starts["node3"])
    assert (
        f"--join=127.0.0.1:{cluster.base_port},127.0.0.1:{cluster.base_port + 1}"
        in (starts["node3"][0])
    )


@pytest.mark.slow
@pytest.mark.cluster
def test_founding_when_node1_lost_its_directory_then_it_joins_again(cluster: Cluster):
    """An empty directory is a new member, never a second cluster (design.md, 7)."""
    cluster.begin()
    founded = cluster.cluster_id()
    cluster.end()
    shutil.rmtree(cluster.node("node1").directory)

    cluster.begin()

    assert "--primary" not in cluster.argv("node1")[-1]
    assert {node.cluster_id for node in cluster.status().nodes} == {founded}


@pytest.mark.slow
@pytest.mark.cluster
def test_founding_when_the_record_is_missing_but_data_is_there_then_resumes(cluster: Cluster):
    """A manager that ended before it wrote the record does not found a second cluster either."""
    cluster.begin()
    founded = cluster.cluster_id()
    cluster.end()
    (cluster.data_dir / "cluster.json").unlink()
    shutil.rmtree(cluster.node("node1").directory)

    cluster.begin()

    assert "--primary" not in cluster.argv("node1")[-1]
    assert cluster.cluster_id() == founded


def test_founding_when_all_directories_are_lost_then_says_what_to_do(cluster: Cluster):
    """Losing all the data is not answered by silently beginning anew."""
    cluster.data_dir.mkdir()
    write_record(cluster, cluster.base_port)

    with pytest.raises(ManagerError, match=r"holds data any more.*Restore.*remove .*cluster\.json"):
        cluster.begin()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("torn {", "cannot be read"),
        ('{"format": 2}', "cannot be read"),
        ('{"cluster_id": "c", "nodes": 3, "base_port": 1}', "has format 1, but .* knows format 2"),
        ('{"format": 3, "nodes": []}', "has format 3, but .* knows format 2"),
    ],
)
def test_founding_when_the_record_is_unreadable_then_says_what_to_do(cluster, record, said):
    """A record that cannot be read, or is of another version, is not taken for none."""
    cluster.data_dir.mkdir()
    (cluster.data_dir / "cluster.json").write_text(record)

    with pytest.raises(ManagerError, match=rf"cluster\.json {said}"):
        cluster.begin()


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_a_node_belongs_to_another_cluster_then_says_which(
    cluster: Cluster, monkeypatch
):
    """A directory that was copied from elsewhere is named."""
    cluster.begin()
    cluster.end()
    monkeypatch.setenv("FAKE_FOREIGN", "node2")

    with pytest.raises(ManagerError, match=r"node2 belongs to cluster elsewhere, but .*data/node2"):
        cluster.begin()

    assert cluster.running() == ["node1", "node3"], "a majority is not stopped for one node"


# ---- Stop ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_stop_when_all_run_then_stops_the_primary_last(cluster: Cluster):
    """No election is held among nodes that are about to stop."""
    cluster.begin()
    pids = {node.node_id: node.pid for node in cluster.status().nodes}

    said = cluster.end()

    order = ("node2", "node3", "node1")
    stopping = [f"Stopping {node_id} (pid {pids[node_id]})..." for node_id in order]
    assert said == [*stopping, "Cluster stopped."]
    assert cluster.running() == []
    assert not list(cluster.data_dir.glob("*.pid"))
    assert cluster.end() == ["The cluster is not running."]


@pytest.mark.slow
@pytest.mark.cluster
def test_stop_when_the_clock_was_set_since_the_start_then_still_finds_the_nodes(make, monkeypatch):
    """Creation times move with each step of the clock: NTP's, or that of a resumed machine."""
    starter = make(nodes=2)
    starter.begin()
    other = make(nodes=2, base_port=starter.base_port)  # one that did not start them
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + 5)

    assert other.running() == ["node1", "node2"]
    assert [node.alive for node in other.status().nodes] == [True, True]
    assert len(other.end()) == 3  # two are stopped, and the cluster is
    assert starter.running() == []


def test_stop_when_there_was_never_a_cluster_then_succeeds_and_leaves_no_trace(cluster: Cluster):
    """Stopping what does not run is no error."""
    assert main(["--action", "stop", "--data-dir", str(cluster.data_dir)]) == 0
    assert not cluster.data_dir.exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_stop_when_a_node_ignores_sigterm_then_kills_it_after_the_deadline(make, monkeypatch):
    """SIGKILL is the last resort, and is said."""
    monkeypatch.setenv("FAKE_STUBBORN", "node2")
    cluster = make(nodes=2, stop_timeout_s=0.5)
    cluster.begin()

    said = cluster.end()

    assert "node2 did not stop within 0.5 s: killed with SIGKILL." in said
    assert cluster.running() == []


@pytest.mark.slow
@pytest.mark.cluster
def test_stop_when_the_kernel_frees_the_ports_late_then_waits_for_that(make, monkeypatch):
    """A start right after it would find them in use, by nobody."""
    cluster = make(nodes=1)
    cluster.begin()
    answers = [True, True, False, False]
    monkeypatch.setattr(cluster_nodes, "is_free", lambda host, port: answers.pop())

    cluster.end()

    assert answers == []


@pytest.mark.slow
@pytest.mark.cluster
def test_stop_when_a_node_is_suspended_then_it_still_ends_in_order(make):
    """A suspended process would not notice SIGTERM, so it is woken for it."""
    cluster = make(nodes=2)
    cluster.begin()
    cluster.suspend("node2")

    said = cluster.end()

    assert not [line for line in said if "SIGKILL" in line]
    assert cluster.running() == []


def test_lock_when_another_manager_holds_it_then_waits_and_gives_up(make):
    """Two managers never start or stop nodes of one directory at the same time."""
    one, other = make(), make(clock=itertools.count().__next__)

    with one._local.exclusively(), pytest.raises(ClusterBusyError, match="another"):
        other.begin()


# ---- Status --------------------------------------------------------------------------------------

DESIGN_FIELDS = [
    *("node_id", "port", "pid", "alive", "role", "term", "commit_index", "applied_index", "lag"),
    *("keys", "memory_bytes", "cpu_percent", "uptime_seconds"),
]


@pytest.mark.slow
@pytest.mark.cluster
def test_status_when_nodes_fail_then_tells_the_majority_by_its_exit_status(cluster: Cluster):
    """0 only when a majority is healthy; the JSON has the fields of the design (3)."""
    argv = ("--action", "status", "--data-dir", cluster.data_dir)
    cluster.begin()
    eventually(lambda: cluster.status().failures_tolerated == 1)  # a busy one may be late to answer

    done = run(*argv, "--json")
    status = json.loads(done.stdout)

    assert done.returncode == 0
    assert (status["healthy"], status["primary"], status["failures_tolerated"]) == (
        True,
        "node1",
        1,
    )
    assert [list(node)[: len(DESIGN_FIELDS)] for node in status["nodes"]] == [DESIGN_FIELDS] * 3
    node2 = status["nodes"][1]
    assert (node2["role"], node2["alive"], node2["lag"], node2["keys"]) == ("SECONDARY", True, 0, 5)
    assert node2["memory_bytes"] > 1_000_000

    cluster.kill_node("node2")
    table = run(*argv)

    assert table.returncode == 0
    assert "node2 does not run." in table.stdout
    assert "node1 is primary; 2 of 3 nodes tolerate 0 failures." in table.stdout
    cluster.kill_node("node3")
    assert run(*argv).returncode == 1
    cluster.kill_node("node1")
    assert run(*argv).returncode == 1


@pytest.mark.slow
@pytest.mark.cluster
def test_status_when_a_node_hangs_then_it_is_alive_but_does_not_count(make):
    """A process that runs and does not answer is shown as what it is."""
    cluster = make(nodes=2)
    cluster.begin()
    cluster.suspend("node2")

    status = cluster.status()
    cluster.resume("node2")

    hung = status.nodes[1]
    assert (hung.alive, hung.role, hung.problem) == (True, None, "does not answer: timed out")
    assert not status.healthy
    eventually(lambda: cluster.status().healthy)


def test_table_when_printed_to_a_pipe_then_is_not_cut(make, capsys):
    """Without a terminal rich would assume 80 columns, and cut what is wider."""
    cluster = make(nodes=1)
    argv = ["--action", "status", "--nodes", "1", "--base-port", str(cluster.base_port)]

    exit_status = main([*argv, "--data-dir", str(cluster.data_dir)])

    assert exit_status == 1
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].replace("┃", " ").split() == [
        *("node", "role", "voter", "term", "commit", "applied", "lag", "keys", "port", "pid"),
        *("memory", "CPU", "uptime"),
    ]
    assert "down" in shown
    assert "Not healthy" in shown


def seen(node_id: str, role: str = "SECONDARY", **more) -> NodeStatus:
    fields = {"term": 3, "commit_index": 10, "applied_index": 10, "cluster_id": "c", **more}
    return NodeStatus(node_id, 6379, alive=True, role=role, member_id=f"m-{node_id}", **fields)


def summary(*nodes: NodeStatus, voters: int = 3) -> ClusterStatus:
    primary = cluster_nodes._primary(nodes, "c")
    names = [f"node{number}" for number in range(1, voters + 1)]
    members = [Member(name, f"m-{name}", "127.0.0.1", 6379, voter=True) for name in names]
    return summarize(nodes, primary, members if primary else ())


def test_summary_when_two_claim_to_be_primary_then_the_higher_term_counts():
    """A primary that was cut off may not know yet that it was; nobody follows it."""
    status = summary(
        seen("node1", "PRIMARY", term=3),
        seen("node2", "PRIMARY", term=4, commit_index=15, applied_index=15),
        seen("node3", term=4),
    )

    assert status.primary == "node2"
    assert status.healthy
    assert status.failures_tolerated == 0
    assert [node.lag for node in status.nodes] == [5, 0, 5]


def test_summary_when_a_node_is_of_another_cluster_then_it_does_not_count():
    """Neither as a voter nor, whatever its term, as the primary."""
    status = summary(
        seen("node1", "PRIMARY"),
        seen("node2"),
        seen("node3", "PRIMARY", term=9, cluster_id="x"),
    )

    assert status.primary == "node1"
    assert status.nodes[2].problem == "belongs to another cluster, x"
    assert not status.nodes[2].voter
    assert status.failures_tolerated == 0


def test_summary_when_a_voter_is_down_then_it_still_has_its_vote():
    """And of who votes where there is no primary nothing is known."""
    down = replace(seen("node3"), alive=False, cluster_id=None, member_id=None, applied_index=None)

    assert summary(seen("node1", "PRIMARY"), seen("node2"), down).nodes[2].voter
    assert summary(seen("node1"), seen("node2")).nodes[0].voter is None


def test_summary_when_voters_are_missing_then_the_majority_is_of_all_voters():
    """Two of five voters are no majority, though all that is looked at is well."""
    status = summary(seen("node1", "PRIMARY"), seen("node2"), voters=5)

    assert not status.healthy


def test_summary_when_there_is_no_primary_then_is_not_healthy():
    """Nodes that answer but follow nobody serve nobody."""
    status = summary(seen("node1", "CANDIDATE"), seen("node2"), seen("node3"))

    assert (status.healthy, status.primary, status.nodes[1].lag) == (False, None, None)


# ---- Monitor -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_monitor_when_a_node_is_killed_then_restarts_it(make):
    """A node that dies is back at once; the monitor leaves the nodes running when it ends."""
    cluster = make(nodes=2)
    cluster.begin()
    events: list[str] = []
    stop = threading.Event()
    other = make(nodes=2, base_port=cluster.base_port)  # a monitor need not have started them
    watcher = threading.Thread(target=other.monitor, args=(events.append, stop), name="monitor")
    watcher.start()

    cluster.kill_node("node2")
    try:
        eventually(lambda: cluster.running() == ["node1", "node2"] and len(events) >= 2)
        eventually(lambda: cluster.status().failures_tolerated == 0 and cluster.status().healthy)
    finally:
        stop.set()
        watcher.join()

    pid = cluster.status().nodes[1].pid
    assert events == ["node2 ended; it is restarted now.", f"node2 was restarted with pid {pid}."]
    assert cluster.running() == ["node1", "node2"]


@pytest.mark.slow
@pytest.mark.cluster
def test_monitor_when_interrupted_then_says_that_the_nodes_keep_running(make):
    """Ctrl-C ends the watching, not what is watched."""
    cluster = make(nodes=1)
    cluster.begin()
    cluster.end()
    watching = subprocess.Popen(
        command("--action", "monitor", "--data-dir", cluster.data_dir),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    while "successfully" not in watching.stdout.readline():
        pass  # ends with the test's time limit

    eventually(lambda: cluster.status().healthy)
    watching.send_signal(signal.SIGINT)
    stdout, _ = watching.communicate(timeout=20)

    assert watching.returncode == 0
    assert stdout.endswith("the nodes keep running (--action stop stops them).\n")
    assert cluster.running() == ["node1"]


def test_monitor_when_there_is_no_cluster_then_founds_none(tmp_path: Path):
    """A mistyped directory is no wish for another cluster."""
    done = run("--action", "monitor", "--data-dir", tmp_path / "mistyped")

    assert done.returncode == 1
    assert "there is no cluster in" in done.stderr and "--action start founds one" in done.stderr
    assert not (tmp_path / "mistyped").exists()


class Dead:
    """What ``spawn`` gives for a process that ends at once."""

    pid = 2**22  # above what Linux gives

    def __init__(self, exit_status: int) -> None:
        self.exit_status = exit_status

    def create_time(self) -> float:
        return 0.0

    def poll(self) -> int:
        return self.exit_status


class Clock:
    """A clock that stands still until it is set."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(
    make: Callable[..., Cluster], exit_status: int
) -> tuple[Cluster, Clock, list[tuple[object, ...]]]:
    """A cluster of one node that dies whenever it is started; its clock; its starts."""
    clock = Clock()
    starts: list[tuple[object, ...]] = []

    def spawn(*argv: object, **_: object) -> Dead:
        starts.append(argv)
        return Dead(exit_status)

    cluster = make(nodes=1, spawn=spawn, clock=clock)
    cluster.data_dir.mkdir()
    cluster.start_node("node1")
    return cluster, clock, starts


def test_monitor_when_a_node_dies_repeatedly_then_waits_longer_each_time(make):
    """At once, then after 1, 2, 4 ... 30 s; a node that ran for a minute starts afresh."""
    cluster, clock, starts = watched(make, exit_status=3)
    pauses = []

    for _ in range(8):
        due = clock.now
        died = cluster.watch()
        while len(died) < 2:
            clock.now += 0.5
            died += cluster.watch()
        assert died[0].startswith("node1 exited with status 3; it is restarted")
        pauses.append(clock.now - due)

    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30]
    assert len(starts) == 9
    assert not any("--primary" in str(argv) for argv in starts)
    clock.now += 60
    assert cluster.watch()[0] == "node1 exited with status 3; it is restarted now."


@pytest.mark.parametrize(
    ("exit_status", "why"),
    [(78, "its data or its cluster is wrong"), (79, "it was removed from the cluster")],
)
def test_monitor_when_starting_a_node_again_cannot_help_then_names_it_and_leaves_it(
    make, exit_status, why
):
    """Wrong data, a wrong cluster, a removed member. Source: raft-traps T65."""
    cluster, clock, starts = watched(make, exit_status)

    events = cluster.watch()
    clock.now += 100

    assert len(events) == 1
    assert events[0].startswith(f"node1 exited with status {exit_status}: {why}, so it is not")
    assert cluster.watch() == []
    assert len(starts) == 1


def test_monitor_when_a_node_was_stopped_on_purpose_then_leaves_it(make):
    """An orderly stop takes the pid file away."""
    cluster, _, starts = watched(make, exit_status=0)
    cluster.node("node1").pid_file.unlink()

    assert cluster.watch() == []
    assert len(starts) == 1


def test_monitor_when_another_manager_is_at_work_then_looks_away(make):
    """What is missing while the cluster is being restarted has not died."""
    cluster, _, starts = watched(make, exit_status=1)

    with make(nodes=1)._local.exclusively():
        assert cluster.watch() == []

    assert len(starts) == 1


# ---- Command line --------------------------------------------------------------------------------


def test_help_when_asked_then_explains_every_action_and_exit_status(capsys):
    """--help teaches."""
    with pytest.raises(SystemExit) as caught:
        main(["--help"])

    text = capsys.readouterr().out
    assert caught.value.code == 0
    for word in (*ACTIONS, *_OPTIONS, "-- --replication", "130"):
        assert word in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--action", "explode"], "invalid choice: 'explode'"),
        ([], "required: --action"),
        (["--act", "start"], "required: --action"),
        (["--action", "start", "--nodes", "0"], "1 to 7 voters, not 0"),
        (["--action", "start", "--nodes", "8"], "1 to 7 voters, not 8; copies that only read can"),
        (["--action", "start", "--timeout", "-1"], "argument --timeout: invalid"),
        (["--action", "start", "--fsync", "no"], "--fsync (what is meant for the servers stands"),
        (["--action", "start", "--base-port", "55534"], "port for peers would be 65536"),
        (["--action", "start", "--", "--prot", "1"], "did you mean '--port'?"),
        (["--action", "start", "--", "--fsync", "maybe"], "--fsync: expected always or no"),
        (["--action", "start", "--", "--port=1"], "--port is given to each node by the manager"),
        (["--action", "start", "--", "--primary"], "--primary is given to each node"),
        (["--action", "start", "--", "--learner"], "--learner is given to each node"),
        (["--action", "add"], "--action add needs --node-id"),
        (["--action", "replace"], "--action replace needs --node-id"),
        (["--action", "start", "--node-id", "n"], "--node-id goes with --action add or remove or"),
        (["--action", "remove", "--node-id", "n", "--learner"], "--learner goes with --action add"),
        (["--action", "stop", "--json"], "--json goes with --action status only"),
        (["--action", "backup"], "--action backup needs --to"),
        (["--action", "verify"], "--action verify needs FILE"),
        (["--action", "restore", "--force"], "--action restore needs --from"),
        (["--action", "start", "--force"], "--force goes with --action restore only"),
        (["--action", "start", "backup.kv"], "FILE goes with --action verify only"),
        (["--action", "restart", "--to", "n"], "--to goes with --action failover or backup only"),
    ],
)
def test_command_line_when_wrong_then_exits_with_2_and_says_why(argv, said, capsys, tmp_path):
    """Wrong arguments, the servers' too, are refused before anything is started."""
    data_dir = tmp_path / "data"
    at = argv.index("--") if "--" in argv else len(argv)
    with pytest.raises(SystemExit) as caught:
        sys.exit(main([*argv[:at], "--data-dir", str(data_dir), *argv[at:]], FAKE_NODE))

    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not data_dir.exists()


def test_environment_when_it_makes_every_node_a_founder_then_is_refused(make, monkeypatch):
    """KV_PRIMARY in the environment would let each node found a cluster of its own."""
    monkeypatch.setenv("KV_PRIMARY", "true")

    with pytest.raises(ConfigError, match="KV_PRIMARY"):
        make()


@pytest.mark.slow
@pytest.mark.cluster
def test_server_flags_when_given_after_dashes_then_reach_every_node(make):
    """Any server flag after ``--``; a node alone is told of itself, so that it joins nobody."""
    cluster = make(nodes=1)
    shape = ("--nodes", 1, "--base-port", cluster.base_port, "--data-dir", cluster.data_dir)

    done = run("--action", "start", *shape, "--", "--replication", "async")

    assert done.stdout.splitlines()[0] == (
        "Starting KV Store Cluster (1 node: 1 primary + 0 secondary)..."
    )
    [argv] = cluster.argv("node1")
    assert argv[-3:] == ["--replication", "async", "--primary"]
    assert f"--join=127.0.0.1:{cluster.base_port}" in argv


@pytest.mark.slow
@pytest.mark.cluster
def test_server_flags_when_given_once_then_are_given_to_every_later_start(make):
    """A restart without them would change the cluster behind everyone's back."""
    cluster = make(nodes=1)
    shape = ("--nodes", 1, "--base-port", cluster.base_port, "--data-dir", cluster.data_dir)
    assert run("--action", "start", *shape, "--", "--replication", "async").returncode == 0

    def flags_of_next_start(*more: str) -> list[str]:
        cluster.end()
        assert run("--action", "start", "--data-dir", cluster.data_dir, *more).returncode == 0
        own = ("--node-id", "--port", "--peer-port", "--data-dir", "--join")
        return [word for word in cluster.argv("node1")[-1] if not word.startswith(own)]

    assert flags_of_next_start() == ["--replication", "async"]
    assert cluster.status().healthy
    cluster.kill_node("node1")
    cluster.start_node("node1")
    assert cluster.argv("node1")[-1][-2:] == ["--replication", "async"]
    assert flags_of_next_start("--", "--fsync", "no") == ["--fsync", "no"]
    assert flags_of_next_start() == ["--fsync", "no"]
    assert flags_of_next_start("--") == []
    assert flags_of_next_start() == []


@pytest.mark.slow
@pytest.mark.cluster
def test_nodes_when_started_from_elsewhere_then_status_and_stop_say_so(make, tmp_path: Path):
    """From the wrong directory a cluster that runs looks like one's own."""
    cluster = make(nodes=1)
    cluster.begin()
    shape = ("--nodes", 1, "--base-port", cluster.base_port, "--data-dir", tmp_path / "other")
    (tmp_path / "other").mkdir()

    status, stop = run("--action", "status", *shape), run("--action", "stop", *shape)

    assert "node1: not started from this --data-dir by the manager." in status.stdout
    assert "(What answers on its ports was not started from" in stop.stdout
    assert cluster.running() == ["node1"]


@pytest.mark.slow
@pytest.mark.cluster
def test_start_when_nobody_reads_what_it_says_then_it_goes_on(make):
    """``--action start | head -1`` is no interruption."""
    cluster = make(nodes=1)
    reader, writer = os.pipe()
    os.close(reader)

    done = subprocess.run(
        command("--action", "start", *cluster.shape), stdout=writer, timeout=60, check=False
    )
    os.close(writer)

    assert done.returncode == 0
    assert cluster.running() == ["node1"]


def test_verify_when_it_is_no_file_then_says_so(tmp_path: Path):
    """To read from a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe")

    done = run("--action", "verify", tmp_path / "pipe")

    assert (done.returncode, done.stderr) == (1, f"cluster_manager: {tmp_path}/pipe is no file\n")


def test_free_ports_when_asked_then_gives_a_row_with_room_for_peers():
    """Below the ports that outgoing connections are given, peers included."""
    ports = free_ports(5)

    assert ports == list(range(ports[0], ports[0] + 5))
    assert ports[0] >= 10_000
    assert ports[-1] + PEER_PORT_OFFSET < 32_768
