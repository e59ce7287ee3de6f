"""Five demonstrations, an interactive prompt and a bulk loader, all on ``KVStoreClient``.

Rule 1: a demonstration says what it does and checks what it says: a claim that does not hold ends
it with exit status 1. It works on keys of its own and removes them.
Rule 2: only the failover demonstration kills a node, and only of the cluster that it started.
Rule 3: what was stored can be told at any moment: the loader notes its progress after each batch.

Exit status: 0 done, 1 failed or not all done, 2 wrong usage. Runs on the main thread; the failover
and concurrency demonstrations add writers of their own. Read on in ``kv_client.py``.
"""

from __future__ import annotations

import argparse
import io
import json
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Final, NamedTuple

from kv_client import DEFAULT_NODES, UNSUITABLE_COMMANDS, Address, JSONValue, KVStoreClient
from kv_commands import COMMANDS, Command
from kv_errors import (
    BadRequestError,
    KVError,
    MismatchError,
    NoPrimaryError,
)
from kv_protocol import RequestParser, json_or_text, text_or_json_bytes
from kv_types import RepeatedReply, Reply

if TYPE_CHECKING:
    from cluster_manager import ClusterManager

__all__ = ["KVStoreClient", "main"]

CALL_TIMEOUT_S: Final = 10.0
BATCH_LINES_MAX: Final = 500
BATCH_BYTES_MAX: Final = 1024 * 1024
# Long enough for a failover by time-out (5-8 s) in the middle of a batch.
LOAD_TIMEOUT_S: Final = 30.0
SETTLE_TIMEOUT_S: Final = 30.0  # for the secondaries to catch up, or to elect
REPORT_EVERY_S: Final = 2.0
FAULTS_TOLD_MAX: Final = 5
REQUEST_BYTES_MAX: Final = 64 * 1024 * 1024  # the server's default
HISTORY_FILE: Final = Path("~/.kvstore_history")
START_HINT: Final = "Start a cluster first: python cluster_manager.py --action start"


class LoadError(Exception):
    """The file and its progress do not go together; the message says what to do."""


class ClaimError(Exception):
    """A demonstration claimed something that is not true."""


def say(text: str) -> None:
    print(text, flush=True)


def claim(text: str, holds: bool) -> None:
    """Print what has just been shown; ClaimError if it is not so."""
    if not holds:
        raise ClaimError(text)
    say(f"  ok: {text}")


