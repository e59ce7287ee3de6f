"""The manager's backups: taken from a node, checked, and made a cluster; with fake nodes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster_manager import ManagerError, main
from kv_store import KeyValueStore
from tests.managed import Cluster, managers, run
from tests.states import flush, open_db, snapshot, write_lines

KEYS = 40


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    with managers(tmp_path, monkeypatch) as make:
        yield make


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what a node sends as its backup: 40 keys."""
    store = KeyValueStore()
    write_lines(store, *(f"SET key:{number} value" for number in range(KEYS)))
    directory = tmp_path / "state"
    directory.mkdir()
    with open_db(directory) as db:
        flush(store, db)
        data = snapshot(db)
    path = tmp_path / "stream"
    path.write_bytes(data)
    monkeypatch.setenv("FAKE_BACKUP", str(path))
    return path


@pytest.fixture
def cluster(make: Callable[..., Cluster]) -> Cluster:
    cluster = make(nodes=2)
    cluster.begin()
    cluster.said.clear()
    return cluster


# ---- Backup --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_backup_when_done_then_the_file_is_what_the_primary_sent(stream, cluster, tmp_path):
    """It replaces an older one, and nothing else is left behind."""
    path = tmp_path / "backup.kv"
    path.write_text("an older one")

    done = run("--action", "backup", "--to", path, "--data-dir", cluster.data_dir)

    assert done.stdout == f"{path} holds 40 keys, the state after entry 40.\n"
    assert path.read_bytes() == stream.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.cluster
def test_backup_when_it_takes_long_then_says_how_much_is_there(stream, cluster, tmp_path):
    """A large one takes its time."""
    progress: list[str] = []

    cluster.backup(tmp_path / "backup.kv", cluster.said.append, progress.append)

    mib = stream.stat().st_size / 1024**2
    assert progress[-2:] == [
        f"{mib:.1f} MiB of {mib:.1f} MiB are here",
        "checking what has arrived",
    ]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("broken off", "the stream broke off"),
        ("changed", r"backup\.kv\.partial"),
        ("refused", "unknown command"),
    ],
)
def test_backup_when_it_fails_then_an_older_one_stays_as_it_was(
    stream, make, tmp_path, monkeypatch, damage, said
):
    """A backup has its name only when it is whole and checked."""
    if damage == "broken off":
        monkeypatch.setenv("FAKE_BREAKS", "node1")
    elif damage == "changed":
        data = bytearray(stream.read_bytes())
        data[len(data) // 2] ^= 1
        stream.write_bytes(data)
    else:
        monkeypatch.delenv("FAKE_BACKUP")
    cluster = make(nodes=1)
    cluster.begin()
    path = tmp_path / "backup.kv"
    path.write_text("an older one")

    with pytest.raises(ManagerError, match=f"no backup was made: .*{said}"):
        cluster.backup(path, cluster.said.append)

    assert path.read_text() == "an older one"
    assert not list(tmp_path.glob("*.partial"))


# ---- Verify --------------------------------------------------------------------------------------


def test_verify_when_the_file_is_intact_then_says_what_it_holds(stream, capsys):
    """Without a cluster, and without changing anything."""
    assert main(["--action", "verify", str(stream)]) == 0

    assert capsys.readouterr().out == (f"{stream} is intact: 40 keys, the state after entry 40.\n")


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "something else"])
def test_verify_when_the_file_is_not_intact_then_fails(stream, tmp_path, capsys, damage):
    """Every byte counts."""
    data = bytearray(stream.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "backup.kv"
    if damage == "cut":
        path.write_bytes(stream.read_bytes()[:-1])
    elif damage == "changed":
        path.write_bytes(data)
    elif damage == "something else":
        path.write_text("a letter")

    assert main(["--action", "verify", str(path)]) == 1

    assert str(path) in capsys.readouterr().err


# ---- Restore -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_restore_when_there_is_nothing_then_a_new_cluster_has_the_state(stream, make):
    """node1 founds it with the backup, the others join it."""
    cluster = make(nodes=2)

    done = run("--action", "restore", "--from", stream, *cluster.shape)

    assert done.stdout.splitlines() == [
        "Starting KV Store Cluster (2 nodes: 1 primary + 1 secondary)...",
        f"Starting node1 on port {cluster.base_port} (PRIMARY)...",
        f"Starting node2 on port {cluster.base_port + 1} (SECONDARY)...",
        "Cluster started successfully!",
        f"Cluster {cluster.cluster_id()} has 40 keys, the state after entry 40.",
    ]
    [argv] = cluster.argv("node1")
    assert argv[-2:] == ["--primary", f"--restore-from={stream}"]
    assert not [word for word in cluster.argv("node2")[0] if word.startswith("--restore-from")]
    cluster.end()
    cluster.begin()
    assert "--primary" not in cluster.argv("node1")[-1]


@pytest.mark.slow
@pytest.mark.cluster
def test_restore_when_there_is_data_then_needs_force_and_sets_it_aside(stream, cluster):
    """The old cluster's data is never deleted: moved back, it is there again."""
    before = cluster.cluster_id()
    with pytest.raises(ManagerError, match="node1, node2 run: a restored cluster is a new one"):
        cluster.restore(stream, True)
    cluster.end()
    with pytest.raises(ManagerError, match=r"a cluster has its data in .*: with --force"):
        cluster.restore(stream)
    assert cluster.cluster_id() == before

    cluster.restore(stream, True, cluster.said.append)

    [aside] = cluster.data_dir.glob("before-restore-*")
    assert f"What was there before is kept in {aside}." in cluster.said
    assert sorted(path.name for path in aside.iterdir()) == ["cluster.json", "node1", "node2"]
    assert cluster.cluster_id() != before
    assert {node.cluster_id for node in cluster.status().nodes} == {cluster.cluster_id()}


@pytest.mark.slow
@pytest.mark.cluster
def test_restore_when_all_directories_are_lost_then_needs_no_force(stream, cluster):
    """There is nothing left that it could do away with."""
    cluster.end()
    for node in cluster.nodes:
        shutil.rmtree(node.directory)

    cluster.restore(stream, report=cluster.said.append)

    [aside] = cluster.data_dir.glob("before-restore-*")
    assert [path.name for path in aside.iterdir()] == ["cluster.json"]
    assert cluster.status().healthy


@pytest.mark.slow
@pytest.mark.cluster
def test_restore_when_the_cluster_had_a_shape_then_keeps_it(stream, cluster, make):
    """The same names, ports and learners; it is the state that is another one."""
    cluster.add("copy", True, cluster.said.append)
    cluster.end()
    ports = {node.node_id: node.port for node in cluster.nodes}

    restored = make(nodes=None)
    restored.restore(stream, True, restored.said.append)

    assert {node.node_id: node.port for node in restored.nodes} == ports
    assert restored.status().row("copy").learner


@pytest.mark.slow
@pytest.mark.cluster
def test_restore_when_the_backup_is_damaged_then_nothing_is_touched(stream, make):
    """It is checked before what is there is set aside."""
    cluster = make(nodes=1)
    cluster.begin()
    cluster.end()
    before = sorted(cluster.data_dir.iterdir())
    stream.write_bytes(stream.read_bytes()[:-1])

    with pytest.raises(ManagerError, match="stream"):
        cluster.restore(stream, True)

    assert sorted(cluster.data_dir.iterdir()) == before
