"""The daemon, as its users meet it: processes, sockets, signals, tools, and whatever arrives.

Rule: a test says what it sends as bytes where bytes are what it is about; otherwise as requests.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kv_store_server
from cluster_manager import SERVER_SCRIPT
from cluster_nodes import free_ports
from kv_config import Address
from kv_errors import BadRequestError, KVError
from raft_types import Identity, Member, Membership
from tests.cluster import (
    SHORT_TIMERS,
    Cluster,
    LineConnection,
    RespConnection,
    ask,
    eventually,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

REQUEST_BYTES_MAX = 1024 * 1024
EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_CONFIG = 78
# How much a process may grow by what leaves nothing behind: caches, arenas, thread stacks.
GROWTH_BYTES_MAX = 24 * 1024 * 1024


@pytest.fixture(scope="module")
def single() -> Iterator[Cluster]:
    """One node that leads itself, with a small limit for requests."""
    limit = ("--max-request-bytes", str(REQUEST_BYTES_MAX))
    with Cluster(*SHORT_TIMERS, *limit, nodes=1) as cluster:
        yield cluster


def exchange(address: Address, data: bytes, timeout_s: float = 10.0) -> bytes:
    """Everything that the server answers to ``data`` until it sees the end of it, and closes."""
    with socket.create_connection(address, timeout=timeout_s) as sock:
        with contextlib.suppress(OSError):  # a reset may be seen as ENOTCONN, no ConnectionError
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        return receive_all(sock)


def receive_all(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            received += data
    return received


# ---- Two languages -----------------------------------------------------------------------------


def test_one_port_when_spoken_to_in_either_language_then_it_answers_in_that(
    single: Cluster,
) -> None:
    """The first byte of a connection decides: ``*`` is RESP, anything else is a line."""
    address = single.address("node1")

    assert exchange(address, b'SET both {"a": [1, 2]}\n').startswith(b'{"status": "OK"')
    assert exchange(address, b"*2\r\n$3\r\nGET\r\n$4\r\nboth\r\n") == b'$13\r\n{"a": [1, 2]}\r\n'
    assert ask(address, "GET both")["value"] == {"a": [1, 2]}


def test_pipeline_when_sent_in_one_piece_or_byte_by_byte_then_replies_keep_the_order(
    single: Cluster,
) -> None:
    """Writes, reads, local commands and errors, mixed: the n-th reply is for the n-th request."""
    requests = [
        (["SET", "p", "1"], b"+OK\r\n"),
        (["INCR", "p"], b":2\r\n"),
        (["GET", "p"], b"$1\r\n2\r\n"),
        (["ECHO", "e"], b"$1\r\ne\r\n"),
        (["NONSENSE"], b"-ERR unknown command 'NONSENSE', with args beginning with: \r\n"),
        (["GET"], b"-ERR wrong number of arguments for 'get' command\r\n"),
        (["DEL", "p"], b":1\r\n"),
        (["GET", "p"], b"$-1\r\n"),
        (["PING"], b"+PONG\r\n"),
    ]
    data = b"".join(_as_resp(argv) for argv, _ in requests)
    expected = b"".join(reply for _, reply in requests)
    address = single.address("node1")

    assert exchange(address, data) == expected
    with socket.create_connection(address, timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for position in range(len(data)):
            sock.sendall(data[position : position + 1])
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == expected


def _as_resp(argv: Sequence[str]) -> bytes:
    words = b"".join(b"$%d\r\n%s\r\n" % (len(word), word.encode()) for word in argv)
    return b"*%d\r\n%s" % (len(argv), words)


def test_pipeline_when_thousands_deep_then_every_request_is_answered_once(single: Cluster) -> None:
    """More than one batch of log entries, and more than one socket buffer, each way."""
    address = single.address("node1")
    requests = [["SET", f"deep{i}", str(i)] for i in range(3000)]
    requests += [["GET", f"deep{i}"] for i in range(3000)]

    with ThreadPoolExecutor(1) as pool, RespConnection(address) as connection:
        sending = pool.submit(connection.sock.sendall, b"".join(map(_as_resp, requests)))
        replies = connection.replies()
        got = [next(replies) for _ in requests]
        sending.result()

    assert got == ["OK"] * 3000 + [str(i).encode() for i in range(3000)]


def test_quit_when_sent_then_it_is_answered_and_the_connection_closed(single: Cluster) -> None:
    """What stands after QUIT in the pipeline is not done."""
    address = single.address("node1")

    with socket.create_connection(address, timeout=10) as sock:
        sock.sendall(_as_resp(["QUIT"]) + _as_resp(["SET", "after-quit", "1"]))
        assert receive_all(sock) == b"+OK\r\n"
    assert ask(address, "GET after-quit")["status"] == "NOT_FOUND"


# ---- Redis' clients and tools ------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_when_unmodified_then_a_session_of_it_works(
    single: Cluster, protocol: int
) -> None:
    """What its own handshake sends, and the commands that applications use."""
    _, port = single.address("node1")
    with redis.Redis(port=port, protocol=protocol, decode_responses=True) as client:
        client.flushall()
        assert client.set("k", "v", px=60_000)
        assert client.get("k") == "v"
        assert 0 < client.pttl("k") <= 60_000
        assert client.set("k", "other", nx=True) is None
        assert client.mset({"a": 1, "b": 2})
        assert client.mget("a", "b", "c") == ["1", "2", None]
        assert client.incrby("a", 41) == 42
        assert client.append("b", "x") == 2
        assert client.exists("a", "b", "c") == 2
        assert sorted(client.keys("[ab]")) == ["a", "b"]
        assert client.delete("a", "c") == 1
        with pytest.raises(redis.ResponseError, match="not an integer"):
            client.incr("b")
        with client.pipeline(transaction=False) as pipeline:
            results = pipeline.set("n", 1).incr("n").get("n").execute()
        assert results == [True, 2, "2"]
        assert client.dbsize() == 3
        assert client.echo("hello") == "hello"
        assert client.type("n") == "string"


def test_redis_py_when_it_asks_about_the_server_then_it_understands_the_answers(
    single: Cluster,
) -> None:
    """INFO, CONFIG GET, COMMAND, CLIENT and ROLE, as monitoring and tools read them."""
    _, port = single.address("node1")
    with redis.Redis(port=port, client_name="tests", decode_responses=True) as client:
        info = client.info()
        assert (info["role"], info["tcp_port"]) == ("master", port)
        assert info["raft_role"] == "PRIMARY"
        assert client.info("replication").keys() >= {"role", "connected_slaves"}
        assert client.config_get("max*")["maxclients"] == "10000"
        assert client.client_getname() == "tests"
        assert any(row["name"] == "tests" for row in client.client_list())
        assert client.command_count() == len(client.command())
        assert client.role()[0] == "master"
        assert len(client.time()) == 2


def test_hello_when_it_asks_for_a_version_then_the_connection_speaks_it(single: Cluster) -> None:
    """HELLO 3 answers with a map; a version that is not there is refused and changes nothing."""
    with single.resp("node1") as connection:
        hello = connection.ask("HELLO", "3")
        assert isinstance(hello, dict)
        assert (hello[b"proto"], hello[b"role"]) == (3, b"master")
        connection.send("HELLO", "4")
        assert connection.sock.recv(100).startswith(b"-NOPROTO")
        connection.send("GET", "no such key")
        assert connection.sock.recv(100) == b"_\r\n"  # null in RESP3


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        ("HELLO abc", "ERR Protocol version is not an integer or out of range"),
        ("HELLO 9", "NOPROTO unsupported protocol version"),
        ("HELLO 3 SETNAME a SETNAME", "ERR Syntax error in HELLO option 'SETNAME'"),
        ("COMMAND INFO" + " get" * 200, "ERR COMMAND INFO and DOCS may name "),
        ("WAIT x 1", "ERR value is not an integer or out of range"),
        ("WAIT 1 x", "ERR timeout is not an integer or out of range"),
        ("CLIENT ID x", "ERR wrong number of arguments for 'client|id' command"),
        ("CONFIG FOO", "ERR unknown subcommand 'FOO'. Try CONFIG HELP."),
        ("CONFIG SET save x", "ERR settings are changed on the command line"),
        ("BACKUP", "ERR BACKUP is for the line language"),
    ],
)
def test_request_when_wrong_then_the_error_is_redis_own(
    single: Cluster, request_: str, reply: str
) -> None:
    """Whoever reads error texts, as some clients do, reads what they know."""
    with single.resp("node1") as connection:
        connection.send(*request_.split())

        assert connection.sock.recv(200).startswith(f"-{reply}".encode())
        connection.send("PING")
        assert connection.sock.recv(200) == b"+PONG\r\n"


def test_command_when_asked_about_then_it_speaks_of_flags_that_redis_knows(
    single: Cluster,
) -> None:
    """And not of what only servers write."""
    with single.resp("node1") as connection:
        connection.send("FLUSHALL")
        connection.send("SET", "forever", "1")
        connection.send("SET", "expiring", "1", "EX", "100")
        connection.send("COMMAND", "INFO", "get", "purge")
        connection.send("INFO", "keyspace")
        connection.send("CONFIG", "RESETSTAT")
        connection.send("CLIENT", "HELP")
        *_, info, keyspace, reset, help_ = itertools.islice(connection.replies(), 7)

    assert isinstance(info, list)
    assert info[1] is None
    assert info[0][2] == ["readonly", "fast"]
    assert isinstance(keyspace, bytes) and b"keys=2,expires=1," in keyspace
    assert reset == "OK"
    assert isinstance(help_, list) and "SETNAME" in help_


def test_transaction_when_sent_then_nothing_of_it_is_done(single: Cluster) -> None:
    """redis-py's pipeline is one by default; to do its commands one by one would be a surprise."""
    _, port = single.address("node1")
    with redis.Redis(port=port) as client:
        pipeline = client.pipeline().set("multi:a", "1").incr("multi:b")

        with pytest.raises(redis.RedisError, match="MULTI is not supported"):
            pipeline.execute()

        assert client.exists("multi:a", "multi:b") == 0
        assert client.pipeline(transaction=False).set("multi:a", "1").execute() == [True]