def wait_until(holds: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def own_keys(client: KVStoreClient) -> Iterator[str]:
    """A prefix that no other program uses; its keys are gone afterwards."""
    prefix = f"demo:{secrets.token_hex(4)}:"
    try:
        yield prefix
    finally:
        left = client.keys(f"{prefix}*")
        if left:
            client.delete(*left)


# ---- Demonstrations on a running cluster ---------------------------------------------------------


def demo_basic(client: KVStoreClient) -> None:
    """Values by key: store, read, count, compare and set, expire, delete."""
    with own_keys(client) as prefix:
        name, visits, session = prefix + "name", prefix + "visits", prefix + "session"

        say("SET, GET, EXISTS")
        client.set(name, "Ada")
        claim("what was set is read back", client.get(name) == "Ada")
        claim("a key that is not there gives the default", client.get(prefix + "x", "-") == "-")
        claim("one of two keys exists", client.exists(name, prefix + "x") == 1)
        claim("set with nx leaves a key that exists", not client.set(name, "Bob", nx=True))

        say("INCR, MSET, MGET, KEYS")
        claim("a counter starts at 0", client.incr(visits) == 1)
        claim("and adds", client.incr(visits, 9) == 10)
        client.mset({prefix + "a": 1, prefix + "b": 2})
        values = client.mget([prefix + "a", prefix + "b", prefix + "c"])
        claim("several keys are written and read at once", values == [1, 2, None])
        claim(
            "a pattern finds them",
            sorted(client.keys(prefix + "[ab]")) == [prefix + "a", prefix + "b"],
        )

        say("GETS, CAS: a change that is lost to nobody")
        found = client.gets(name)
        claim("a value comes with its version", found is not None and found.value == "Ada")
        version = found.version if found else 0
        newer = client.cas(name, "Ada Lovelace", version)
        claim("a write under the right version succeeds and gives a higher one", newer > version)
        try:
            client.cas(name, "Eve", version)
            claim("a write under an old version is refused", False)
        except MismatchError as error:
            claim("a write under an old version is refused", error.version == newer)

        say("EXPIRE, TTL, DELETE")
        client.set(session, "token", ttl_s=0.2)
        left_s = client.ttl(session)
        claim("a key can have a time to live", left_s is not None and left_s <= 0.2)
        claim("and is gone after it", wait_until(lambda: client.get(session) is None, 5))
        claim("delete tells how many there were", client.delete(name, session) == 1)


def demo_json(client: KVStoreClient) -> None:
    """Any JSON value comes back as it was, with its type."""
    samples: dict[str, JSONValue] = {
        "text": "plain text",
        "text of digits": "42",
        "number": 42,
        "fraction": 0.1,
        "large number": 2**80,
        "truth": True,
        "nothing": None,
        "unicode": "Grüße, 世界 \N{ROCKET}",
        "list": [1, "1", 1.5, [], None],
        "document": {"user": {"name": "Ada", "tags": ["math", "engine"]}, "active": True},
    }
    with own_keys(client) as prefix:
        for name, value in samples.items():
            client.set(prefix + name, value)
            back = client.get(prefix + name, "missing")
            claim(
                f"{name}: {json.dumps(value, ensure_ascii=False)}",
                back == value and type(back) is type(value),
            )

        say("A document is changed by reading it with its version and writing it back under it")
        found = client.gets(prefix + "document")
        claim("the document is there", found is not None)
        if found is not None and isinstance(found.value, dict):
            client.cas(prefix + "document", found.value | {"active": False}, found.version)
        changed = client.get(prefix + "document")
        claim("only one field changed", changed == {**samples["document"], "active": False})  # type: ignore[dict-item]


def demo_concurrent(client: KVStoreClient) -> None:
    """Many threads share one client and lose no update."""
    threads, rounds = 8, 25
    with own_keys(client) as prefix, ThreadPoolExecutor(threads) as pool:
        counter, account = prefix + "counter", prefix + "account"

        say(f"{threads} threads count to {rounds} each on one counter")
        started = time.monotonic()
        list(pool.map(lambda _: client.incr(counter), range(threads * rounds)))
        rate = threads * rounds / (time.monotonic() - started)
        claim(
            f"the counter stands at exactly {threads * rounds} ({rate:,.0f} increments/s)",
            client.get(counter) == threads * rounds,
        )

        say(
            f"{threads} threads add to one document with CAS, and read again when another was first"
        )
        client.set(account, {"balance": 0})
        clashes = sum(pool.map(lambda _: _deposit(client, account), range(threads * rounds)))
        claim(
            f"no deposit is lost ({clashes} times another thread was first)",
            client.get(account) == {"balance": threads * rounds},
        )


def _deposit(client: KVStoreClient, account: str) -> int:
    """Add 1 to the balance; how often another thread's write came between reading and writing."""
    clashes = 0
    while True:
        found = client.gets(account)
        if found is None or not isinstance(found.value, dict):
            raise ClaimError(f"{account} holds a document")
        try:
            client.cas(account, {"balance": found.value["balance"] + 1}, found.version)
            return clashes
        except MismatchError:
            clashes += 1


def demo_replication(client: KVStoreClient) -> None:
    """All nodes hold the same data, and only the primary answers for it."""
    with own_keys(client) as prefix:
        say("100 keys are written through the primary")
        for number in range(100):
            client.set(f"{prefix}{number}", {"number": number})

        say("Every node is asked how far it is and for the hash of all its data")
        claim(
            "every node that answers has applied the same entries and holds the same data",
            wait_until(lambda: _same_everywhere(client), SETTLE_TIMEOUT_S),
        )
        _print_nodes(client)

        secondaries = [
            node
            for node, status in client.statuses().items()
            if status and status["role"] == "SECONDARY"
        ]
        for node in secondaries:
            refusal = _say_line(Address.parse(node), f"SET {prefix}0 other")
            claim(
                f"{node} refuses a write: {refusal.get('message')}",
                refusal.get("code") == "NOT_PRIMARY",
            )
        if not secondaries:
            say("  This cluster has one node: there is no secondary to ask.")


def _same_everywhere(client: KVStoreClient) -> bool:
    told = [status for status in client.statuses().values() if status]
    return bool(told) and len({(s["applied_index"], s["state_hash"]) for s in told}) == 1


def _print_nodes(client: KVStoreClient) -> None:
    say(f"  {'node':<12} {'address':<22} {'role':<10} {'term':>5} {'applied':>9}  state hash")
    for node, status in client.statuses().items():
        if status is None:
            say(f"  {'?':<12} {node:<22} gives no answer")
        else:
            say(
                f"  {status['node_id']!s:<12} {node:<22} {status['role']!s:<10} {status['term']!s:>5}"
                f" {status['applied_index']!s:>9}  {status['state_hash']}"
            )


def _say_line(address: Address, line: str) -> dict[str, object]:
    """One request in the line language, as a person with ``nc`` would send it."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(line.encode() + b"\n")
        with connection.makefile("rb") as answers:
            found = json.loads(answers.readline())
    return found if isinstance(found, dict) else {}


# ---- Failover, on a cluster of its own -----------------------------------------------------------


class _Written(NamedTuple):
    """An acknowledged write."""

    key: str
    at_s: float  # time.monotonic()
    node: str | None  # that acknowledged it


class _Writer(threading.Thread):
    """Writes numbered keys one after the other, and remembers what was acknowledged."""

    def __init__(self, client: KVStoreClient) -> None:
        super().__init__(name="demo-writer", daemon=True)
        self._client = client
        self._stopping = threading.Event()
        # Appended to by this thread only; read by others at any time.
        self.acknowledged: list[_Written] = []

    def run(self) -> None:
        number = 0
        while not self._stopping.is_set():
            key = f"demo:write:{number}"
            number += 1
            try:
                self._client.set(key, number)
            except KVError as error:
                say(f"  a write was not acknowledged: {error}")
                continue
            self.acknowledged.append(_Written(key, time.monotonic(), self._client.last_node))

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def demo_failover(_: KVStoreClient) -> None:
    """The primary is killed under writes: another takes over, and nothing acknowledged is lost."""
    # Here alone, so that everything else runs without psutil.
    from cluster_manager import ClusterManager, ManagerError

    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as directory:
        say("Three nodes are started on free ports, with their data in a temporary directory")
        cluster = ClusterManager(nodes=3, base_port=None, data_dir=Path(directory))
        nodes = [str(Address(*address)) for address in cluster.addresses]
        try:
            cluster.start(say)
            with KVStoreClient(nodes, timeout_s=20) as client:
                _fail_over(cluster, client)
        except ManagerError as error:
            raise ClaimError(f"three nodes run on this host: {error}") from error
        finally:
            cluster.stop(say)


def _fail_over(cluster: ClusterManager, client: KVStoreClient) -> None:
    writer = _Writer(client)
    writer.start()
    try:
        claim("writes go on", wait_until(lambda: len(writer.acknowledged) >= 100, 20))
        node, node_id = _primary(client)

        say(f"The primary, {node_id} at {node}, is killed (SIGKILL)")
        cluster.kill_node(node_id)
        killed_s = time.monotonic()
        written = writer.acknowledged

        def by_another() -> _Written | None:
            return next(
                (w for w in reversed(written) if w.at_s > killed_s and w.node != node), None
            )

        claim(
            "another node acknowledges writes",
            wait_until(lambda: by_another() is not None, SETTLE_TIMEOUT_S),
        )
        first = next(w for w in written if w.at_s > killed_s and w.node != node)
        say(
            f"  {first.node} acknowledged its first write {first.at_s - killed_s:.2f} s after the kill"
        )
    finally:
        writer.stop()

    keys = [w.key for w in written]
    lost = sum(client.mget(keys[at : at + 1000]).count(None) for at in range(0, len(keys), 1000))
    claim(f"all {len(keys):,} acknowledged writes are there", lost == 0)

    say(f"{node_id} is started again")
    cluster.start_node(node_id)
    claim(
        "it is a secondary with the same data as the others",
        wait_until(lambda: client.statuses().get(node) is not None, SETTLE_TIMEOUT_S)
        and wait_until(lambda: _same_everywhere(client), SETTLE_TIMEOUT_S),
    )
    _print_nodes(client)


def _primary(client: KVStoreClient) -> tuple[str, str]:
    """The address and the name of the primary."""
    for node, status in client.statuses().items():
        if status and status["role"] == "PRIMARY":
            return node, str(status["node_id"])
    raise NoPrimaryError


DEMOS: Final[dict[str, Callable[[KVStoreClient], None]]] = {
    "basic": demo_basic,
    "replication": demo_replication,
    "failover": demo_failover,
    "json": demo_json,
    "concurrent": demo_concurrent,
}


def run_demos(client: KVStoreClient, names: Sequence[str]) -> None:
    for name in names:
        demo = DEMOS[name]
        say(f"== {name}: {demo.__doc__}")
        demo(client)
    say("All claims held.")


# ---- The prompt ----------------------------------------------------------------------------------


def interact(client: KVStoreClient, lines: Iterable[str]) -> None:
    """Answer line after line; an error is an answer too. Ends with ``quit`` or the last line."""
    for line in lines:
        try:
            argv = parse_line(line)
        except KVError as error:
            say(show(error))
            continue
        match [word.decode(errors="replace").upper() for word in argv]:
            case []:
                continue
            case ["QUIT" | "EXIT"]:
                return
            case ["HELP", *words]:
                say(help_text(words[0] if words else None))
            case _:
                _answer(client, argv)


def _answer(client: KVStoreClient, argv: Sequence[bytes]) -> None:
    started_s = time.monotonic()
    try:
        told = show(client.execute(*argv))
    except KVError as error:
        told = show(error)
    except KeyboardInterrupt:
        told = "(cancelled: if this was a write, it may have been done)"
    elapsed_ms = (time.monotonic() - started_s) * 1000
    say(f"{told}\n  [{client.last_node or 'no node'}, {elapsed_ms:.1f} ms]")


def parse_line(line: str) -> list[bytes]:
    """The request in a line of the line language, as a node would read it; BadRequestError."""
    parser = RequestParser(REQUEST_BYTES_MAX)
    # The blank says that this is no RESP, whatever the line begins with.
    parser.feed(b" " + line.strip().encode("utf-8", "surrogateescape") + b"\n")
    match parser.take():
        case [KVError() as error]:
            raise error
        case [list(argv)]:
            return argv
        case _:
            return []


def show(reply: Reply) -> str:
    """A reply for a person: values as JSON, documents over several lines."""
    match reply:
        case None:
            return "(nothing)"
        case KVError():
            return f"({reply.code}) {reply}"
        case bytes():
            value = json_or_text(reply)
            if isinstance(value, str) and "\n" in value:
                return value.rstrip()
            return json.dumps(
                value, ensure_ascii=False, indent=2 if isinstance(value, dict) else None
            )
        case str() | int():
            return str(reply)
        case RepeatedReply():
            return show(reply.reply)
        case dict():
            return "\n".join(f"{show(key)}: {show(value)}" for key, value in reply.items())
        case _:
            items = (indent(show(item), "   ").lstrip() for item in reply)
            return "\n".join(f"{n}) {item}" for n, item in enumerate(items, 1)) or "(none)"


def help_text(name: str | None) -> str:
    """All commands by group, or one of them."""
    rows = [row for row in COMMANDS.values() if "internal" not in row.flags]
    if name is not None:
        return next((_help_row(row) for row in rows if row.name == name), f"No command {name}.")
    lines = ["Values are JSON or plain text. HELP COMMAND tells about one command, QUIT leaves."]
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += [f"{group}:", *(f"  {row.name:<10} {row.summary}" for row in members)]
    return "\n".join(lines)


def _help_row(row: Command) -> str:
    return f"{row.usage}\n  {row.summary}\n  Since {row.since}, group {row.group}."


def completions() -> dict[str, dict[str, None] | None]:
    """What Tab offers as the first word, and as the one after it."""
    names = [row.name for row in COMMANDS.values() if "internal" not in row.flags]
    # Those are about a connection, where the prompt has many. But everybody knows how to leave.
    useful = [n for n in names if n.encode() not in UNSUITABLE_COMMANDS or n == "QUIT"]
    # What stands before a word to be completed is looked up as it is typed.
    return {**dict.fromkeys(useful), "HELP": dict.fromkeys(names), "help": dict.fromkeys(names)}


def lines_from_prompt() -> Iterator[str]:
    """Lines as they are typed: with history and completion. Ctrl-C drops one, Ctrl-D ends."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter
    from prompt_toolkit.history import FileHistory

    session: PromptSession[str] = PromptSession(
        history=FileHistory(HISTORY_FILE.expanduser()),
        completer=NestedCompleter.from_nested_dict(completions()),
        # A completion already under way for what is typed would swallow the Tab.
        complete_while_typing=False,
    )
    say("HELP lists the commands, Tab completes them, Ctrl-D leaves.")
    while True:
        try:
            line = session.prompt("kv> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        yield line


# ---- The loader ----------------------------------------------------------------------------------


@dataclass
class LoadPosition:
    """How far a load has come. Invariant: everything before ``offset`` is stored or counted bad."""

    cluster_id: str
    offset: int = 0  # bytes of the file
    lines: int = 0
    stored: int = 0
    bad: int = 0

    def save(self, path: Path) -> None:
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_text(json.dumps(asdict(self)))
        fresh.replace(path)

    @classmethod
    def resume(cls, path: Path, cluster_id: str) -> LoadPosition:
        """Where the last run stopped; the beginning if there was none, or with another cluster."""
        try:
            found = cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls(cluster_id)
        except (ValueError, TypeError) as error:
            raise LoadError(f"{path} is damaged: delete it to load from the beginning.") from error
        if found.cluster_id != cluster_id:
            say(f"{path} is about another cluster: loading from the beginning.")
            return cls(cluster_id)
        say(f"Resuming after line {found.lines:,} ({path}).")
        return found


class _Line(NamedTuple):
    """One line of the file: a key with its value, or what is wrong with it."""

    size: int  # bytes, with its line end
    key: str = ""
    value: bytes | None = None  # None: there is nothing to store
    fault: str = ""


def load(client: KVStoreClient, path: Path, key_field: str | None) -> bool:
    """Store every line of a JSONL file; True if all were stored. KVError: stopped, can be resumed."""
    progress_path = path.with_name(path.name + ".progress")
    position = LoadPosition.resume(progress_path, str(client.status()["cluster_id"]))
    started_s, stored_before = time.monotonic(), position.stored
    with path.open("rb") as file, _meter(path.stat().st_size, position) as advance:
        # One byte before, because a line has to end there.
        file.seek(max(position.offset - 1, 0))
        if position.offset and file.read(1) != b"\n":
            raise LoadError(
                f"{path} has changed since it was loaded in part: delete {progress_path}"
                " to load it from the beginning."
            )
        for batch in _batches(_parse(line, key_field) for line in file):
            _store(client, batch, position)
            position.save(progress_path)
            advance()
    progress_path.unlink(missing_ok=True)
    elapsed_s = time.monotonic() - started_s
    say(
        f"Stored {position.stored:,} of {position.lines:,} lines of {path}, {position.bad:,} bad"
        f" ({(position.stored - stored_before) / max(elapsed_s, 1e-9):,.0f} lines/s)."
    )
    return position.bad == 0


def _parse(line: bytes, key_field: str | None) -> _Line:
    if not line.strip():
        return _Line(len(line))
    try:
        found = json.loads(line)
        key = found[key_field or "key"]
        value = text_or_json_bytes(found if key_field else found["value"])
    except (ValueError, RecursionError) as error:
        return _Line(len(line), fault=f"no JSON: {error}")
    except (LookupError, TypeError):
        return _Line(len(line), fault=f"no object with {key_field or 'key and value'}")
    if isinstance(key, bool) or not isinstance(key, str | int):
        return _Line(len(line), fault=f"the key is neither text nor a whole number: {key!r:.40}")
    return _Line(len(line), str(key), value)


def _batches(lines: Iterable[_Line]) -> Iterator[list[_Line]]:
    """Lines in order, some at a time, and never one key twice.

    Requests that are sent together have no order around a failover, and the last line must win.
    """
    batch: list[_Line] = []
    keys: set[str] = set()
    size = 0
    for line in lines:
        is_full = len(batch) >= BATCH_LINES_MAX or size + line.size > BATCH_BYTES_MAX
        if batch and (is_full or line.key in keys):
            yield batch
            batch, keys, size = [], set(), 0
        batch.append(line)
        size += line.size
        if line.value is not None:
            keys.add(line.key)
    if batch:
        yield batch


def _store(client: KVStoreClient, batch: Sequence[_Line], position: LoadPosition) -> None:
    """Store one batch and move on; KVError if it could not be, with ``position`` as it was.

    A part may then be stored already: it is stored again, to the same effect, on resuming.
    """
    pairs = [(line.key, line.value) for line in batch if line.value is not None]
    replies = iter(client.execute_many(("SET", key, value) for key, value in pairs))
    stored, faults = 0, []
    for number, line in enumerate(batch, start=position.lines + 1):
        fault = line.fault
        if line.value is not None:
            reply = next(replies)
            if isinstance(reply, BadRequestError):
                fault = str(reply)
            elif isinstance(reply, KVError):
                raise reply
            else:
                stored += 1
        if fault:
            faults.append(f"line {number}: {fault}")
    for told in faults[: max(FAULTS_TOLD_MAX - position.bad, 0)]:
        say(told)
    if position.bad <= FAULTS_TOLD_MAX < position.bad + len(faults):
        say("(and more, which are counted only)")
    position.offset += sum(line.size for line in batch)
    position.lines += len(batch)
    position.stored += stored
    position.bad += len(faults)


@contextmanager
def _meter(size: int, position: LoadPosition) -> Iterator[Callable[[], None]]:
    """Yields what shows the position: a bar on a terminal, else a line from time to time."""
    if not sys.stdout.isatty():
        yield _plain_meter(size, position)
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("Loading"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[stored]:,} stored, {task.fields[bad]:,} bad"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=size, stored=position.stored, bad=position.bad)
        yield lambda: progress.update(
            task, completed=position.offset, stored=position.stored, bad=position.bad
        )


def _plain_meter(size: int, position: LoadPosition) -> Callable[[], None]:
    due_s = time.monotonic() + REPORT_EVERY_S

    def advance() -> None:
        nonlocal due_s
        if time.monotonic() >= due_s:
            due_s = time.monotonic() + REPORT_EVERY_S
            say(
                f"{position.offset / max(size, 1):.0%}: {position.stored:,} stored, {position.bad:,} bad"
            )

    return advance


# ---- Command line --------------------------------------------------------------------------------


def _node_list(text: str) -> list[str]:
    try:
        return [str(Address.parse(node)) for node in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, not {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=START_HINT + "."
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--demo", choices=[*DEMOS, "all", "interactive"], help="what to show")
    action.add_argument(
        "--load",
        type=Path,
        metavar="FILE.jsonl",
        help='store the lines {"key": ..., "value": ...} of a file. Progress is kept in'
        " FILE.jsonl.progress: the same command goes on after an interruption, and starts afresh"
        " without that file",
    )
    parser.add_argument(
        "--key-field",
        metavar="NAME",
        help="with --load: each line is any JSON object, stored whole under its field NAME",
    )
    parser.add_argument(
        "--nodes",
        type=_node_list,
        default=",".join(DEFAULT_NODES),
        metavar="HOST:PORT,...",
        help="some nodes of the cluster; the others are learned (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.key_field and not options.load:
        parser.error("--key-field belongs to --load")
    _tolerate_any_text()
    timeout_s = LOAD_TIMEOUT_S if options.load else CALL_TIMEOUT_S
    try:
        with KVStoreClient(options.nodes, timeout_s=timeout_s) as client:
            if options.load:
                return 0 if load(client, options.load, options.key_field) else 1
            if options.demo == "interactive":
                interact(client, lines_from_prompt() if sys.stdin.isatty() else sys.stdin)
            else:
                run_demos(client, list(DEMOS) if options.demo == "all" else [options.demo])
    except ClaimError as error:
        return _fail(f"This does not hold: {error}")
    except NoPrimaryError as error:
        return _fail(f"{error}\n{START_HINT}")
    except (KVError, LoadError, OSError) as error:
        return _fail(str(error))
    except ImportError as error:
        return _fail(f"{error}: python -m pip install -r requirements.txt")
    except KeyboardInterrupt:
        return _fail("Interrupted." + (" The same command goes on." if options.load else ""))
    return 0


def _tolerate_any_text() -> None:
    """Let no character end the program: not every terminal has them all, nor every key UTF-8."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _fail(why: str) -> int:
    print(why, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
