"""Settings: their sources, the relations between them, and the errors that teach."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_config import (
    SETTINGS,
    ConfigError,
    Settings,
    format_address,
    parse_address,
    parse_settings,
    parse_size,
)


def settings(*argv: str, **environ: str) -> Settings:
    return parse_settings(argv, environ)


def refusal(*argv: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_settings(argv, environ)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    """Writes a configuration file and gives the flag that names it."""

    def write(text: str) -> str:
        path = tmp_path / "kv.toml"
        path.write_text(text, encoding="utf-8")
        return f"--config={path}"

    return write


# ---- Defaults ------------------------------------------------------------------------------------


def test_defaults_when_nothing_is_given_then_are_those_of_the_design():
    """The first node of the quick start needs no flag but --primary. Source: design.md, 3."""
    assert settings() == Settings(
        node_id="node1",
        host="127.0.0.1",
        advertise_host="127.0.0.1",
        port=6379,
        peer_port=16379,
        primary=False,
        join=(("127.0.0.1", 6380), ("127.0.0.1", 6381)),
        data_dir=Path("data/node1"),
        in_memory=False,
        learner=False,
        restore_from=None,
        replication="quorum",
        fsync="always",
        read_mode="quorum",
        heartbeat_interval_s=2.0,
        election_timeout_min_s=5.0,
        election_timeout_max_s=8.0,
        max_clients=10_000,
        request_bytes_max=64 * 1024**2,
        memory_bytes_max=0,
        log_bytes_max=64 * 1024**2,
        log_level="info",
        log_format="text",
        config=None,
    )


def test_derived_defaults_when_their_source_changes_then_follow_it():
    """The peer port follows the port, the directory the name, the advertised host the host."""
    node = settings("--node-id", "b", "--port", "7000", "--host", "10.0.0.2")

    assert node.peer_port == 17000
    assert node.data_dir == Path("data/b")
    assert node.advertise_host == "10.0.0.2"
    assert node.join == (("10.0.0.2", 6379), ("10.0.0.2", 6380), ("10.0.0.2", 6381))


def test_join_when_its_own_address_is_named_then_leaves_it_out():
    """The same list may be given to every node; an address given twice is asked once."""
    node = settings(
        "--port=6380", "--join", "127.0.0.1:6379, 127.0.0.1:6380,[::1]:1,127.0.0.1:6379"
    )

    assert node.join == (("127.0.0.1", 6379), ("::1", 1))


def test_table_when_compared_with_settings_then_has_a_row_for_every_field():
    """A setting that is not in the table would have no flag, no help and no documentation."""
    renamed = {
        "heartbeat-interval": ["heartbeat_interval_s"],
        "election-timeout": ["election_timeout_min_s", "election_timeout_max_s"],
        "max-request-bytes": ["request_bytes_max"],
        "max-memory": ["memory_bytes_max"],
        "max-log": ["log_bytes_max"],
    }

    named = [n for row in SETTINGS for n in renamed.get(row.name, [row.name.replace("-", "_")])]

    assert sorted(named) == sorted(field.name for field in fields(Settings))


def test_table_when_a_default_is_typed_out_then_means_the_same():
    """The default that --help shows can be given back to the server."""
    for row in SETTINGS:
        if row.default and row.metavar:
            assert settings(row.flag, row.default) == settings()


def test_help_when_asked_then_shows_every_flag_and_its_default(capsys):
    """--help teaches: each flag, its default, and commands to copy."""
    with pytest.raises(SystemExit) as caught:
        settings("--help")

    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "kv_store_server.py --node-id node2 --port 6380" in text
    for row in SETTINGS:
        assert row.flag in text
        assert row.toml == (bool,) or f"(default: {row.default_text})" in text


# ---- Sources -------------------------------------------------------------------------------------


def test_sources_when_all_name_a_setting_then_flag_beats_environment_beats_file(toml):
    """Defaults < file < environment < command line."""
    file = toml('port = 1001\nmax-clients = 11\nmax_memory = "1mb"\n')

    node = settings(file, "--port=3001", KV_PORT="2001", KV_MAX_CLIENTS="22")

    assert (node.port, node.max_clients, node.memory_bytes_max) == (3001, 22, 1024**2)


def test_file_when_it_names_every_type_then_reads_them(toml):
    """The file has TOML's own types; names may have dashes or underscores."""
    node = settings(
        toml(
            "primary = true\nheartbeat_interval = 1\nelection-timeout = '2.5-3'\n"
            "join = ['a:1', 'b:2']\nmax-request-bytes = 2048\nlog-format = 'json'\n"
        )
    )

    assert node.primary
    assert (node.heartbeat_interval_s, node.election_timeout_min_s) == (1.0, 2.5)
    assert node.join == (("a", 1), ("b", 2))
    assert (node.request_bytes_max, node.log_format) == (2048, "json")


def test_file_when_the_environment_names_it_then_is_read(toml):
    """KV_CONFIG is --config."""
    path = toml("port = 1001").partition("=")[2]

    assert settings(KV_CONFIG=path).port == 1001
    assert settings(KV_CONFIG=path).config == Path(path)


def test_environment_when_a_variable_is_empty_then_counts_as_unset():
    """Container tools pass on variables that nobody has set."""
    assert settings(KV_PORT="", KV_PRIMARY="yes") == settings("--primary")