def test_start_when_the_host_is_of_ipv6_then_clients_and_peers_reach_it(
    run: Callable[..., Process],
) -> None:
    """The settings accept it, so it has to work."""
    (port,) = free_ports(1)
    flags = ("--primary", "--host", "::1", "--port", str(port), "--join", f"[::1]:{port}")
    run(*flags, "--data-dir", "data", *SHORT_TIMERS).await_output("serving")

    assert ask(("::1", port), "SET k 1")["status"] == "OK"


def test_start_when_the_address_is_not_this_hosts_then_it_says_so_and_not_of_the_port(
    run: Callable[..., Process],
) -> None:
    """Another port would not help."""
    process = run("--primary", "--host", "192.0.2.1", "--port", "1", "--advertise-host", "x")

    assert process.exit_status() == EXIT_CONFIG
    assert "can't listen on 192.0.2.1:1" in process.output
    assert "an address of this host" in process.output


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.mark.parametrize("options", [[], ["-3"]], ids=["resp2", "resp3"])
def test_redis_cli_when_used_by_hand_then_it_shows_the_answers(
    single: Cluster, options: list[str]
) -> None:
    """Its handshake (COMMAND DOCS, HELLO) and what a person types."""
    _, port = single.address("node1")
    typed = "SET cli 'two words'\nGET cli\nDEL cli\nGET cli\nINFO server\nGET\n"

    shown = subprocess.run(
        [_tool("redis-cli"), "-p", str(port), *options],
        input=typed,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout

    assert shown.startswith("OK\ntwo words\n1\n\n# Server")
    assert f"tcp_port:{port}" in shown
    assert "wrong number of arguments for 'get' command" in shown


def test_redis_benchmark_when_run_then_it_measures(single: Cluster) -> None:
    """It asks CONFIG GET first, and stops at any error reply."""
    _, port = single.address("node1")
    command = [_tool("redis-benchmark"), "-p", str(port), "-q", "-n", "500", "-c", "5"]

    # The first is what it begins with when no test is named: an inline PING.
    for more in (["-t", "ping,set,get,incr,mset"], ["-t", "set", "-P", "16"]):
        run = subprocess.run(
            [*command, *more], capture_output=True, text=True, timeout=60, check=True
        )
        assert "requests per second" in run.stdout
        assert "ERR" not in run.stdout + run.stderr


# ---- Start, stop, exit status ------------------------------------------------------------------


class Process:
    """``kv_store_server.py`` with these flags, its output in a file; killed in the end."""

    def __init__(self, directory: Path, *flags: str, files_max: int | None = None) -> None:
        self._output = directory / f"output{time.monotonic_ns()}"
        limited = ("sh", "-c", f'ulimit -n {files_max} && exec "$@"', "sh") if files_max else ()
        with self._output.open("wb") as file:
            self.popen = subprocess.Popen(
                [*limited, sys.executable, str(SERVER_SCRIPT), *flags],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=directory,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def await_output(self, text: str) -> None:
        """Wait until it has said ``text``."""
        eventually(lambda: text in self.output, f"it says {text!r}", explain=lambda: self.output)

    def exit_status(self, within_s: float = 20.0) -> int:
        """How it ended, which it does by itself."""
        return self.popen.wait(within_s)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts servers in a directory of their own."""
    processes: list[Process] = []

    def start(*flags: str, files_max: int | None = None) -> Process:
        processes.append(Process(tmp_path, *flags, files_max=files_max))
        return processes[-1]

    yield start

    for process in processes:
        process.popen.kill()
        process.popen.wait()


def founder_flags(port: int, data_dir: str = "data") -> tuple[str, ...]:
    """A node that is its own cluster."""
    return (
        *("--primary", "--port", str(port), "--data-dir", data_dir),
        # Itself, so that it finds no cluster that runs on the default ports.
        *("--join", f"127.0.0.1:{port}", *SHORT_TIMERS),
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_when_it_asks_to_stop_then_the_server_ends_well_and_keeps_its_data(
    run: Callable[..., Process], number: signal.Signals
) -> None:
    """Exit status 0; the next start has what was acknowledged."""
    (port,) = free_ports(1)
    process = run(*founder_flags(port))
    process.await_output("serving")
    assert ask(("127.0.0.1", port), "SET kept 1")["status"] == "OK"

    process.popen.send_signal(number)

    assert process.exit_status(within_s=10) == 0
    assert "Traceback" not in process.output
    run(*founder_flags(port)).await_output("serving")
    eventually(lambda: ask(("127.0.0.1", port), "GET kept").get("value") == 1, "it is there")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_when_the_server_waits_for_a_cluster_then_it_ends_well_too(
    run: Callable[..., Process], number: signal.Signals
) -> None:
    """It waits for as long as there is none, and says what it waits for."""
    port, nobody = free_ports(2)
    process = run(*("--node-id", "node2", "--port", str(port), "--join", f"127.0.0.1:{nobody}"))
    process.await_output(f"waiting for a cluster at 127.0.0.1:{nobody}")

    process.popen.send_signal(number)

    assert process.exit_status(within_s=10) == 0
    assert "Traceback" not in process.output


def members_at(port: int) -> dict[str, int]:
    """The client ports that this node knows the members by; none while there is no primary."""
    with contextlib.suppress(OSError):
        answer = ask(("127.0.0.1", port), "CLUSTER")
        if answer["primary"] is not None:
            return {member["node_id"]: member["port"] for member in answer["members"]}
    return {}


def test_address_when_the_primarys_changed_then_the_cluster_knows_the_new_one(
    run: Callable[..., Process],
) -> None:
    """A primary can't be told of it by anybody else: all would send it back to where it was."""
    old, new = free_ports(2)
    process = run(*founder_flags(old))
    process.await_output("serving")
    assert ask(("127.0.0.1", old), "SET kept 1")["status"] == "OK"
    process.popen.terminate()
    process.exit_status()

    run(*founder_flags(new)).await_output("serving")

    eventually(lambda: members_at(new) == {"node1": new}, "it is known there")
    assert ask(("127.0.0.1", new), "GET kept")["value"] == 1


def test_address_when_all_have_moved_then_they_find_each_other_by_join(
    run: Callable[..., Process],
) -> None:
    """No address in their logs is right any more."""
    ports = free_ports(6)
    names = ("node1", "node2", "node3")

    def start(ports: Sequence[int]) -> list[Process]:
        join = ",".join(f"127.0.0.1:{port}" for port in ports)
        return [
            run(
                *("--node-id", name, "--port", str(port), "--data-dir", name, "--join", join),
                *SHORT_TIMERS,
                *(["--primary"] if name == "node1" else []),
            )
            for name, port in zip(names, ports, strict=True)
        ]

    before, after = ports[:3], ports[3:]
    processes = start(before)
    for port in before:
        eventually(lambda: len(members_at(port)) == 3, "all are in")  # noqa: B023
    for process in processes:
        process.popen.terminate()
    for process in processes:
        process.exit_status()

    start(after)

    expected = dict(zip(names, after, strict=True))
    for port in after:
        eventually(lambda: members_at(port) == expected, "all are known there")  # noqa: B023


def test_settings_when_wrong_then_the_server_says_which_and_exits_with_2(
    run: Callable[..., Process],
) -> None:
    """As every Unix program does for its command line."""
    process = run("--port", "many")

    assert process.exit_status() == EXIT_USAGE
    assert "--port" in process.output
    assert "Traceback" not in process.output


def test_data_directory_when_it_is_another_nodes_then_the_server_exits_with_78(
    run: Callable[..., Process],
) -> None:
    """A member's log and votes belong to that member (raft-traps T12)."""
    (port,) = free_ports(1)
    first = run(*founder_flags(port))
    first.await_output("serving")
    first.popen.kill()
    first.popen.wait()

    process = run(*founder_flags(port), "--node-id", "node7")

    assert process.exit_status() == EXIT_CONFIG
    assert "belongs to node1, not to node7" in process.output


def test_data_directory_when_in_use_then_a_second_server_exits_with_78(
    run: Callable[..., Process],
) -> None:
    """Two processes on one log would destroy it."""
    port, other = free_ports(2)
    run(*founder_flags(port)).await_output("serving")

    process = run(*founder_flags(other))

    assert process.exit_status() == EXIT_CONFIG
    assert "Traceback" not in process.output
    assert ask(("127.0.0.1", port), "PING")["status"] == "OK"


@pytest.mark.parametrize("which", ["clients", "peers"])
def test_port_when_in_use_then_the_server_says_so_and_exits_with_78(
    run: Callable[..., Process], which: str
) -> None:
    """The message names the address, and what to do."""
    port, free = free_ports(2)
    with socket.create_server(("127.0.0.1", port)):
        ports = (port, free) if which == "clients" else (free, port)
        process = run(*founder_flags(ports[0]), "--peer-port", str(ports[1]))

        assert process.exit_status() == EXIT_CONFIG
    assert f"127.0.0.1:{port}" in process.output
    assert "Traceback" not in process.output


def test_log_when_damaged_then_the_server_names_the_file_and_exits_with_78(
    run: Callable[..., Process], tmp_path: Path
) -> None:
    """Never served from a log that is known to be wrong; a person has to look."""
    (port,) = free_ports(1)
    first = run(*founder_flags(port))
    first.await_output("serving")
    for i in range(20):
        ask(("127.0.0.1", port), f"SET k{i} {'x' * 100}")
    first.popen.kill()
    first.popen.wait()
    segment = max((tmp_path / "data").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(segment.read_bytes())
    content[len(content.rstrip(b"\0")) // 2] ^= 1  # behind the records are zeros
    segment.write_bytes(content)

    process = run(*founder_flags(port))

    assert process.exit_status() == EXIT_CONFIG
    assert segment.name in process.output
    assert "Traceback" not in process.output


def test_disk_when_a_write_fails_then_the_server_ends_at_once_with_1(
    run: Callable[..., Process],
) -> None:
    """What a failed write left behind is unknown until a restart; nobody is told OK meanwhile."""
    (port,) = free_ports(1)
    address = ("127.0.0.1", port)
    process = run(*founder_flags(port))
    process.await_output("serving")
    assert ask(address, "SET before 1")["status"] == "OK"
    # No file may grow beyond 64 KiB from now on: write() fails with EFBIG.
    psutil.Process(process.popen.pid).rlimit(psutil.RLIMIT_FSIZE, (65536, 65536))

    with RespConnection(address) as connection, contextlib.suppress(ConnectionError):
        assert connection.ask("SET", "big", "x" * 100_000) != "OK"

    assert process.exit_status() == EXIT_FAULT
    run(*founder_flags(port)).await_output("serving")
    eventually(lambda: ask(address, "GET before").get("value") == 1, "it is there")
    assert ask(address, "GET big")["status"] == "NOT_FOUND"


def test_files_when_the_system_allows_few_then_fewer_clients_are_taken(
    run: Callable[..., Process],
) -> None:
    """A crowd that took the last one would end the node, which needs them for its log."""
    (port,) = free_ports(1)
    server = run(*founder_flags(port), files_max=140)
    server.await_output("serving")
    assert "--max-clients is 12 instead of 10000" in server.output

    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", port)
        clients = [stack.enter_context(RespConnection(address)) for _ in range(12)]
        assert all(client.ask("PING") == "PONG" for client in clients)
        with socket.create_connection(address, timeout=10) as next_one:
            assert receive_all(next_one) == b"-ERR max number of clients reached\r\n"
        assert clients[0].ask("SET", "k", "v") == "OK"


def test_log_format_when_json_then_every_line_is_an_object(run: Callable[..., Process]) -> None:
    """For those who collect logs."""
    (port,) = free_ports(1)
    process = run(*founder_flags(port), "--log-format", "json")
    process.await_output("serving")
    process.popen.terminate()
    assert process.exit_status() == 0

    lines = [json.loads(line) for line in process.output.splitlines()]
    assert all(line.keys() >= {"time", "level", "thread", "message"} for line in lines)


# ---- Limits ------------------------------------------------------------------------------------


def test_max_clients_when_reached_then_the_next_is_told_and_others_go_on() -> None:
    """As Redis says it; a place that gets free is given away again."""
    with Cluster(*SHORT_TIMERS, "--max-clients", "5", nodes=1) as cluster:
        address = cluster.address("node1")
        with contextlib.ExitStack() as stack:
            # Who waited for the start may hold a place for a moment yet.
            clients = [
                stack.enter_context(cluster.eventually(lambda: _welcome(address), "there is room"))
                for _ in range(5)
            ]
            with socket.create_connection(address, timeout=10) as sixth:
                assert receive_all(sixth) == b"-ERR max number of clients reached\r\n"
            assert all(client.ask("PING") == "PONG" for client in clients)

        cluster.eventually(lambda: _welcome(address), "there is room again").close()


def _welcome(address: Address) -> RespConnection | None:
    """A connection that was let in; None: there is no place."""
    client = RespConnection(address)
    with contextlib.suppress(OSError, KVError):
        if client.ask("PING") == "PONG":
            return client
    client.close()
    return None


@pytest.mark.parametrize(
    "data",
    [
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n" % REQUEST_BYTES_MAX,
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1073741824\r\nthe rest will follow",
        b"*1000000000\r\n",
        b"SET k " + b"x" * (REQUEST_BYTES_MAX + 100),
    ],
    ids=["over the limit", "1 GB claimed", "a billion words", "a long line"],
)
def test_request_when_too_large_then_it_is_refused_before_it_is_held_in_memory(
    single: Cluster, data: bytes
) -> None:
    """A clear error, the connection closed, nothing allocated for what is only claimed."""
    process = single.process("node1")
    assert process is not None
    before_bytes = process.memory_info().rss

    with socket.create_connection(single.address("node1"), timeout=10) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        answer = receive_all(sock)

    assert answer.startswith((b"-ERR", b'{"status": "ERROR"')), answer
    assert process.memory_info().rss - before_bytes < GROWTH_BYTES_MAX
    assert single.ask("node1", "PING")["status"] == "OK"


@pytest.mark.parametrize("size_bytes", [REQUEST_BYTES_MAX + 1, 40 * REQUEST_BYTES_MAX])
def test_request_when_too_large_then_the_client_library_is_told_so_at_once(
    single: Cluster, size_bytes: int
) -> None:
    """The node closes while the client still sends: it has to look for the reason, and not to
    take the end of the connection for a node that has gone."""
    began_s = time.monotonic()
    with single.client(timeout_s=30.0) as client:
        with pytest.raises(BadRequestError, match="larger than"):
            client.set("big", "x" * size_bytes)

        client.set("small", "x")
    assert time.monotonic() - began_s < 15.0


def test_request_when_too_large_then_who_still_sends_can_send_all_of_it(single: Cluster) -> None:
    """Most clients read no answer before they have sent the request: a reset would be all they see."""
    with socket.create_connection(single.address("node1"), timeout=10) as sock:
        sock.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$30000000\r\n")
        for _ in range(30):
            sock.sendall(bytes(1_000_000))

        assert sock.recv(100).startswith(b"-ERR")


def test_request_when_just_below_the_limit_then_it_is_done(single: Cluster) -> None:
    """The limit is what it says."""
    value = b"x" * (REQUEST_BYTES_MAX - 1000)
    with single.resp("node1") as connection:
        assert connection.ask("SET", "large", value) == "OK"
        assert connection.ask("GET", "large") == value
        assert connection.ask("DEL", "large") == 1


def test_max_memory_when_reached_then_writes_are_refused_and_deletes_make_room() -> None:
    """OOM, as Redis with noeviction: definite, reads and deletes go on."""
    with (
        Cluster(*SHORT_TIMERS, "--max-memory", "256kb", nodes=1) as cluster,
        cluster.resp("node1") as connection,
    ):
        written = 0
        while (reply := connection.ask("SET", f"k{written}", "x" * 10_000)) == "OK":
            written += 1
            assert written < 100, "no limit"

        assert isinstance(reply, KVError)
        assert (reply.definite, str(reply).split()[0]) in ((True, "OOM"), (True, "command"))
        assert connection.ask("GET", f"k{written}") is None
        assert connection.ask("GET", "k0") == b"x" * 10_000
        assert connection.ask("DEL", "k0", "k1") == 2
        assert connection.ask("SET", "again", "1") == "OK"


# ---- Whatever arrives (promise G8) -------------------------------------------------------------


class Baseline:
    """Threads, descriptors and memory of a server's process, before and after."""

    def __init__(self, cluster: Cluster) -> None:
        process = cluster.process("node1")
        assert process is not None
        self._cluster = cluster
        self._process = process
        self._before = self._counts()
        self._before_bytes = process.memory_info().rss

    def _counts(self) -> tuple[int, int]:
        # The log's segments come and go with what is written.
        segments = sum(file.path.endswith(".seg") for file in self._process.open_files())
        return self._process.num_threads(), self._process.num_fds() - segments

    def check(self) -> None:
        """The same process answers, and holds no more than before."""
        assert self._cluster.ask("node1", "PING")["status"] == "OK"
        assert self._process.is_running()
        self._cluster.eventually(
            lambda: all(
                now <= then for now, then in zip(self._counts(), self._before, strict=True)
            ),
            "threads and descriptors are back where they were",
        )
        grown_bytes = self._process.memory_info().rss - self._before_bytes
        assert grown_bytes < GROWTH_BYTES_MAX, f"grew by {grown_bytes} bytes"


PIECES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [
            b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n",
            b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"*-1\r\n",
            b"*0\r\n",
            b"*1\r\n$-1\r\n",
            b"*1073741824\r\n",
            b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1073741824\r\n",
            b"*2\r\n$99999999999999999999\r\n",
            b"$5\r\nhello\r\n",
            b"GET k\n",
            b"SET k {not json\n",
            b'SET k "unbalanced\n',
            b"'\"'\"\n",
            b"CAS k -1 x\r\n",
            b"MEMBER JOIN a b c d e\n",
            b"HELLO 3 AUTH\n",
            b"\r\n\r\n\n",
            b"\x00\xff\xfe\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"[" * 5000 + b"\n",
        ]
    ),
    st.builds(
        lambda word, n: word * n, st.sampled_from([b"*", b"$", b"a ", b"'"]), st.integers(1, 9)
    ),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pieces=st.lists(PIECES, max_size=6), how=st.sampled_from(["read", "half", "drop", "reset"]))
def _send_anything(address: Address, pieces: list[bytes], how: str) -> None:
    """One connection: these bytes, then its end in one of the ways that connections end."""
    with socket.create_connection(address, timeout=10) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
            if how in ("read", "half"):
                sock.shutdown(socket.SHUT_WR)
                receive_all(sock)  # ends, or times out: then the server hangs
            elif how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        except TimeoutError:
            raise
        except OSError:
            pass  # cut off, which is an answer
    assert exchange(address, b"PING\n").startswith(b'{"status": "OK"')


def test_anything_when_it_arrives_then_the_next_client_is_served(single: Cluster) -> None:
    """Garbage, halves, lies about lengths: the sender is answered or cut off, nobody else notices."""
    baseline = Baseline(single)

    _send_anything(single.address("node1"))

    baseline.check()


def test_close_when_the_client_has_reset_the_connection_then_no_error() -> None:
    """Who sent nonsense and went away before it was told is no fault of ours (found by fuzzing)."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        served, _ = listening.accept()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    with served:
        with pytest.raises(ConnectionResetError):
            served.recv(1)

        kv_store_server._close_gently(served)


def test_connection_when_dropped_at_any_byte_then_nothing_of_it_stays(single: Cluster) -> None:
    """Half a request is not done; a whole one is."""
    address = single.address("node1")
    baseline = Baseline(single)
    whole = _as_resp(["INCR", "whole"])
    half = _as_resp(["SET", "half", "1"])

    for cut in range(len(half)):
        with socket.create_connection(address, timeout=10) as sock:
            sock.sendall(whole + half[:cut])

    def counted() -> bool:
        return bool(ask(address, "GET whole").get("value") == len(half))

    eventually(counted, "every whole request is done, though nobody waited for the reply")
    assert ask(address, "GET half")["status"] == "NOT_FOUND"
    baseline.check()


def test_wait_when_its_client_has_gone_then_nothing_waits_for_it(single: Cluster) -> None:
    """Else threads of an hour would gather, of who asks and goes (found by fuzzing)."""
    address = single.address("node1")
    baseline = Baseline(single)

    for timeout_ms in ("0", "65535", "9" * 18):
        for _ in range(5):
            with socket.create_connection(address, timeout=10) as sock:
                sock.sendall(_as_resp(["WAIT", "3", timeout_ms]) + _as_resp(["PING"]))
        assert exchange(address, _as_resp(["WAIT", "3", timeout_ms])) == b":0\r\n"

    baseline.check()


def test_slow_senders_when_many_then_others_are_served_at_once(single: Cluster) -> None:
    """Connections that say next to nothing cost a thread each, and nobody else anything."""
    address = single.address("node1")
    baseline = Baseline(single)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(address)) for _ in range(200)]
        request = _as_resp(["SET", "slow", "1"])
        for byte in range(5):
            for sock in slow:
                sock.sendall(request[byte : byte + 1])

            began_s = time.monotonic()
            assert ask(address, "SET fast 1")["status"] == "OK"
            assert time.monotonic() - began_s < 2.0
    baseline.check()


def test_claims_when_many_announce_large_requests_then_memory_stays_flat(single: Cluster) -> None:
    """What is announced is not allocated; only what has come is held."""
    baseline = Baseline(single)
    claim = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n" % (REQUEST_BYTES_MAX - 100)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(socket.create_connection(single.address("node1")))
            sock.sendall(claim + b"x" * 1000)
        process = single.process("node1")
        assert process is not None
        assert single.ask("node1", "PING")["status"] == "OK"
    baseline.check()


def test_replies_when_nobody_reads_them_then_they_are_not_made(single: Cluster) -> None:
    """A short pipeline can ask for gigabytes; made is only what fits on the way (promise G8)."""
    count, size = 2000, 500_000
    with single.resp("node1") as connection:
        assert connection.ask("SET", "big", "x" * size) == "OK"
    process = single.process("node1")
    assert process is not None
    before_bytes = peak_bytes = process.memory_info().rss
    with single.resp("node1") as connection:
        connection.sock.sendall(_as_resp(["GET", "big"]) * count)  # 1 GB, if all were made
        watched_until_s = time.monotonic() + 2.0
        while time.monotonic() < watched_until_s:
            peak_bytes = max(peak_bytes, process.memory_info().rss)
            assert single.ask("node1", "GET nothing")["status"] == "NOT_FOUND"
        assert peak_bytes - before_bytes < 2 * GROWTH_BYTES_MAX

        replies = connection.replies()
        assert all(len(next(replies)) == size for _ in range(50)), "whoever reads gets them"  # type: ignore[arg-type]
    single.ask("node1", "DELETE big")


def test_replies_when_made_piece_by_piece_then_none_is_lost_or_changes_its_place(
    single: Cluster,
) -> None:
    """Large and small, values and errors, and what is asked next on the same connection."""
    requests = [["GET", f"piece{i % 7}"] for i in range(60)]
    requests[20:20] = [["PING"], ["STRLEN", "piece0"], ["NONSENSE"]]
    with single.resp("node1") as connection:
        for i in range(7):
            assert connection.ask("SET", f"piece{i}", f"{i}" * 200_000) == "OK"
        connection.sock.sendall(b"".join(map(_as_resp, requests)))
        replies = connection.replies()
        first = [next(replies) for _ in requests]
        assert connection.ask("ECHO", "after") == b"after"

    values = [b"%d" % (i % 7) * 200_000 for i in range(60)]
    assert first[:20] + first[23:] == values
    assert first[20:22] == ["PONG", 200_000]
    assert isinstance(first[22], KVError)


def test_connections_when_many_come_and_go_then_nothing_is_left_of_them(single: Cluster) -> None:
    """Threads, descriptors and the table of sessions."""
    baseline = Baseline(single)
    address = single.address("node1")

    def come_and_go(_: int) -> None:
        with LineConnection(address) as connection:
            assert connection.ask("PING")["status"] == "OK"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(400)))

    baseline.check()
    with redis.Redis(port=address[1]) as client:
        eventually(lambda: len(client.client_list()) == 1, "only who asks is listed")


def test_peer_port_when_strangers_speak_then_the_node_goes_on(single: Cluster) -> None:
    """The port for peers is open to anybody as well."""
    baseline = Baseline(single)
    node = single.node("node1")
    peer_address = (node.address[0], node.peer_port)

    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"\0\0\0\x40" + b"x" * 64):
        with socket.create_connection(peer_address, timeout=10) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
    assert single.ask("node1", "SET k v")["status"] == "OK"
    baseline.check()


def test_removed_node_when_the_primary_joined_after_it_left_then_a_secondary_names_the_primary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only a primary's word counts, and this node's own list of members may be older than it."""
    members = [{"member_id": "00000000000000bb"}, {"member_id": "00000000000000cc"}]
    primary = {"node_id": "c", "host": "127.0.0.1", "port": 3}
    common = {"cluster_id": "x", "primary": primary, "members": members}
    nodes = {2: {**common, "role": "SECONDARY"}, 3: {**common, "role": "PRIMARY"}}
    monkeypatch.setattr(kv_store_server, "_ask", lambda address, line: nodes.get(address[1]))
    known = Membership((Member("00000000000000bb", "b", "127.0.0.1", 2, 12, voter=True),))
    server = Mock(spec=kv_store_server.Server)
    server.node = Mock(membership=known, identity=Identity("x", "00000000000000aa", "a"))

    assert kv_store_server.Server._is_said_to_be_removed(server)
    members.append({"member_id": "00000000000000aa"})
    assert not kv_store_server.Server._is_said_to_be_removed(server)
