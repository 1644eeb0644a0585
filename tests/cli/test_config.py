"""Node configuration: precedence, units, and errors that say where and what to type instead."""

import tomllib
from pathlib import Path

import pytest

from node.config import (
    ConfigError,
    NodeConfig,
    default_config_text,
    format_bytes,
    load_config,
    parse_bytes,
)


def test_flags_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('# mine\nthreads = 2\ndevice = "cpu"\ndisk_bytes_max = "3 GiB"\n')
    loaded = load_config(
        file,
        {"GOSSAMER_DEVICE": "mps", "GOSSAMER_PART": "2/4", "GOSSAMER_HOME": "/elsewhere", "HOME": "/root"},
        {"threads": 8, "log_file": None},
    )
    assert loaded.config.threads == 8
    assert loaded.config.device == "mps"
    assert loaded.config.part == (2, 4)
    assert loaded.config.disk_bytes_max == 3 << 30
    assert loaded.origins["threads"] == "--threads"
    assert loaded.origins["device"] == "GOSSAMER_DEVICE"
    assert loaded.origins["disk_bytes_max"] == f"{file}:4"
    assert loaded.origins["log_level"] == "default"


@pytest.mark.parametrize("address", ["127.0.0.1:9464", "[::1]:9464", "0.0.0.0:0"])
def test_settings_may_be_gathered_in_a_table(tmp_path: Path, address: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'threads = 2\n\n[metrics]\nlisten = "{address}"\n')
    loaded = load_config(file, {})
    assert loaded.config.metrics_listen == address
    assert loaded.origins["metrics_listen"] == f"{file}:3"


def test_lists_in_the_environment_are_separated_by_commas() -> None:
    loaded = load_config(Path("absent"), {"GOSSAMER_LISTEN": "/ip4/127.0.0.1/tcp/1, /ip6/::1/tcp/2"})
    assert loaded.config.listen == ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2")


def test_an_unknown_key_names_its_line_and_its_neighbour(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("threads = 2\n\ndevise = 'cpu'\n")
    with pytest.raises(ConfigError, match=r"config\.toml:3: unknown setting 'devise'") as caught:
        load_config(file, {})
    assert caught.value.fix == "did you mean device?"
    with pytest.raises(ConfigError, match="GOSSAMER_TREADS: unknown setting 'treads'"):
        load_config(tmp_path / "absent", {"GOSSAMER_TREADS": "1"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("threads = -1", "threads = -1"),
        ('part = "5/4"', "1 <= k <= n"),
        ('part = "all"', "2/4"),
        ('disk_bytes_max = "much"', "20 GiB"),
        ('log_level = "loud"', "log_level = 'loud'"),
        ("listen = []", "listen"),
        ('metrics_listen = "9464"', "127.0.0.1:9464"),
        ('metrics_listen = "localhost:9464"', "127.0.0.1:9464"),
        ('metrics_listen = "::1:9464"', "127.0.0.1:9464"),
        ('metrics_listen = "[127.0.0.1]:9464"', "127.0.0.1:9464"),
        ('metrics_listen = "127.0.0.1:94640"', "94640 is not a port"),
        ("[metrics]\nport = 9464", "unknown setting 'metrics_port'"),
        ("threads = ", "config.toml"),
    ],
)
def test_bad_values_say_which_and_why(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    assert message in caught.value.what
    assert caught.value.why
    assert caught.value.fix


def test_the_default_file_sets_nothing_and_uncommented_sets_the_defaults(tmp_path: Path) -> None:
    text = default_config_text()
    assert tomllib.loads(text) == {}
    assert set(NodeConfig.__struct_fields__) == {
        line.split(" =")[0].removeprefix("# ") for line in text.splitlines() if " = " in line
    }
    file = tmp_path / "config.toml"
    examples = ("part", "data_path", "base_path", "log_file", "metrics_listen")
    lines = [line.removeprefix("# ") for line in text.splitlines() if " = " in line]
    file.write_text("\n".join(line for line in lines if not line.startswith(examples)))
    assert load_config(file, {}).config == NodeConfig()


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), ("20 GiB", 20 << 30), ("1.5GB", 1_500_000_000), ("500 kB", 500_000), ("64MiB", 64 << 20)],
)
def test_sizes_with_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_sizes_for_people() -> None:
    assert [format_bytes(count) for count in (0, 1536, 20 << 30, 3 << 40)] == [
        "0 B",
        "1.5 KiB",
        "20.0 GiB",
        "3.0 TiB",
    ]


def test_yes_and_no_are_written_as_toml_writes_them() -> None:
    assert load_config(Path("absent"), {"GOSSAMER_LAN": "true"}).config.lan is True
    assert load_config(Path("absent"), {"GOSSAMER_LAN": "true"}, {"lan": False}).config.lan is False
    assert "# lan = false\n" in default_config_text()
    with pytest.raises(ConfigError, match="lan = 'perhaps'"):
        load_config(Path("absent"), {"GOSSAMER_LAN": "perhaps"})
