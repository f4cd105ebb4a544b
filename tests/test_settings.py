"""Every option once; a bad one stops the start and is named."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import settings as module
from server.settings import Settings, SettingsError, flag, is_loopback, load, table, variable, with_table

EVERYWHERE = "0.0.0.0"  # noqa: S104 - passed on, never bound


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(os.environ):
        if key.startswith("POLYRANK_"):
            monkeypatch.delenv(key)


def test_defaults() -> None:
    settings = load()
    assert (settings.model, settings.host, settings.port, settings.address) == (
        "smollm2",
        "127.0.0.1",
        8000,
        "http://127.0.0.1:8000",
    )
    assert (settings.kv_cache_memory, settings.adapter_memory) == (512 << 20, 256 << 20)
    assert (settings.device_memory, settings.host_adapter_memory) == (1536 << 20, 1 << 30)
    assert settings.max_context is None


def test_settings_are_frozen() -> None:
    settings = load()
    with pytest.raises(ValueError, match="frozen"):
        settings.__setattr__("port", 1)


def test_the_store_is_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load().store == str(tmp_path / ".local" / "share" / "polyrank")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert load().store == str(tmp_path / "data" / "polyrank")
    assert load({"store": "~/adapters"}).store == str(tmp_path / "adapters")
    assert load({"store": "memory://"}).store == "memory://"


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("1.5 GiB", 3 << 29), ("500MB", 500_000_000), ("4096", 4096), ("1kib", 1024)]
)
def test_sizes(text: str, size: int) -> None:
    assert load({"adapter_memory": text}).adapter_memory == size


BAD = [
    ("port", "0"),
    ("port", "65536"),
    ("port", "http"),
    ("port", ""),
    ("kv_cache_memory", "0"),
    ("kv_cache_memory", "-1GiB"),
    ("kv_cache_memory", "2 parsecs"),
    ("adapter_memory", "nan"),
    ("store_cache_bytes", "0"),
    ("max_running", "0"),
    ("rate_limit", "60"),
    ("rate_limit", "0/minute"),
    ("rate_limit", "60/month"),
    ("rate_limit", "-1/second"),
    ("max_running", "-3"),
    ("max_running", "1.5"),
    ("max_context", "none"),
    ("drain_seconds", "-1"),
    ("drain_seconds", "inf"),
    ("drain_seconds", "nan"),
    ("device", "tpu"),
    ("dtype", "int8"),
    ("quantize", "int4"),
    ("adapter_dtype", "bfloat16"),
    ("model", " "),
    ("store", ""),
    ("store", "ftp://host/path"),
    ("preload", "/no/such/folder"),
    ("adapter_root", "/no/such/folder"),
    ("insecure", "perhaps"),
    ("log_level", "loud"),
    ("log_format", "xml"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_stop_the_start_and_are_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as by_flag:
        load({name: value})
    assert str(by_flag.value).startswith(f"{flag(name)}={value}: ")
    monkeypatch.setenv(variable(name), value)
    with pytest.raises(SettingsError) as by_variable:
        load()
    assert str(by_variable.value).startswith(f"{variable(name)}={value}: ")


@pytest.mark.parametrize("key", ["POLYRANK_PROT", "POLYRANK_", "polyrank_port", "POLYRANK_REDISS"])
def test_unknown_variables_stop_the_start(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(key, "1")
    with pytest.raises(SettingsError, match=f"variable {key};"):
        load()


def test_unknown_flags_stop_the_start() -> None:
    with pytest.raises(SettingsError, match="unknown option --rediss"):
        load({"rediss": "x"})


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://:p%40ss@h:6380/2",
        "rediss://user:pass@redis.example.org:6379",
        "redis://[::1]:6379/0",
        "unix:///run/redis.sock",
    ],
)
def test_urls_of_redis(url: str) -> None:
    assert load({"redis": url}).redis == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:6379",
        "http://:secret@h",
        "redis://",
        "redis://:secret@h:port",
        "redis://:secret@h:99999",
        "redis://:secret@h/db",
        "redis://:secret@h?socket_timeout=900",
        "unix://",
    ],
)
def test_a_bad_url_of_redis_is_named_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as by_flag:
        load({"redis": url})
    monkeypatch.setenv("POLYRANK_REDIS", url)
    with pytest.raises(SettingsError) as by_variable:
        load()
    assert str(by_flag.value).startswith("--redis: must be redis://")
    assert str(by_variable.value).startswith("POLYRANK_REDIS: must be redis://")
    assert "secret" not in str(by_flag.value) + str(by_variable.value)


@pytest.mark.parametrize("key", sorted(module.OTHER_VARIABLES))
def test_variables_of_others_are_left_alone(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(key, "x")
    load()


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYRANK_PORT", "1234")
    assert load().port == 1234
    assert load({"port": "4321"}).port == 4321


@pytest.mark.parametrize(
    ("host", "closed"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        (EVERYWHERE, False),
        ("::", False),
        ("10.0.0.1", False),
        ("", False),
        ("localhost.example.org", False),
        ("::ffff:127.0.0.1", True),
        ("127.0.0.1.example.org", False),
    ],
)
def test_only_loopback_is_open_without_keys(host: str, closed: bool) -> None:
    if host != "::ffff:127.0.0.1":  # newer Pythons call it loopback, older ones do not; both are safe
        assert is_loopback(host) is closed
    if is_loopback(host):
        assert load({"host": host}).host == host
        return
    with pytest.raises(SettingsError, match="--insecure"):
        load({"host": host})
    assert load({"host": host, "insecure": True}).host == host


def test_address_of_a_server_that_listens_everywhere() -> None:
    assert load({"host": EVERYWHERE, "insecure": True}).address == "http://127.0.0.1:8000"
    assert load({"host": "::", "insecure": True}).address == "http://[::1]:8000"


@given(st.text(max_size=20))
def test_any_text_for_a_size_is_a_size_or_refused(text: str) -> None:
    try:
        size, refusal = int(load({"kv_cache_memory": text}).kv_cache_memory), ""
    except SettingsError as error:
        size, refusal = 0, str(error)
    assert size > 0 or refusal.startswith("--kv-cache-memory=")


def test_every_option_has_a_row() -> None:
    rows = table().splitlines()[2:]
    assert len(rows) == len(Settings.model_fields)
    for name, row in zip(Settings.model_fields, rows, strict=True):
        assert row.startswith(f"| `{flag(name)}")
        assert f"`{variable(name)}`" in row
        assert len(row.replace("\\|", "").split("|")) == 6


def test_the_table_is_put_between_its_markers() -> None:
    text = f"before\n{module.TABLE_START}\nold\n{module.TABLE_END}\nafter\n"
    fresh = with_table(text)
    assert fresh == f"before\n{module.TABLE_START}\n{table()}\n{module.TABLE_END}\nafter\n"
    assert with_table(fresh) == fresh
    with pytest.raises(SettingsError, match="markers"):
        with_table("nothing here")


def test_main_rewrites_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "docs" / "options.md"
    page.parent.mkdir()
    page.write_text(f"{module.TABLE_START}{module.TABLE_END}")
    module.main()
    assert table() in page.read_text()
    stamp = page.stat().st_mtime_ns
    module.main()
    assert page.stat().st_mtime_ns == stamp


def test_the_one_budget_holds_its_two_parts() -> None:
    parts = {"kv_cache_memory": "1GiB", "adapter_memory": "1GiB"}
    assert load(parts | {"device_memory": "2GiB"}).device_memory == 2 << 30
    assert load(parts).adapter_memory == 1 << 30, "not asked for, it grows with them"
    with pytest.raises(SettingsError, match="--device-memory"):
        load(parts | {"device_memory": "2047MiB"})
