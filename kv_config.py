"""The server's settings: one table, one frozen value, four sources.

Rule 1: ``SETTINGS`` is the only place where a flag, its default and its help are written down.
Rule 2: a later source wins: defaults < TOML file (``--config``) < environment ``KV_<NAME>`` < flags.
Rule 3: what is wrong is said with its source, its value and what would be right, before any
socket or file of the server is touched. A program prints the ``ConfigError`` and exits with 2.

Called once, on thread ``main``. Read on in ``kv_store_server.py``, which is wired from ``Settings``.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeVar

T = TypeVar("T")
Word = TypeVar("Word", bound=str)

Address = tuple[str, int]  # host, port
Replication = Literal["quorum", "async"]
Fsync = Literal["always", "no"]
ReadMode = Literal["quorum", "lease"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

REPLICATIONS: Final[tuple[Replication, ...]] = ("quorum", "async")
FSYNCS: Final[tuple[Fsync, ...]] = ("always", "no")
READ_MODES: Final[tuple[ReadMode, ...]] = ("quorum", "lease")
LOG_LEVELS: Final[tuple[LogLevel, ...]] = ("debug", "info", "warning", "error")
LOG_FORMATS: Final[tuple[LogFormat, ...]] = ("text", "json")

# Exit statuses of a server that must not be started again as it is (raft-traps T65).
EXIT_CONFIG: Final = 78  # its data, its name or its cluster is wrong; EX_CONFIG of sysexits.h
EXIT_REMOVED: Final = 79  # it was removed from its cluster

PORT_MAX: Final = 65535
PEER_PORT_OFFSET: Final = 10_000  # as Redis Cluster's bus port
LOCAL_PORTS: Final = (6379, 6380, 6381)  # where a node without --join looks for its cluster
# One request is one entry, which one frame between peers has to carry (raft_frames.FRAME_BYTES_MAX).
REQUEST_BYTES_RANGE: Final = (1024, 64 * 1024**2)
LOG_BYTES_MIN: Final = 1024**2
MEMORY_DIR: Final = Path("/dev/shm")  # Linux' file system without a disk
# Two chances to hear the primary before a campaign: one lost heartbeat is no failure.
HEARTBEATS_PER_ELECTION_TIMEOUT_MIN: Final = 2


class ConfigError(Exception):
    """The settings are wrong; ``str(error)`` says which one, where it stands and what is right."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server is told when it starts. Every relation between the fields holds."""

    node_id: str
    host: str
    advertise_host: str
    port: int
    peer_port: int
    primary: bool
    join: tuple[Address, ...]  # never its own address
    data_dir: Path  # with ``in_memory`` in a file system that has no disk
    in_memory: bool
    learner: bool
    restore_from: Path | None
    replication: Replication
    fsync: Fsync
    read_mode: ReadMode
    heartbeat_interval_s: float
    election_timeout_min_s: float
    election_timeout_max_s: float
    max_clients: int
    request_bytes_max: int
    memory_bytes_max: int  # 0: no limit
    log_bytes_max: int
    log_level: LogLevel
    log_format: LogFormat
    config: Path | None


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: a flag ``--name``, a TOML key and an environment variable at once."""

    group: str
    name: str
    metavar: str
    default: str  # as one would type it; "" where it is derived from other settings
    help: str
    toml: tuple[type, ...] = (str,)
    derived: str = ""  # how the default is derived, for people

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    @property
    def variable(self) -> str:
        return "KV_" + self.name.replace("-", "_").upper()

    @property
    def default_text(self) -> str:
        return self.derived or self.default


_NODE = "the node and its addresses"
_CLUSTER = "the cluster it belongs to"
_PROMISE = "what an OK promises"
_TIME = "timing"
_LIMITS = "limits (sizes: 67108864, 64MiB or 64mb, all the same; 1 KiB is 1024 bytes)"
_OUTPUT = "log and configuration"

SETTINGS: Final[tuple[Setting, ...]] = (
    Setting(_NODE, "node-id", "NAME", "node1", "the node's name: letters, digits, . _ -"),
    Setting(_NODE, "host", "HOST", "127.0.0.1", "address to listen on; 0.0.0.0 is every interface"),
    Setting(
        _NODE,
        "advertise-host",
        "HOST",
        "",
        "address that is given to clients and peers",
        derived="the same as --host",
    ),
    Setting(_NODE, "port", "PORT", "6379", "port for clients", (int,)),
    Setting(
        _NODE,
        "peer-port",
        "PORT",
        "",
        "port for the other nodes of the cluster",
        (int,),
        derived=f"--port + {PEER_PORT_OFFSET}",
    ),
    Setting(
        _NODE,
        "data-dir",
        "DIR",
        "",
        "where log and state are kept; one directory a node",
        derived="data/NODE-ID",
    ),
    Setting(
        _NODE,
        "in-memory",
        "",
        "false",
        f"keep nothing on disk (but in {MEMORY_DIR}): the data is safe while a majority of the nodes "
        "lives; a node that is started again comes back as a new member",
        (bool,),
    ),
    Setting(
        _CLUSTER,
        "primary",
        "",
        "false",
        "with an empty data directory: found a new cluster, unless --join reaches one; with data: "
        "no effect, the nodes elect their primary",
        (bool,),
    ),
    Setting(
        _CLUSTER,
        "join",
        "HOST:PORT,...",
        "",
        "client addresses through which to find the cluster; its own may be among them",
        (str, list),
        "the ports 6379, 6380 and 6381 of this host, other than its own",
    ),
    Setting(
        _CLUSTER,
        "learner",
        "",
        "false",
        "join as a read copy that never votes; no effect on a node that is a member already",
        (bool,),
    ),
    Setting(
        _CLUSTER,
        "restore-from",
        "FILE",
        "",
        "with --primary and an empty data directory: found a new cluster that begins with the state "
        "of this backup",
        derived="none",
    ),
    Setting(
        _PROMISE,
        "replication",
        "quorum|async",
        "quorum",
        "a write is answered once it is on a majority's disks, or after the primary's own log: "
        "faster, but what was answered last is lost with the primary",
    ),
    Setting(
        _PROMISE,
        "fsync",
        "always|no",
        "always",
        "flush the log to the disk before a write counts, or leave it to the operating system: "
        "a power cut may then lose answered writes",
    ),
    Setting(
        _PROMISE,
        "read-mode",
        "quorum|lease",
        "quorum",
        "the primary confirms its role with a majority before it answers reads, or relies on a "
        "lease: faster, but needs clocks that run at nearly the same speed",
    ),
    Setting(
        _TIME,
        "heartbeat-interval",
        "SECONDS",
        "2.0",
        "how often the primary is heard of when there is nothing to replicate",
        (float, int),
    ),
    Setting(
        _TIME,
        "election-timeout",
        "MIN-MAX",
        "5.0-8.0",
        "seconds of silence after which a secondary campaigns, drawn anew each time; MIN is at "
        f"least {HEARTBEATS_PER_ELECTION_TIMEOUT_MIN} heartbeat intervals",
    ),
    Setting(_LIMITS, "max-clients", "COUNT", "10000", "client connections at a time", (int,)),
    Setting(
        _LIMITS,
        "max-request-bytes",
        "SIZE",
        "64MiB",
        "size of one request, from 1KiB to 64MiB",
        (int, str),
    ),
    Setting(
        _LIMITS,
        "max-memory",
        "SIZE",
        "0",
        "size of the data, beyond which writes are refused; 0 is no limit",
        (int, str),
    ),
    Setting(
        _LIMITS,
        "max-log",
        "SIZE",
        "64MiB",
        "size of the log on disk, from 1MiB, beyond which the state is written and the log cut; a "
        "node that is further behind is sent the state instead",
        (int, str),
    ),
    Setting(_OUTPUT, "log-level", "|".join(LOG_LEVELS), "info", "what is logged, to stderr"),
    Setting(_OUTPUT, "log-format", "text|json", "text", "for people, or one JSON object a line"),
    Setting(
        _OUTPUT,
        "config",
        "FILE",
        "",
        "TOML file with the names above, dashes or underscores",
        derived="none",
    ),
)

_DESCRIPTION = """\
One node of a replicated key-value store. Three nodes elect a primary, keep every write that was
answered OK through the loss of any one of them, and serve Redis clients as well as people with nc.
"""

_EPILOG = """\
Each setting may also stand in the TOML file or in the environment (--max-memory is KV_MAX_MEMORY).
The command line wins over the environment, the environment over the file.

