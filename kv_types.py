"""The values that pass between the wire, the store and the client: replies and their parts.

No I/O, no behaviour: ``kv_store.py`` makes replies, ``kv_protocol.py`` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kv_errors import KVError


class SimpleString(str):
    """A RESP simple string (``+OK``); anything longer or binary is ``bytes``."""

    __slots__ = ()


class Verbatim(str):
    """Text for people (INFO, CLIENT LIST): verbatim in RESP3, a bulk string in RESP2."""

    __slots__ = ()


OK: Final = SimpleString("OK")


@dataclass(frozen=True, slots=True)
class RepeatedReply:
    """The first answer to a request that came again under its serial, and when it was done."""

    reply: Reply
    index: int  # of the log entry that did it


# bytes: bulk string. None: null. An error may stand inside a list (one command of a batch).
Reply = (
    SimpleString
    | Verbatim
    | bytes
    | int
    | None
    | Sequence["Reply"]
    | dict[bytes, "Reply"]
    | KVError
    | RepeatedReply
)
