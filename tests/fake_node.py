"""A node for the tests of the manager: it answers STATUS and CLUSTER, and stores nothing.

node1 is the primary whenever it belongs to a cluster; the others tell it that they are there and
become voters. ``FAKE_<BEHAVIOUR>=node2`` in the environment makes that node misbehave:

    FAKE_DIES         prints 20 lines and exits with status 3
    FAKE_STUBBORN     ignores SIGTERM
    FAKE_LEARNER      never becomes a voter
    FAKE_BEHIND       never applies the last entry
    FAKE_FOREIGN      belongs to another cluster
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import socketserver
import sys
import threading
import time
from typing import NoReturn

from kv_config import Settings, parse_settings


def misbehaves(settings: Settings, how: str) -> bool:
    return os.environ.get(f"FAKE_{how}") == settings.node_id


class FakeNode(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, settings: Settings) -> None:
        super().__init__((settings.host, settings.port), LineHandler)
        self.settings = settings
        self.started = time.monotonic()
        self.voters: set[str] = set()
        self.path = settings.data_dir / "identity.json"
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.identity = json.loads(self.path.read_text())
        else:
            self.identity = {"cluster_id": "", "member_id": secrets.token_hex(8)}
        if not self.identity["cluster_id"] and settings.primary:
            self.belong_to(secrets.token_hex(8))
        if misbehaves(settings, "FOREIGN"):
            self.belong_to("elsewhere")

    @property
    def is_primary(self) -> bool:
        return self.settings.node_id == "node1" and bool(self.identity["cluster_id"])

    def belong_to(self, cluster_id: str) -> None:
        self.identity["cluster_id"] = cluster_id
        self.path.write_text(json.dumps(self.identity))

    def join_for_ever(self) -> None:
        """Find a cluster through the others, and tell its primary of this voter."""
        while True:
            for address in self.settings.join:
                try:
                    with socket.create_connection(address, timeout=1) as connection:
                        learner = misbehaves(self.settings, "LEARNER")
                        voter = "nobody" if learner else self.identity["member_id"]
                        connection.sendall(f"JOIN {voter}\n".encode())
                        answer = json.loads(connection.makefile().readline())
                except (OSError, ValueError):
                    continue
                if answer["cluster_id"] and not self.identity["cluster_id"]:
                    self.belong_to(answer["cluster_id"])
            time.sleep(0.05)

    def status(self) -> dict[str, object]:
        return {
            "status": "OK",
            "node_id": self.settings.node_id,
            **self.identity,
            "role": "PRIMARY" if self.is_primary else "SECONDARY",
            "term": 1,
            "commit_index": 7,
            "applied_index": 6 if misbehaves(self.settings, "BEHIND") else 7,
            "keys": 5,
            "uptime_seconds": time.monotonic() - self.started,
            "argv": sys.argv[1:],
        }

    def cluster(self) -> dict[str, object]:
        voters = {self.identity["member_id"], *self.voters}
        members = [{"member_id": voter, "voter": True} for voter in sorted(voters)]
        return {**self.status(), "members": members}


class LineHandler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        node = self.server
        assert isinstance(node, FakeNode)
        for line in self.rfile:
            match line.decode().split():
                case ["STATUS"]:
                    answer = node.status()
                case ["CLUSTER"]:
                    answer = node.cluster()
                case ["JOIN", member_id]:
                    node.voters.add(member_id)
                    answer = node.status()
                case _:
                    answer = {"status": "ERROR"}
            self.wfile.write(json.dumps(answer).encode() + b"\n")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def die() -> NoReturn:
    for number in range(20):
        say(f"line {number}")
    sys.exit(3)


def main() -> None:
    settings = parse_settings(sys.argv[1:], os.environ)
    say(" ".join(["started:", *sys.argv[1:]]))
    if misbehaves(settings, "DIES"):
        die()
    if misbehaves(settings, "STUBBORN"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with FakeNode(settings) as node:
        threading.Thread(target=node.join_for_ever, name="join", daemon=True).start()
        node.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