examples:
  %(prog)s --primary                        found a cluster; node1 works at once, alone
  %(prog)s --node-id node2 --port 6380      join it, from the same host
  %(prog)s --node-id node3 --port 6381
  %(prog)s --node-id b --host 0.0.0.0 --advertise-host 10.0.0.2 --join 10.0.0.1:6379
  printf 'STATUS\\n' | nc 127.0.0.1 6379     ask any node how it is

exit status: 0 stopped by a signal, 1 failed, 2 wrong settings, 78 wrong data or wrong cluster.
"""


def parse_settings(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The settings of a server that was started with ``argv`` (without the program's name).

    Raises ConfigError; ``--help`` prints and raises SystemExit(0).
    """
    flags = _from_command_line(argv)
    variables = _from_environment(environ)
    given = variables | flags
    file = _from_file(Path(given["config"].text)) if "config" in given else {}
    defaults = {row.name: _Raw(row.default, row.flag) for row in SETTINGS}
    settings = _build(_Values(defaults | file | given))
    _check_relations(settings)
    return settings


# ---- Sources: each gives the text of what it sets, by setting ------------------------------------


@dataclass(frozen=True, slots=True)
class _Raw:
    """The text of a setting and the place it was read from, as errors name it."""

    text: str
    origin: str


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError where argparse would leave the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kv_store_server.py",
        usage="%(prog)s [--primary] [--node-id NAME] [--port PORT] [--join HOST:PORT,...] ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation in a script breaks when a flag is added
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for row in SETTINGS:
        group = groups.setdefault(row.group, parser.add_argument_group(row.group))
        if row.toml == (bool,):
            group.add_argument(row.flag, action="store_const", const="true", help=row.help)
        else:
            text = f"{row.help} (default: {row.default_text})"
            group.add_argument(row.flag, metavar=row.metavar, help=text)
    return parser


