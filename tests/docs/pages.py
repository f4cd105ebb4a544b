"""The pages for people, their code blocks, and how a block is run as a reader would run it."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.contract.sources import ROOT
from tests.support.real_server import RealServer

_PYTHON = shlex.quote(sys.executable)
POLYRANK = f"{_PYTHON} -m server"
_COMMANDS = {"python": _PYTHON, "polyrank": POLYRANK}
# An answer of 4xx or 5xx fails the block, unless it is what the page shows.
_CURL = 'curl() { command curl --fail-with-body "$@"; }\n'
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """expected: the block of JSON or text right after it, with its language."""

    page: str
    language: str
    code: str
    expected: tuple[str, str] | None = None

    @property
    def first(self) -> str:
        return self.code.partition("\n")[0]


def pages() -> list[str]:
    found = [ROOT / "README.md", ROOT / "deploy" / "README.md"]
    found += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "deploy" / "examples").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    """In the order of the page; JSON and text that follow a command are what it prints."""
    found: list[Block] = []
    end = 0
    text = text_of(page)
    for match in _BLOCK.finditer(text):
        language, code = match[1], match[2]
        shows = language in ("json", "text") and found and not text[end : match.start()].strip()
        if shows and found[-1].language in RUNS and found[-1].expected is None:
            found[-1] = Block(page, found[-1].language, found[-1].code, (language, code))
        else:
            found.append(Block(page, language, code))
        end = match.end()
    return found


def commands(page: str) -> Iterator[str]:
    """Every line of every block of shell, continuation lines joined."""
    for block in blocks(page):
        if block.language in ("bash", "sh"):
            for line in block.code.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield line


def adapted(code: str, server: RealServer) -> str:
    """The code with this server in place of the one on port 8000."""
    code = re.sub(r"\.venv/bin/(python|polyrank)\b", lambda match: _COMMANDS[match[1]], code)
    return code.replace("http://127.0.0.1:8000", server.url).replace("~/.local/share/polyrank", str(server.store))


def run(block: Block, server: RealServer, folder: Path) -> str:
    """What the block prints. folder: where the reader is; the repository's `deploy` is in it."""
    fails = block.expected is not None and '"error"' in block.expected[1]
    code = adapted(block.code, server)
    script = ["bash", "-euo", "pipefail", "-c", code if fails else _CURL + code]
    command = [sys.executable, "-c", code] if block.language == "python" else script
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("POLYRANK_", "HF_HUB"))}
    environment |= {"POLYRANK_URL": server.url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.page}\n{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


RUNS = ("bash", "sh", "python")


def agrees(block: Block, printed: str) -> bool:
    """JSON: what is shown is in it; text: line by line, `...` for any lines, or for any text within a line."""
    assert block.expected is not None
    language, shown = block.expected
    if language == "json":
        return contains(json.loads(printed), json.loads(shown))
    lines = shown.rstrip("\n").split("\n")
    open_lines = [".*".join(map(re.escape, line.split("..."))) for line in lines]
    pattern = "".join(r"(?:.*\n)*?" if line == ".*" else line + r"\n" for line in open_lines)
    return re.fullmatch(pattern, printed.rstrip("\n") + "\n") is not None


def contains(whole: Any, part: Any) -> bool:
    """Objects may have more fields than are shown; all else is equal."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(contains, whole, part))
    return isinstance(whole, bool) is isinstance(part, bool) and bool(whole == part)
