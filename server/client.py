"""HTTP client of a Polyrank server, for the command line."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx

from server.settings import is_loopback

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all if known
Json = dict[str, Any]

TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # seconds; an upload is answered after it has been checked
PROBE_SECONDS = 5.0
HINTS = {
    "adapter_exists": "--replace makes this the next version",
    "invalid_api_key": "POLYRANK_API_KEY holds another",
    "missing_api_key": "set POLYRANK_API_KEY",
    "missing_scope": "`polyrank keys ls` shows what each key may do",
    "already_compressed": "`polyrank show` names its source; compress that version",
    "model_not_found": "`polyrank ls` shows the names there are",
    "generator_not_found": "`polyrank generator ls` shows the names there are",
    "upload_too_large": "the server's --max-upload-bytes sets the limit",
}


class ClientError(Exception):
    """What went wrong, in one line, with a code that does not change between versions."""

    def __init__(self, message: str, code: str, *, status: int | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.hint = hint

    def line(self) -> str:
        """Message, code and hint on one line."""
        text = f"{' '.join(self.message.split())} ({self.code})"
        return f"{text}; {self.hint}" if self.hint else text


class Client:
    """One server, one connection pool; use it in a `with` block."""

    def __init__(self, url: str, api_key: str | None = None, timeout: httpx.Timeout = TIMEOUT) -> None:
        parsed = httpx.URL(url)
        self.url = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy cannot reach this machine's own loopback.
        self._http = httpx.Client(
            base_url=self.url, headers=self.headers, timeout=timeout, trust_env=not is_loopback(parsed.host)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def adapters(self) -> Iterator[Json]:
        """Every adapter, page by page."""
        return self._pages("/adapters", "adapters")

    def adapter(self, reference: str) -> Json:
        """Facts of one adapter; the reference is a name or name@version."""
        return self._json("GET", _path(reference))

    def delete(self, name: str) -> None:
        """Deletes the name; running requests finish."""
        with self._stream("DELETE", _path(name)):
            pass

    def upload(self, name: str, folder: Path, *, replace: bool, progress: Progress) -> tuple[Json, bool]:
        """Uploads a PEFT folder; returns the adapter's facts and whether anything is new."""
        weights = folder / "adapter_model.safetensors"
        with weights.open("rb") as body:
            files = {
                "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes(), "application/json"),
                "weights": ("adapter_model.safetensors", _Counted(body, progress), "application/octet-stream"),
            }
            parameters = {"replace": "true"} if replace else {}
            with self._stream("PUT", _path(name), params=parameters, files=files) as response:
                return _object(response.read()), response.status_code == httpx.codes.CREATED

    def compress(self, reference: str, order: Json) -> Json:
        """Has the server store a compressed version; returns its facts, with `new`: whether anything is."""
        with self._stream("POST", f"{_path(reference)}/compress", json=order) as response:
            return _object(response.read())

    def compress_jointly(self, order: Json) -> list[Json]:
        """Has the server compress a collection together; returns each adapter's facts."""
        with self._stream("POST", "/compress", json=order) as response:
            found: list[Json] = _object(response.read())["adapters"]
            return found

    def merge(self, order: Json, *, replace: bool) -> Json:
        """Has the server merge adapters; returns the job, which may be done already."""
        parameters = {"replace": "true"} if replace else {}
        return self._json("POST", "/merge", params=parameters, json=order)

    def train_generator(self, order: Json, *, replace: bool) -> Json:
        """Has the server train a generator; returns the job, which may be done already."""
        parameters = {"replace": "true"} if replace else {}
        return self._json("POST", "/generators", params=parameters, json=order)

    def generators(self) -> Iterator[Json]:
        """Every generator, page by page."""
        return self._pages("/generators", "generators")

    def generator(self, reference: str) -> Json:
        """Facts of one generator; the reference is a name or name@version."""
        return self._json("GET", _generator(reference))

    def delete_generator(self, name: str) -> None:
        """Deletes the name; adapters that it has made stay."""
        with self._stream("DELETE", _generator(name)):
            pass

    def synthesize(self, generator: str, order: Json, *, replace: bool) -> tuple[Json, bool]:
        """Has a generator make an adapter; returns the adapter's facts and whether anything is new."""
        parameters = {"replace": "true"} if replace else {}
        with self._stream("POST", f"{_generator(generator)}/adapters", params=parameters, json=order) as response:
            return _object(response.read()), response.status_code == httpx.codes.CREATED

    def job(self, job_id: str) -> Json:
        """How far a job is, or how it ended."""
        return self._json("GET", f"/jobs/{quote(job_id)}")

    def cancel_job(self, job_id: str) -> None:
        """Cancels a job; one that has ended is left as it is."""
        self._json("DELETE", f"/jobs/{quote(job_id)}")

    def download(self, reference: str, file: str, target: BinaryIO, progress: Progress) -> None:
        """Writes one file of the adapter's PEFT folder to `target`."""
        with self._stream("GET", f"{_path(reference)}/files/{file}") as response:
            length = response.headers.get("content-length")
            total = int(length) if length and "content-encoding" not in response.headers else None
            done = 0
            for piece in response.iter_bytes():
                target.write(piece)
                done += len(piece)
                progress(done, total)

    def generate(self, prompt: str, adapter: str | None, parameters: Json) -> Iterator[tuple[Json, httpx.Headers]]:
        """The stream's events, each with the answer's headers; the last one has `generated_text`."""
        query = {"adapter": adapter} if adapter else {}
        body = {"inputs": prompt, "parameters": parameters}
        with self._stream("POST", "/generate_stream", params=query, json=body) as response:
            for line in response.iter_lines():
                field, _, value = line.partition(":")
                if field != "data" or value.strip() == "[DONE]":
                    continue
                event = _object(value.encode())
                if "error" in event:
                    raise _refusal(event, response)
                yield event, response.headers
                if event.get("generated_text") is not None:
                    return
        raise ClientError("the answer was cut off before its end", "incomplete_answer")

    def ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            return self._http.get("/ready", timeout=2.0).is_success
        except httpx.HTTPError:
            return False

    def probe(self, path: str) -> tuple[int, str]:
        """The status of an answer, whatever it is, and the code of its error."""
        try:
            self._json("GET", path, timeout=PROBE_SECONDS)
        except ClientError as error:
            if error.status is None or error.status in (401, 403):
                raise
            return error.status, error.code
        return 200, ""

    def models(self) -> list[Json]:
        """As OpenAI lists them: the base and every adapter."""
        found: list[Json] = self._json("GET", "/v1/models").get("data") or []
        return found

    def info(self) -> Json:
        """The server's own facts."""
        return self._json("GET", "/info")

    def _pages(self, path: str, field: str) -> Iterator[Json]:
        parameters: dict[str, str] = {}
        while True:
            page = self._json("GET", path, params=parameters)
            yield from page[field]
            if not page.get("next"):
                return
            parameters = {"cursor": str(page["next"])}

    def _json(self, method: str, path: str, **options: Any) -> Json:
        with self._stream(method, path, **options) as response:
            return _object(response.read())

    @contextmanager
    def _stream(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, **options) as response:
                if not response.is_success:
                    response.read()
                    raise _refusal(_object_or_empty(response.content), response)
                yield response
        except httpx.ConnectError as error:
            raise ClientError(
                f"no server answers at {self.url}: {error}",
                "unreachable",
                hint="start one with `polyrank serve`, or set POLYRANK_URL",
            ) from None
        except httpx.TimeoutException:
            raise ClientError(f"{self.url} did not answer in time", "timeout") from None
        except httpx.HTTPError as error:
            raise ClientError(f"the connection to {self.url} failed: {error}", "connection_failed") from None


class _Counted:
    """A file that tells how much of it has been read."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file = file
        self._progress = progress
        self._total = file.seek(0, 2)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self._progress(self._file.tell(), self._total)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _path(reference: str) -> str:
    return f"/adapters/{quote(reference, safe='@:')}"


def _generator(reference: str) -> str:
    return f"/generators/{quote(reference, safe='@:')}"


def _object(body: bytes) -> Json:
    value = _object_or_empty(body)
    if not value:
        raise ClientError("the answer is not a JSON object: is this a Polyrank server?", "bad_answer")
    return value


def _object_or_empty(body: bytes) -> Json:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _refusal(body: Json, response: httpx.Response) -> ClientError:
    """The server's error; OpenAI's shape and TGI's."""
    error = body.get("error")
    if isinstance(error, dict):
        message, code = str(error.get("message")), str(error.get("code") or error.get("type"))
    elif error is not None:
        message, code = str(error), str(body.get("error_type") or "error")
    else:
        message, code = f"the server answered {response.status_code} {response.reason_phrase}", "http_error"
    hint = HINTS.get(code)
    if hint is None and (wait := response.headers.get("retry-after")):
        hint = f"try again in {wait} s"
    return ClientError(message, code, status=response.status_code, hint=hint)
