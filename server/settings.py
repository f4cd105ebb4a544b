"""Every option of the service once: flag, environment variable, default and help.

`python -m server.settings` writes the table of options into docs/options.md.
"""

import ipaddress
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ByteSize, Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.replicas.rate import Rate

PREFIX = "POLYRANK_"
# Read elsewhere: by the command line's client, and by the kernels' build.
OTHER_VARIABLES = frozenset({"POLYRANK_URL", "POLYRANK_API_KEY", "POLYRANK_CACHE", "POLYRANK_KERNELS"})
STORE_SCHEMES = ("file", "memory", "s3", "gs", "az")
TABLE_START, TABLE_END = "<!-- options: start -->", "<!-- options: end -->"


# No query: it could lift the time-outs.
_REDIS = re.compile(r"rediss?://[^/?#\s]+(/[0-9]{0,5})?|unix://[^?#\s]*/[^?#\s]+")
_COLLECTOR = re.compile(r"https?://[^/?#\s@]+(/[^?#\s]*)?")  # no password: OTEL_EXPORTER_OTLP_HEADERS is for those
# Options whose value may hold a password: it is not repeated.
_SECRET = frozenset({"redis", "api_keys", "otlp_endpoint"})


class SettingsError(ValueError):
    """An option is unknown or malformed; the message names it."""


def _positive_size(value: ByteSize) -> ByteSize:
    if value <= 0:
        raise ValueError("must be more than 0 bytes")
    return value


def _default_store() -> str:
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return str(Path(home).expanduser() / "polyrank")


Size = Annotated[ByteSize, AfterValidator(_positive_size)]


def _option(default: Any, text: str, metavar: str, shown: str | None = None) -> Any:
    """A field with what the command line and docs/options.md show: help, value's form, and the default in words."""
    in_words = {"None": "none", "False": "off", "True": "on"}
    extra: JsonDict = {"metavar": metavar, "shown": shown or in_words.get(str(default), str(default))}
    if callable(default):
        return Field(default_factory=default, description=text, json_schema_extra=extra)
    return Field(default=default, description=text, json_schema_extra=extra, validate_default=True)