def _from_command_line(argv: Sequence[str]) -> dict[str, _Raw]:
    namespace, unknown = _parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        raise ConfigError(f"unknown argument {name!r}{_hint(name, (row.flag for row in SETTINGS))}")
    given: dict[str, str] = vars(namespace)
    return {
        row.name: _Raw(given[key], row.flag)
        for row in SETTINGS
        if (key := row.name.replace("-", "_")) in given
    }


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Raw]:
    # An empty variable counts as unset: container tools pass on variables that nobody has set.
    return {
        row.name: _Raw(text, row.variable)
        for row in SETTINGS
        if (text := environ.get(row.variable))
    }


_TYPE_NAMES: Final[Mapping[type, str]] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list of strings",
}


def _from_file(path: Path) -> dict[str, _Raw]:
    try:
        document: Mapping[str, object] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or nested without end
        raise ConfigError(f"--config: {path} is not a TOML file: {error}") from error
    rows = {row.name: row for row in SETTINGS if row.name != "config"}
    found: dict[str, _Raw] = {}
    for key, value in document.items():
        name = key.replace("_", "-")
        if name not in rows:
            raise ConfigError(f"{path}: unknown setting {key!r}{_hint(name, rows)}")
        if name in found:
            raise ConfigError(f"{path}: {name!r} stands there twice, with a dash and an underscore")
        found[name] = _Raw(_toml_text(rows[name], value, f"{path}: {key}"), f"{path}: {key}")
    return found


