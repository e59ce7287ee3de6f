"""Commands about the cluster: who is in it and how it is, who joins, leaves and leads, its backup.

Answered by any node about itself, or by the primary for the cluster. Called on a client's thread
by ``kv_session.py``; what they ask for is done by ``raft_node.py``.
"""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from threading import Semaphore
from typing import Final, TypeVar

from kv_config import Settings, parse_host, parse_node_id, parse_port
from kv_errors import BadRequestError, BusyError, KVError, NoSpaceError
from kv_store import KeyValueStore
from kv_types import Reply
from raft_node import RaftNode
from raft_status import MemberStatus, NodeStatus
from raft_types import Member, MemberId, Membership, new_id
from state_db import StateDbError

log = logging.getLogger(__name__)

VERSION: Final = "0.1.0"
MEMORY_WARNING: Final = 0.8  # of --max-memory
BACKUP_CHUNK_BYTES: Final = 256 * 1024
_CHUNK_LENGTH = struct.Struct(">I")

Argv = Sequence[bytes]
_Value = TypeVar("_Value")


# ---- How the node and the cluster are ----------------------------------------------------------


def memory_trouble(store: KeyValueStore, memory_bytes_max: int) -> str:
    """What is to be said of the memory that the data takes; "" if nothing. 0: there is no limit."""
    if not memory_bytes_max or store.memory_bytes < MEMORY_WARNING * memory_bytes_max:
        return ""
    if store.memory_bytes > memory_bytes_max:
        return "--max-memory is reached: writes are refused, deletes are not"
    return f"the data takes {store.memory_bytes / memory_bytes_max:.0%} of --max-memory"


def status_fields(
    node: RaftNode, store: KeyValueStore, settings: Settings, started_s: float
) -> dict[str, object]:
    """What STATUS answers; ``started_s`` is in the monotonic clock."""
    return _status_of(node.status(), store, settings, started_s)


def cluster_fields(
    node: RaftNode, store: KeyValueStore, settings: Settings, started_s: float
) -> dict[str, object]:
    """What CLUSTER answers: STATUS, and the members."""
    status = node.status()
    members = [_member_fields(m) for m in status.members]
    return _status_of(status, store, settings, started_s) | {"members": members}


def _status_of(
    status: NodeStatus, store: KeyValueStore, settings: Settings, started_s: float
) -> dict[str, object]:
    primary = status.primary
    trouble = [status.trouble, memory_trouble(store, settings.memory_bytes_max)]
    return {
        "status": "OK",
        "node_id": status.identity.node_id,
        "member_id": status.identity.member_id,
        "cluster_id": status.identity.cluster_id,
        "host": settings.advertise_host,
        "port": settings.port,
        "peer_port": settings.peer_port,
        "role": status.role,
        "term": status.term,
        "primary": None if primary is None else address_fields(primary),
        "commit_index": status.commit_index,
        "applied_index": status.applied_index,
        "first_index": status.first_index,
        "last_index": status.last_index,
        "state_hash": f"{status.state_hash:016x}",
        "keys": len(store),
        "sessions": len(store.sessions),
        "voters": status.voters,
        "failures_tolerated": status.failures_tolerated,
        "trouble": "; ".join(filter(None, trouble)) or None,
        "memory_bytes": store.memory_bytes,
        "uptime_seconds": round(time.monotonic() - started_s, 1),
        "version": VERSION,
    }


def _member_fields(status: MemberStatus) -> dict[str, object]:
    member = status.member
    role = "SECONDARY" if member.voter else "LEARNER"
    return {
        "node_id": member.node_id,
        "member_id": member.member_id,
        "host": member.host,
        "port": member.port,
        "peer_port": member.peer_port,
        "role": "PRIMARY" if status.is_primary else role,
        "voter": member.voter,
        "match_index": status.match_index,
        "lag": status.lag,
        "link": status.link,
        "snapshot": status.snapshot,
    }


def address_fields(member: Member) -> dict[str, object]:
    """Where clients reach a member."""
    return {"node_id": member.node_id, "host": member.host, "port": member.port}


# ---- Who belongs to it -------------------------------------------------------------------------


def change_members(node: RaftNode, argv: Argv) -> Reply:
    """MEMBER LIST, ADD, JOIN and REMOVE, as JSON. Raises KVError."""
    subcommand = argv[1].upper()
    if subcommand == b"LIST" and len(argv) == 2:
        return json.dumps({"members": [_member_fields(m) for m in node.status().members]}).encode()
    if subcommand == b"REMOVE" and len(argv) == 3:
        _remove(node, _text(argv[2]))
        return json.dumps({"removed": _text(argv[2])}).encode()
    stays_learner = argv[-1].upper() == b"LEARNER"
    words = list(map(_text, argv[2:-1] if stays_learner else argv[2:]))
    if subcommand == b"ADD" and len(words) == 4:
        _announce(node, _newcomer(words[0], new_id(), *words[1:], stays_learner=stays_learner))
        return _identity_of(node)
    if subcommand == b"JOIN" and len(words) == 6:
        _admit(node, _newcomer(*words[:5], stays_learner=stays_learner), words[5])
        return _identity_of(node)
    raise BadRequestError(
        "say MEMBER LIST, MEMBER REMOVE node-id, or MEMBER ADD node-id host port peer-port [LEARNER]"
    )


def _identity_of(node: RaftNode) -> bytes:
    identity = node.identity
    return json.dumps({"cluster_id": identity.cluster_id, "node_id": identity.node_id}).encode()


def _announce(node: RaftNode, newcomer: Member) -> None:
    """Add a learner that is yet to be started, and will then take the place of this one."""
    members = node.settled_membership()
    known = _named(members, newcomer.node_id)
    if known is not None and newcomer[2:5] == known[2:5]:  # host and ports
        return
    _add(node, members, newcomer)