class Settings(BaseSettings):
    """Options of `polyrank serve`. A flag wins over its environment variable, and that over the default."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    model: str = _option(
        "smollm2", "Base model: a folder, a `.gguf` file, a Hugging Face id, or `smollm2` (built in).", "MODEL"
    )
    store: str = _option(
        _default_store,
        "Where adapters are kept: a folder, a bucket (`s3://bucket/prefix`, `gs://`, `az://`), or `memory://` "
        "(gone at the end).",
        "FOLDER|URL",
        "~/.local/share/polyrank",
    )
    store_cache: Path | None = _option(
        None,
        "Folder where this machine keeps files of a bucket; several servers may share it.",
        "FOLDER",
    )
    store_cache_bytes: Size = _option("10GiB", "Size of that folder; what was used longest ago goes first.", "BYTES")
    redis: str | None = _option(
        None,
        "Redis that the servers over one store share (`redis://:password@host:6379/0`, `rediss://`): changes, load, "
        "rate limits. Never needed to answer.",
        "URL",
    )
    rate_limit: str | None = _option(
        None,
        "Most generation requests of a key, or without keys of a client address, such as `60/minute` (second, hour, "
        "day); more get 429. A key's own limit replaces it. Over all servers with `--redis`.",
        "RATE",
    )
    preload: Path | None = _option(
        None, "Folder of PEFT folders; each is added at start under its own name, unless it was ever used.", "FOLDER"
    )
    api_keys: str | None = _option(
        None,
        "Where the API keys are (`polyrank keys`): a file, or a Redis by its URL. Without keys, whoever reaches the "
        "port may do all.",
        "FILE|URL",
    )
    audit_log: Path | None = _option(
        None,
        "File that gets one JSON line for each request to change something: who, what, when, and how it ended.",
        "FILE",
    )
    host: str = _option(
        "127.0.0.1", "Address to listen on; any but loopback needs `--api-keys`, or `--insecure`.", "ADDRESS"
    )
    port: int = _option(8000, "Port to listen on.", "PORT")
    insecure: bool = _option(
        False, "Listen beyond loopback although there are no keys: whoever reaches the port may do all.", "BOOL"
    )
    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "Where the model runs; `auto` takes a GPU if there is one.", "auto|cpu|cuda"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "Type of weights and activations; `auto`: float32 on a CPU, bfloat16 on a GPU.",
        "auto|float32|bfloat16|float16",
    )
    quantize: Literal["none", "int8"] = _option(
        "none",
        "Rounds the base model's products; `int8`: faster and smaller on a CPU, adapters stay exact.",
        "none|int8",
    )
    compile: bool = _option(
        True,
        "On a CPU: compiles the layers in the background (this needs a C++ compiler) and serves eagerly meanwhile.",
        "BOOL",
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "Type of the KV cache; `auto`: as `--dtype`, but float16 for a float32 model under `--quantize int8`.",
        "auto|float32|bfloat16|float16",
    )
    device_memory: Size = _option(
        "1536MiB",
        "Device memory for KV cache and adapters together; what neither is sure of goes to whichever needs it.",
        "BYTES",
    )
    kv_cache_memory: Size = _option("512MiB", "What the KV cache of all requests is sure of, such as `2GiB`.", "BYTES")
    adapter_memory: Size = _option("256MiB", "What adapters are sure of; those in use stay, others make room.", "BYTES")
    host_adapter_memory: Size = _option(
        "1GiB", "Host memory for adapters that device memory has no room for: they come back without disk.", "BYTES"
    )
    adapter_dtype: Literal["native", "int8", "int4"] = _option(
        "native",
        "Type of adapters in memory; `int8`: half of 16-bit factors, at about 0.6 % error of the weights; `int4`: a "
        "quarter, at about 8 %.",
        "native|int8|int4",
    )
    max_batch_tokens: PositiveInt = _option(512, "Tokens computed in one step, prompts and answers together.", "TOKENS")
    max_running: PositiveInt = _option(64, "Requests in the batch at the same time.", "REQUESTS")
    max_queued: PositiveInt = _option(256, "Requests that may wait; further ones are refused with 503.", "REQUESTS")
    max_context: PositiveInt | None = _option(
        None, "Longest prompt and answer together.", "TOKENS", "what the base model allows"
    )
    max_rank: PositiveInt = _option(256, "Highest rank of an adapter; higher ones are refused with 422.", "RANK")
    max_upload_bytes: Size = _option("1GiB", "Largest upload; larger ones are refused with 413.", "BYTES")
    adapter_root: Path | None = _option(
        None,
        "Folder below which `POST /v1/load_lora_adapter` may read; without it that route takes no paths.",
        "FOLDER",
    )
    merge_into_base: bool = _option(
        False, "Lets `POST /adapters/NAME/merge_into_base` put one adapter into the base's weights for a while.", "BOOL"
    )
    drain_seconds: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = _option(
        30, "After SIGTERM or Ctrl-C, time for running requests to finish; new ones get 503.", "SECONDS"
    )
    stuck_seconds: Annotated[float, Field(ge=1, le=86400, allow_inf_nan=False)] = _option(
        120,
        "A step that takes longer (the first: five times) counts as stuck: `/health` says 503 and requests end with "
        "`engine_stuck`; after a quarter of it `/ready` says 503.",
        "SECONDS",
    )
    otlp_endpoint: str | None = _option(
        None,
        "Collector that traces are sent to (OTLP over HTTP, such as `http://127.0.0.1:4318`); needs `polyrank[otel]`. "
        "The standard `OTEL_` variables are heeded, and turn traces on too.",
        "URL",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "info", "Least weight of a line in the log.", "debug|info|warning|error"
    )
    log_format: Literal["text", "json"] = _option("text", "Form of the log.", "text|json")

    @field_validator("model")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a model")
        return value

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        scheme, separator, _ = value.partition("://")
        if not value.strip():
            raise ValueError("must name a folder or a URL")
        if separator and scheme not in STORE_SCHEMES:
            raise ValueError(f"unknown scheme {scheme}://; known are {', '.join(STORE_SCHEMES)}")
        return value if separator else str(Path(value).expanduser())

    @field_validator("redis")
    @classmethod
    def _redis_url(cls, value: str | None) -> str | None:
        if value is not None:
            check_redis(value)
        return value

    @field_validator("api_keys")
    @classmethod
    def _place_of_keys(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            check_redis(value)
        elif value is not None and not value.strip():
            raise ValueError("must name a file or a Redis")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        if value is not None and not _COLLECTOR.fullmatch(value):
            raise ValueError("must be http://host[:port][/path], or https:// likewise")
        return value

    @field_validator("rate_limit")
    @classmethod
    def _rate(cls, value: str | None) -> str | None:
        if value is not None:
            Rate.parse(value)
        return value

    @field_validator("port")
    @classmethod
    def _port_number(cls, value: int) -> int:
        if not 1 <= value <= 65535:
            raise ValueError("must be between 1 and 65535")
        return value

    @field_validator("preload", "adapter_root")
    @classmethod
    def _existing_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError("must be an existing folder")
        return value

    @model_validator(mode="after")
    def _open_on_loopback_only(self) -> "Settings":
        if not self.insecure and self.api_keys is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} (POLYRANK_HOST) lets other machines in and there are no API keys to stop them; "
                "listen on 127.0.0.1, make keys (--api-keys), or say --insecure (POLYRANK_INSECURE=true) where the "
                "network itself is closed"
            )
        return self

    @model_validator(mode="after")
    def _budget_holds_its_parts(self) -> "Settings":
        parts = self.kv_cache_memory + self.adapter_memory
        if "device_memory" in self.model_fields_set and self.device_memory < parts:
            raise ValueError(
                "--device-memory (POLYRANK_DEVICE_MEMORY) is less than the "
                f"{parts} bytes that --kv-cache-memory and --adapter-memory are sure of; lower these or raise it"
            )
        return self

    @property
    def address(self) -> str:
        """URL at which this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104 - compared, not bound
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"http://{host}:{self.port}"