# ---- What is wrong is named ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "unknown setting 'prot'; did you mean 'port'?"),
        ("port = '6379'", "port must be an integer, not '6379'"),
        ("port = true", "port must be an integer, not True"),
        ("join = [1]", "join must be a string or a list of strings, not [1]"),
        ("[server]\nport = 1", "unknown setting 'server'"),
        ("config = 'other.toml'", "unknown setting 'config'"),
        ("node-id = 'a'\nnode_id = 'b'", "'node-id' stands there twice"),
        ("port = ", "is not a TOML file"),
        ("max-clients = 0x" + "f" * 4000, "max-clients: a number of that size is no setting"),
        ("primary = 0x" + "f" * 4000, "primary: a number of that size is no setting"),
        ("join = " + "[" * 5000, "is not a TOML file"),
        (r'data-dir = "a\u0000b"', "data-dir: expected a path"),
        ("port = 70000", "port: expected a port from 1 to 65535, not '70000'"),
    ],
)
def test_file_when_it_is_wrong_then_names_file_key_and_remedy(toml, text, said):
    """An error names the file, the key and what would be right."""
    message = refusal(toml(text))

    assert "kv.toml" in message
    assert said in message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prot", "1"], "unknown argument '--prot'; did you mean '--port'?"),
        (["--nod", "b"], "unknown argument '--nod'"),
        (["stray"], "unknown argument 'stray'"),
        (["--port"], "argument --port: expected one argument"),
        (["--port", "0"], "--port: expected a port from 1 to 65535, not '0'"),
        (["--port", "6_379"], "expected a port"),
        (["--node-id", "../x"], "--node-id: expected 1 to 64 letters"),
        (["--join", "localhost"], "--join: expected HOST:PORT, not 'localhost'"),
        (["--join", "::1:6379"], "IPv6 host in brackets"),
        (["--replication", "sync"], "--replication: expected quorum or async, not 'sync'"),
        (["--heartbeat-interval", "nan"], "--heartbeat-interval: expected seconds"),
        (["--election-timeout", "5"], "--election-timeout: expected MIN-MAX in seconds"),
        (["--election-timeout", "1.2.3-4"], "--election-timeout: expected seconds"),
        (["--max-memory", "lots"], "--max-memory: expected a size such as"),
        (["--max-log", "1000"], "--max-log: 1000 is less than 1048576"),
        (["--restore-from", "b.kvb"], "--restore-from founds a cluster: give --primary too"),
        (["--in-memory", "--data-dir", "d"], "--in-memory keeps nothing on disk"),
        (["--max-clients", "0"], "--max-clients: expected a whole number"),
        (["--config", "/no/such/file"], "cannot read /no/such/file: No such file"),
    ],
)
def test_command_line_when_it_is_wrong_then_names_flag_value_and_remedy(argv, said):
    """An error names the flag, the value and what would be right; no flag is abbreviated."""
    assert said in refusal(*argv)


def test_environment_when_a_value_is_wrong_then_names_the_variable():
    """Kubernetes sets KV_PORT=tcp://... for a service named kv; the error must say so."""
    said = refusal(KV_PORT="tcp://10.0.0.1:6379")

    assert said == "KV_PORT: expected a port from 1 to 65535, not 'tcp://10.0.0.1:6379'"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--port", "60000"], "--peer-port"),
        (["--peer-port", "6379"], "are both 6379"),
        (["--election-timeout", "8-5"], "8 is more than 5"),
        (["--heartbeat-interval", "2.6"], "has to be 5.2 s or more"),
        (["--host", "0.0.0.0"], "--advertise-host"),
        (["--max-request-bytes", "1023"], "1023 is not from 1024 to 67108864"),
        (["--max-request-bytes", "65mb"], "is not from 1024 to 67108864"),
    ],
)
def test_relations_when_one_does_not_hold_then_are_refused(argv, said):
    """Settings that contradict each other never start a server."""
    assert said in refusal(*argv)


def test_relations_when_just_met_then_are_accepted():
    """The bounds themselves are allowed."""
    node = settings("--heartbeat-interval=2.5", "--election-timeout=5-5", "--port=55535")

    assert node.peer_port == 65535
    assert settings("--port=60000", "--peer-port=60001").peer_port == 60001
    assert settings("--host=0.0.0.0", "--advertise-host=db1").advertise_host == "db1"


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["67108864", "64MiB", "64mb", "64m", "65536 kB", "67108864b"])
def test_size_when_written_in_any_unit_then_is_the_same(text):
    """Every unit is binary: 64mb is 64MiB is 67108864."""
    assert parse_size(text) == 64 * 1024**2


@pytest.mark.parametrize("text", ["", "-1", "1.5g", "mb", "64 MiBs", "0x10", "1e6", "\u0661"])
def test_size_when_it_is_none_then_is_refused(text):
    """No guesses: fractions, signs and unknown units are errors."""
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


@given(st.sampled_from([row for row in SETTINGS if row.metavar]), st.text(max_size=30))
def test_any_text_when_given_as_a_value_then_is_accepted_or_refused_with_the_flag(row, text):
    """Nothing but ConfigError leaves the parser, whatever is typed."""
    try:
        settings(f"{row.flag}={text}")
    except ConfigError as error:
        assert row.flag in str(error)


def test_address_when_ipv6_then_needs_brackets():
    """``[::1]:6379`` is an address; ``::1:6379`` could be two."""
    assert parse_address("[::1]:6379") == ("::1", 6379)
    assert format_address(("::1", 6379)) == "[::1]:6379"
    assert format_address(("db1", 6379)) == "db1:6379"
    with pytest.raises(ValueError, match="brackets"):
        parse_address("::1:6379")
