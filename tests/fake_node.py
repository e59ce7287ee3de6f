"""A node for the tests of the manager: it answers as a node does, and stores nothing.

What Raft would decide stands in one file for all (``fake.json`` beside the node directories): the
members, the primary and the term. A voter takes the lead when the primary's process has gone and a
majority of the voters lives. ``FAKE_<BEHAVIOUR>=node2`` in the
environment makes that node misbehave; what it sends as a backup is the file FAKE_BACKUP:

    FAKE_DIES         prints 20 lines and exits with status 3
    FAKE_STUBBORN     ignores SIGTERM
    FAKE_LEARNER      never becomes a voter
    FAKE_BEHIND       never applies the last entry
    FAKE_FOREIGN      belongs to another cluster
    FAKE_INSTALLING   has received 42 % of a snapshot, for ever
    FAKE_TROUBLED     complains of its disk
    FAKE_BREAKS       ends in the middle of a backup
    FAKE_BUSY         refuses the first changes for now
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil

from cluster_nodes import is_of, start_of
from kv_config import EXIT_REMOVED, Settings, parse_settings

Fields = dict[str, Any]
COMMITTED = 7


def misbehaves(settings: Settings, how: str) -> bool:
    return os.environ.get(f"FAKE_{how}") == settings.node_id


class FakeNode(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, settings: Settings, learner: bool) -> None:
        super().__init__((settings.host, settings.port), LineHandler)
        self.settings = settings
        self.stays_learner = learner or misbehaves(settings, "LEARNER")
        self.refusals_left = 2 if misbehaves(settings, "BUSY") else 0
        self.started = time.monotonic()
        self.process = [os.getpid(), start_of(psutil.Process())]
        self.path = settings.data_dir / "identity.json"
        self.shared_path = settings.data_dir.parent / "fake.json"
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.identity = json.loads(self.path.read_text())
        else:
            self.identity = {"member_id": secrets.token_hex(8)}
            self.belong_to("")
        if misbehaves(settings, "FOREIGN"):
            self.belong_to("elsewhere")
        if not self.identity["cluster_id"] and settings.primary:
            with self.change() as shared:
                shared.update(cluster_id=secrets.token_hex(8), term=1, members={})
                self.join(shared)
                shared["primary"] = self.member_id
            self.belong_to(shared["cluster_id"])

    @property
    def member_id(self) -> str:
        return str(self.identity["member_id"])

    def belong_to(self, cluster_id: str) -> None:
        self.identity["cluster_id"] = cluster_id
        self.path.write_text(json.dumps(self.identity))

    # ---- What all nodes share ----

    def read(self) -> Fields:
        """What Raft would have decided. No lock: a node that is suspended must not hold up others."""
        shared: Fields = {"members": {}, "term": 0, "primary": "", "cluster_id": ""}
        if self.shared_path.exists():
            shared = json.loads(self.shared_path.read_text())
        return shared

    @contextmanager
    def change(self) -> Iterator[Fields]:
        """The same, to be changed."""
        with self.shared_path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            shared = self.read()
            yield shared
            written = self.shared_path.with_suffix(".new")
            written.write_text(json.dumps(shared))
            written.rename(self.shared_path)

    def join(self, shared: Fields) -> None:
        """Become a member, in place of an older one of this name."""
        members, node_id = shared["members"], self.settings.node_id
        for member_id in [m for m, member in members.items() if member["node_id"] == node_id]:
            del members[member_id]
        members[self.member_id] = {
            "node_id": node_id,
            "host": self.settings.advertise_host,
            "port": self.settings.port,
            "voter": not self.stays_learner,
            "process": self.process,
        }

    def live(self) -> None:
        """Join, take the lead, notice a removal: what a node does by itself."""
        while True:
            if self.has_to_act(self.read()):
                with self.change() as shared:
                    if self.has_to_act(shared):
                        self.act(shared)
                # Not before all can read it: a node of the cluster that is no member was removed.
                if self.member_id in shared["members"] and not self.identity["cluster_id"]:
                    self.belong_to(shared["cluster_id"])
            time.sleep(0.02)

    def has_to_act(self, shared: Fields) -> bool:
        mine = shared["members"].get(self.member_id)
        if mine is None or mine["process"] != self.process:
            return True
        return mine["voter"] and not is_led(shared) and majority_lives(shared)

    def act(self, shared: Fields) -> None:
        mine = shared["members"].get(self.member_id)
        if mine and mine["process"] != self.process:
            mine["process"] = self.process
        elif mine:
            shared["primary"] = self.member_id
            shared["term"] += 1
        elif is_led(shared) and not self.identity["cluster_id"]:
            self.join(shared)
        elif is_led(shared) and self.identity["cluster_id"] == shared["cluster_id"]:
            say("removed")
            os._exit(EXIT_REMOVED)

    # ---- Answers ----

    def status(self) -> Fields:
        shared = self.read()
        leads = shared["primary"] == self.member_id and is_led(shared)
        mine = shared["members"].get(self.member_id, {})
        role = "PRIMARY" if leads else "SECONDARY" if mine.get("voter") else "LEARNER"
        return {
            "status": "OK",
            "node_id": self.settings.node_id,
            **self.identity,
            "role": role,
            "term": shared["term"],
            "commit_index": COMMITTED,
            "applied_index": COMMITTED - misbehaves(self.settings, "BEHIND"),
            "keys": 5,
            "failures_tolerated": 3,
            "uptime_seconds": time.monotonic() - self.started,
            "trouble": "the disk is full" if misbehaves(self.settings, "TROUBLED") else None,
            "argv": sys.argv[1:],
        }

    def cluster(self) -> Fields:
        rows = [{"member_id": name, **rest} for name, rest in self.read()["members"].items()]
        for row in rows:
            if os.environ.get("FAKE_INSTALLING") == row["node_id"]:
                row.update(snapshot=0.42, voter=False)
        return {**self.status(), "members": sorted(rows, key=lambda row: row["node_id"])}

    def remove(self, node_id: str) -> Fields:
        with self.change() as shared:
            members = shared["members"]
            for member_id, member in list(members.items()):
                if member["node_id"] == node_id:
                    del members[member_id]
                    return {"status": "OK"}
        return error("BAD_REQUEST", f"there is no {node_id}")

    def hand_over(self, node_id: str | None) -> Fields:
        with self.change() as shared:
            by_name = sorted(shared["members"].items(), key=lambda item: item[1]["node_id"])
            for member_id, member in by_name:
                fits = node_id in (None, member["node_id"]) and member_id != self.member_id
                if fits and member["voter"] and lives(member):
                    shared["primary"] = member_id
                    shared["term"] += 1
                    primary = {name: member[name] for name in ("node_id", "host", "port")}
                    return {"status": "OK", "primary": primary}
        return error("BAD_REQUEST", f"{node_id or 'no other node'} can't lead")

    def answer(self, words: list[str]) -> Fields:
        match words:
            case ["STATUS"]:
                return self.status()
            case ["CLUSTER"]:
                return self.cluster()
            case ["MEMBER" | "FAILOVER", *_] if self.refusals_left:
                self.refusals_left -= 1
                return error("BUSY", "a change is under way")
            case ["MEMBER" | "FAILOVER", *_] if self.status()["role"] != "PRIMARY":
                return error("NOT_PRIMARY", "This node is not primary.")
            case ["MEMBER", "REMOVE", node_id]:
                return self.remove(node_id)
            case ["FAILOVER"]:
                return self.hand_over(None)
            case ["FAILOVER", "TO", node_id]:
                return self.hand_over(node_id)
        return error("BAD_REQUEST", "unknown command")


class LineHandler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        node = self.server
        assert isinstance(node, FakeNode)
        for line in self.rfile:
            if line == b"BACKUP\n" and "FAKE_BACKUP" in os.environ:
                return self.send_backup(node, Path(os.environ["FAKE_BACKUP"]).read_bytes())
            self.wfile.write(json.dumps(node.answer(line.decode().split())).encode() + b"\n")

    def send_backup(self, node: FakeNode, data: bytes) -> None:
        """In chunks of 1 KiB, each with its length before it, and the connection ends."""
        answer = {"status": "OK", "bytes": len(data)}
        self.wfile.write(json.dumps(answer).encode() + b"\n")
        if misbehaves(node.settings, "BREAKS"):
            data = data[: len(data) // 2]
        for start in range(0, len(data), 1024):
            chunk = data[start : start + 1024]
            self.wfile.write(len(chunk).to_bytes(4, "big") + chunk)
        if not misbehaves(node.settings, "BREAKS"):
            self.wfile.write(bytes(4))


def lives(member: Fields) -> bool:
    pid, start = member["process"]
    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return not ended and is_of(process, start)
    except psutil.NoSuchProcess:
        return False


def is_led(shared: Fields) -> bool:
    """Whether there is a primary, and its process lives."""
    member = shared["members"].get(shared["primary"])
    return member is not None and lives(member)


def majority_lives(shared: Fields) -> bool:
    voters = [member for member in shared["members"].values() if member["voter"]]
    return sum(map(lives, voters)) > len(voters) // 2


def error(code: str, message: str) -> Fields:
    return {"status": "ERROR", "code": code, "message": message}


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def die() -> NoReturn:
    for number in range(20):
        say(f"line {number}")
    sys.exit(3)


def main() -> None:
    argv = sys.argv[1:]
    say(" ".join(["started:", *argv]))
    own = ("--learner", "--restore-from")
    known = [word for word in argv if word.partition("=")[0] not in own]
    settings = parse_settings(known, os.environ)
    if misbehaves(settings, "DIES"):
        die()
    if misbehaves(settings, "STUBBORN"):
        signal.signal(signal.SIGTERM, lambda *_: say("ignored SIGTERM"))
    with FakeNode(settings, "--learner" in argv) as node:
        threading.Thread(target=node.live, name="live", daemon=True).start()
        node.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