def check_redis(url: str) -> None:
    """Raises ValueError, which does not repeat the URL: it may hold a password."""
    try:
        known = _REDIS.fullmatch(url) is not None and urlsplit(url).port != 0
    except ValueError:  # of the port
        known = False
    if not known:
        raise ValueError("must be redis://[user:password@]host[:port][/db], rediss:// likewise, or unix:///path")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to the address; names other than localhost count as no."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def flag(name: str) -> str:
    """`max_rank` -> `--max-rank`."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """`max_rank` -> `POLYRANK_MAX_RANK`."""
    return PREFIX + name.upper()


def facts(field: FieldInfo) -> dict[str, str]:
    """What `_option` put beside the field: metavar, and the default in words."""
    extra = field.json_schema_extra
    return {key: str(value) for key, value in extra.items()} if isinstance(extra, dict) else {}


def _refuse_unknown_variables() -> None:
    known = {variable(name) for name in Settings.model_fields} | OTHER_VARIABLES
    unknown = sorted(key for key in os.environ if key.upper().startswith(PREFIX) and key not in known)
    if unknown:
        raise SettingsError(
            f"unknown environment variable {', '.join(unknown)}; `polyrank serve --help` lists them all"
        )


def load(flags: Mapping[str, object] | None = None) -> Settings:
    """Settings from the given flags and the environment; a bad one raises SettingsError with its name."""
    _refuse_unknown_variables()
    flags = flags or {}
    try:
        return Settings(**flags)  # type: ignore[arg-type]  # pydantic parses the strings
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(dict(problem), flags) for problem in error.errors())) from None


def _explain(problem: dict[str, Any], flags: Mapping[str, object]) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return text
    name = str(problem["loc"][0])
    if name not in Settings.model_fields:
        return f"unknown option {flag(name)}"
    where = flag(name) if name in flags else variable(name)
    if name in _SECRET:
        return f"{where}: {text[:1].lower()}{text[1:]}"
    return f"{where}={problem['input']!s}: {text[:1].lower()}{text[1:]}"


def table() -> str:
    """The options as a Markdown table."""
    rows = ["| option | environment | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        switch, shown = field.annotation is bool, facts(field)["shown"]
        default = shown if shown in ("none", "off", "on") or " " in shown else f"`{shown}`"
        form = "" if switch else " " + facts(field)["metavar"].replace("|", "\\|")
        rows.append(f"| `{flag(name)}{form}` | `{variable(name)}` | {default} | {field.description} |")
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """The text with the current table between its two markers."""
    pattern = re.compile(f"{re.escape(TABLE_START)}.*{re.escape(TABLE_END)}", re.DOTALL)
    if not pattern.search(readme):
        raise SettingsError(f"docs/options.md lacks the markers {TABLE_START} and {TABLE_END}")
    return pattern.sub(lambda _: f"{TABLE_START}\n{table()}\n{TABLE_END}", readme)


def main() -> None:
    """Rewrites docs/options.md below the current folder where its table is out of date."""
    path = Path("docs/options.md")
    text = path.read_text()
    if (fresh := with_table(text)) != text:
        path.write_text(fresh)
        sys.stdout.write(f"{path}: options brought up to date\n")


if __name__ == "__main__":
    main()