def _toml_text(row: Setting, value: object, origin: str) -> str:
    """The TOML value as one would type it after the flag."""
    try:
        shown = repr(value)
    except ValueError as error:  # more digits than Python writes; hexadecimal, so it could be read
        raise ConfigError(f"{origin}: a number of that size is no setting") from error
    fits = type(value) in row.toml  # not isinstance: True is an int to Python
    if fits and isinstance(value, list):
        fits = all(isinstance(item, str) for item in value)
    if not fits:
        wanted = " or ".join(_TYPE_NAMES[kind] for kind in row.toml)
        raise ConfigError(f"{origin} must be {wanted}, not {shown}")
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hint(wrong: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# ---- Values: from text, ValueError says what would be right --------------------------------------


@dataclass(frozen=True, slots=True)
class _Values:
    """The text that won for each setting; reading one names its source where it is wrong."""

    raw: Mapping[str, _Raw]

    def get(self, name: str, parse: Callable[[str], T]) -> T:
        raw = self.raw[name]
        try:
            return parse(raw.text)
        except ValueError as error:
            raise ConfigError(f"{raw.origin}: {error}, not {raw.text!r}") from error

    def get_or(self, name: str, parse: Callable[[str], T], derived: T) -> T:
        return self.get(name, parse) if self.raw[name].text else derived


def _build(values: _Values) -> Settings:
    node_id = values.get("node-id", parse_node_id)
    host = values.get("host", parse_host)
    advertise_host = values.get_or("advertise-host", parse_host, host)
    port = values.get("port", parse_port)
    local = tuple((advertise_host, other) for other in LOCAL_PORTS)
    join = values.get_or("join", _addresses, local)
    election_timeout_min_s, election_timeout_max_s = values.get("election-timeout", _seconds_range)
    in_memory = values.get("in-memory", _boolean)
    home = MEMORY_DIR / f"kv-store-{port}" if in_memory else Path("data")
    return Settings(
        node_id=node_id,
        host=host,
        advertise_host=advertise_host,
        port=port,
        peer_port=values.get_or("peer-port", parse_port, port + PEER_PORT_OFFSET),
        primary=values.get("primary", _boolean),
        join=tuple(address for address in join if address != (advertise_host, port)),
        data_dir=values.get_or("data-dir", _path, home / node_id),
        in_memory=in_memory,
        learner=values.get("learner", _boolean),
        restore_from=values.get_or("restore-from", _path, None),
        replication=values.get("replication", _one_of(REPLICATIONS)),
        fsync=values.get("fsync", _one_of(FSYNCS)),
        read_mode=values.get("read-mode", _one_of(READ_MODES)),
        heartbeat_interval_s=values.get("heartbeat-interval", _seconds),
        election_timeout_min_s=election_timeout_min_s,
        election_timeout_max_s=election_timeout_max_s,
        max_clients=values.get("max-clients", _count),
        request_bytes_max=values.get("max-request-bytes", parse_size),
        memory_bytes_max=values.get("max-memory", parse_size),
        log_bytes_max=values.get("max-log", parse_size),
        log_level=values.get("log-level", _one_of(LOG_LEVELS)),
        log_format=values.get("log-format", _one_of(LOG_FORMATS)),
        config=values.get_or("config", Path, None),
    )


def _check_relations(settings: Settings) -> None:
    if settings.peer_port > PORT_MAX:
        raise ConfigError(
            f"--port {settings.port} leaves no room for the peer port, which would be "
            f"{settings.peer_port}: give one up to {PORT_MAX} with --peer-port"
        )
    if settings.peer_port == settings.port:
        raise ConfigError(f"--peer-port and --port are both {settings.port}: give two ports")
    if settings.advertise_host in ("0.0.0.0", "::"):
        raise ConfigError(
            f"--host {settings.host} listens on every interface, but nobody can connect to that "
            "address: name one that the others reach with --advertise-host"
        )
    shortest_s, longest_s = settings.election_timeout_min_s, settings.election_timeout_max_s
    if shortest_s > longest_s:
        raise ConfigError(f"--election-timeout: {shortest_s:g} is more than {longest_s:g}")
    needed_s = HEARTBEATS_PER_ELECTION_TIMEOUT_MIN * settings.heartbeat_interval_s
    if shortest_s < needed_s:
        raise ConfigError(
            f"--election-timeout: MIN is {shortest_s:g} s, but with --heartbeat-interval "
            f"{settings.heartbeat_interval_s:g} it has to be {needed_s:g} s or more"
        )
    if settings.in_memory and settings.data_dir.parent.parent != MEMORY_DIR:
        raise ConfigError("--in-memory keeps nothing on disk: give it or --data-dir, not both")
    if settings.restore_from is not None and not settings.primary:
        raise ConfigError("--restore-from founds a cluster: give --primary too")
    if settings.log_bytes_max < LOG_BYTES_MIN:
        raise ConfigError(f"--max-log: {settings.log_bytes_max} is less than {LOG_BYTES_MIN}")
    low, high = REQUEST_BYTES_RANGE
    if not low <= settings.request_bytes_max <= high:
        raise ConfigError(
            f"--max-request-bytes: {settings.request_bytes_max} is not from {low} to {high}"
        )


def parse_size(text: str) -> int:
    """The bytes meant by ``67108864``, ``64MiB``, ``64mb`` or ``64m``; every unit is binary."""
    match = re.fullmatch(r"([0-9]{1,18}) ?(?:([kmgt])(?:i?b)?|b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError("expected a size such as 67108864, 64MiB or 1gb")
    power = " kmgt".index((match[2] or " ").lower())
    return int(match[1]) << (10 * power)


def parse_address(text: str) -> Address:
    """``HOST:PORT`` or ``[IPv6]:PORT``, as host and port."""
    host, _, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("expected HOST:PORT, with an IPv6 host in brackets")
    if not host:
        raise ValueError("expected HOST:PORT")
    return parse_host(host), parse_port(port)


def format_address(address: Address) -> str:
    """What ``parse_address`` reads."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _addresses(text: str) -> tuple[Address, ...]:
    # A dict, because an address given twice is asked once, in the order given.
    parts = [part for part in text.split(",") if part.strip()]
    return tuple(dict.fromkeys(parse_address(part) for part in parts))


def parse_node_id(text: str) -> str:
    """A node's name. Raises ValueError."""
    # It names a directory and threads, so: no separators, no leading dot, not long.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise ValueError("expected 1 to 64 letters, digits, dots, dashes or underscores")
    return text


def _path(text: str) -> Path:
    if "\0" in text:
        raise ValueError("expected a path")
    return Path(text)


# A name whose parts the resolver refuses (empty, or over 63 long) must not get into a membership.
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


def parse_host(text: str) -> str:
    """A host's name or address. This and the next raise ValueError."""
    if ":" in text:
        try:
            IPv6Address(text)
        except ValueError:
            raise ValueError("expected a host name or an IP address") from None
    elif not _HOST_NAME.fullmatch(text):
        raise ValueError("expected a host name or an IP address")
    return text


def parse_port(text: str) -> int:
    """A port that can be dialled."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= PORT_MAX:
        raise ValueError(f"expected a port from 1 to {PORT_MAX}")
    return int(text)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        raise ValueError("expected a whole number from 1 to 999999999")
    return int(text)


def _seconds(text: str) -> float:
    message = "expected seconds from 0.01, such as 0.5 or 2"
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(message) from None
    if not math.isfinite(seconds) or seconds < 0.01:
        raise ValueError(message)
    return seconds


def _seconds_range(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"\s*([0-9.]+)\s*-\s*([0-9.]+)\s*", text)
    if match is None:
        raise ValueError("expected MIN-MAX in seconds, such as 5.0-8.0")
    return _seconds(match[1]), _seconds(match[2])


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError("expected true or false")


def _one_of(words: tuple[Word, ...]) -> Callable[[str], Word]:
    def parse(text: str) -> Word:
        for word in words:
            if text.lower() == word:
                return word
        raise ValueError(f"expected {' or '.join(words)}")

    return parse
