"""A real Prometheus that scrapes one server every second, with the rules of deploy/."""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
import yaml

from tests.contract.sources import ROOT
from tests.support.server_process import free_port

FILES = ROOT / "deploy" / "prometheus"
START_SECONDS = 60
SCRAPE_SECONDS = 1


def require_prometheus() -> None:
    """CI installs it (`make test`); a machine where that is not allowed skips, and says so."""
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")


class PrometheusServer:
    """Keeps its data in `folder`. Leaving the context ends it. target: host and port that it scrapes."""

    def __init__(self, folder: Path, target: str) -> None:
        self._folder = folder
        self._target = target
        self.url = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        settings = yaml.safe_load((FILES / "prometheus.yml").read_text())
        settings["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
        settings["rule_files"] = [str(FILES / name) for name in settings["rule_files"]]
        settings["scrape_configs"][0]["static_configs"] = [{"targets": [self._target]}]
        config = self._folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(settings))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={self._folder / 'data'}"]
        command += [f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn"]
        with (self._folder / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.until(self._ready, START_SECONDS, "Prometheus starts")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(timeout=30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that an expression gives now."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30)
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """Every rule, with its health and last error."""
        groups = httpx.get(f"{self.url}/api/v1/rules", timeout=30).json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def until(self, holds: Callable[[], object], seconds: float, what: str) -> None:
        """Asks every now and then, for Prometheus tells nobody of a scrape. Fails after the deadline."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert self._process is not None
            assert self._process.poll() is None, (self._folder / "prometheus.log").read_text()
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(SCRAPE_SECONDS / 4)

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