def _admit(node: RaftNode, newcomer: Member, boot_id: str) -> None:
    """Add a learner that asks for it, which gets its vote by itself once it has caught up; idempotent.

    A known member's new address is taken over, unless another process is that member, too: of a
    data directory that was copied. A new member under an old name takes the place of one that has
    lost its directory: that one is removed first, so that its vote never counts again (raft-traps
    T12). Two that live under one name are not possible.
    """
    members = node.settled_membership()
    known = members.get(newcomer.member_id)
    if known is not None:
        if node.is_alive(known.member_id, but_for=boot_id):
            raise BadRequestError(
                f"{known.node_id} runs already, at {known.host}:{known.port}, as the same member: "
                "never start a copied data directory"
            )
        moved = newcomer._replace(voter=known.voter, stays_learner=known.stays_learner)
        if moved != known:
            move(node, moved)
        return
    former = _named(members, newcomer.node_id)
    if former is not None and not node.is_alive(former.member_id):
        log.warning("node=%s comes back as a new member: the old one goes", former.node_id)
        node.change_members(members, lambda core: core.remove_member(former.member_id))
        members = node.settled_membership()
    _add(node, members, newcomer)


def _add(node: RaftNode, members: Membership, newcomer: Member) -> None:
    objection = members.objection_to(newcomer)
    if objection:
        raise BadRequestError(objection)
    node.change_members(members, lambda core: core.add_learner(newcomer))


def move(node: RaftNode, moved: Member) -> None:
    """Have a member, of the same id, known at another address. Raises KVError."""
    node.change_members(node.settled_membership(), lambda core: core.change_member(moved))


def _remove(node: RaftNode, node_id: str) -> None:
    members = node.settled_membership()
    member = _named(members, node_id)
    if member is None:
        raise BadRequestError(f"there is no member {node_id}")
    objection = members.objection_to_leaving(member.member_id)
    if objection:
        raise BadRequestError(objection)
    node.change_members(members, lambda core: core.remove_member(member.member_id))


def _named(membership: Membership, node_id: str) -> Member | None:
    return next((m for m in membership.members if m.node_id == node_id), None)


def _newcomer(
    node_id: str, member_id: str, host: str, port: str, peer_port: str, *, stays_learner: bool
) -> Member:
    return Member(
        _checked_member_id(member_id),
        _parsed(parse_node_id, node_id),
        _parsed(parse_host, host),
        _parsed(parse_port, port),
        _parsed(parse_port, peer_port),
        voter=False,
        stays_learner=stays_learner,
    )


def _parsed(parse: Callable[[str], _Value], text: str) -> _Value:
    """A part of an address, under the rules of the settings: every node will dial it."""
    try:
        return parse(text)
    except ValueError as error:
        raise BadRequestError(f"{error}, not '{text}'") from None


def _text(word: bytes) -> str:
    try:
        return word.decode("ascii")
    except UnicodeDecodeError:
        raise BadRequestError("names and addresses are ASCII") from None


def _checked_member_id(member_id: str) -> MemberId:
    if len(member_id) != 16 or not set(member_id) <= set("0123456789abcdef"):
        raise BadRequestError("a member id is 16 hex digits")
    return member_id


# ---- Who leads it ------------------------------------------------------------------------------


def fail_over(node: RaftNode, argv: Argv) -> Reply:
    """``FAILOVER [TO node-id]``: hand the leadership over; who leads now, as JSON."""
    if len(argv) == 1:
        primary = node.hand_over(None)
    elif len(argv) == 3 and argv[1].upper() == b"TO":
        target = _named(node.membership, _text(argv[2]))
        if target is None or not target.voter:
            raise BadRequestError(f"there is no voter {_text(argv[2])}")
        leads = target.member_id == node.identity.member_id and node.is_primary
        primary = target if leads else node.hand_over(target.member_id)
    else:
        raise BadRequestError("say FAILOVER, or FAILOVER TO node-id")
    return json.dumps({"primary": address_fields(primary)}).encode()


# ---- Its backup --------------------------------------------------------------------------------


def backup(node: RaftNode, slots: Semaphore) -> Generator[bytes]:
    """A line of JSON, then the state in chunks, each after its length; the length 0 ends it.

    Any node may be asked. It is the state that it saved a moment ago. An error instead of all that
    if the node's disk does not take the copy that is sent, or no slot is free for it.
    """
    if not slots.acquire(blocking=False):
        yield _refusal(BusyError("as many backups as may be are under way: try again later"))
        return
    try:
        yield from _backup(node)
    finally:
        slots.release()


def _refusal(error: KVError) -> bytes:
    fields = {"status": "ERROR", "code": error.code, "message": str(error)}
    return json.dumps(fields).encode() + b"\n"


def _backup(node: RaftNode) -> Iterator[bytes]:
    try:
        reader = node.open_backup()
    except (OSError, StateDbError) as error:
        yield _refusal(NoSpaceError(f"the state can't be copied: {error}"))
        return
    try:
        header = reader.header
        fields = {
            "status": "OK",
            "bytes": reader.size_bytes,
            "keys": header.keys,
            "applied_index": header.applied_index,
            "state_hash": f"{header.state_hash:016x}",
        }
        yield json.dumps(fields).encode() + b"\n"
        offset = 0
        while data := reader.read(offset, BACKUP_CHUNK_BYTES):
            offset += len(data)
            yield _CHUNK_LENGTH.pack(len(data)) + data
        yield _CHUNK_LENGTH.pack(0)
    finally:
        reader.close()
