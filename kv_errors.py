"""Every error a client can be told, as one tree.

Rule 1: a class says whether the request was certainly *not done* (``definite``) or whether its
outcome is *unknown*. Nothing that may be in the log ever gets a definite error (promise G4).
Rule 2: ``code`` is the word in the line language, ``resp_code`` the first word of a RESP error.
Redis clients retry some words by themselves (MOVED, CLUSTERDOWN, LOADING ...): those stand here
only on definite errors.

No I/O. Used on every thread. Read on in ``kv_protocol.py``, which puts these on the wire.
"""

from __future__ import annotations

from typing import ClassVar


class KVError(Exception):
    """The request failed; ``str(error)`` is a sentence for a person."""

    code: ClassVar[str] = "BAD_REQUEST"
    resp_code: ClassVar[str] = "ERR"
    # True: certainly not done. False: it may have been done, or may still be.
    definite: ClassVar[bool] = True
    # True: the same request may succeed later or elsewhere, and sending it again is safe.
    retryable: ClassVar[bool] = False


class BadRequestError(KVError):
    """The caller's request is wrong: syntax, arity, type or range. Sending it again won't help."""


class ProtocolError(BadRequestError):
    """The bytes on the connection are not the protocol; the connection is closed after this."""


class TooLargeError(BadRequestError):
    """The request is over a limit (``--max-request-bytes``, key size, batch size)."""

    code = "TOO_LARGE"


class MismatchError(KVError):
    """Compare-and-set found another version than the caller expected; nothing was changed."""

    code = "MISMATCH"
    resp_code = "MISMATCH"

    def __init__(self, message: str, version: int) -> None:
        super().__init__(message)
        self.version = version  # of the key as it stands; 0 where there is no such key


class NotPrimaryError(KVError):
    """This node is not the primary. The request was not proposed: ask ``host:port`` instead."""

    code = "NOT_PRIMARY"
    resp_code = "MOVED"
    retryable = True

    def __init__(self, node_id: str, host: str, port: int) -> None:
        super().__init__(f"This node is not primary; the primary is {node_id} at {host}:{port}.")
        self.node_id = node_id
        self.host = host
        self.port = port


class NoPrimaryError(KVError):
    """No primary is known or able to answer now. The request was not proposed."""

    code = "NO_PRIMARY"
    resp_code = "CLUSTERDOWN"
    retryable = True

    def __init__(self, message: str = "no primary is known") -> None:
        super().__init__(message)


class NoSpaceError(KVError):
    """The primary's disk is (almost) full. The write was not proposed; reads go on."""

    code = "NO_SPACE"
    resp_code = "NOSPACE"


class OutOfMemoryError(KVError):
    """``--max-memory`` is reached. The write was not proposed; reads and deletes go on."""

    code = "OUT_OF_MEMORY"
    resp_code = "OOM"


class BusyError(KVError):
    """Too much is waiting already (a bounded queue is full). The request was not proposed."""

    code = "BUSY"
    resp_code = "BUSY"
    retryable = True


class NoSessionError(KVError):
    """No such client session (any more). This attempt was not done, and none after it can be.

    Whether an earlier attempt under the same serial was done is unknown then: the record of it
    went with the session. Source: thesis 6.3.
    """

    code = "NO_SESSION"
    resp_code = "NOSESSION"


class OutcomeUnknownError(KVError):
    """The write was proposed but not seen to commit; it may have been done or may still be.

    Source: thesis 6.3 (a client must not take silence for failure).
    """

    code = "UNKNOWN"
    resp_code = "UNKNOWN"
    definite = False


class AnswerForgottenError(OutcomeUnknownError):
    """The answer to this serial of a client session is not kept (any more); nothing was done now.

    Either the client has said that it had the answer, or the answer was too large to keep: then the
    request was done, by an earlier attempt.
    """

    code = "FORGOTTEN"
    resp_code = "FORGOTTEN"
