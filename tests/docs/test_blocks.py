"""Every code block of the pages is run against a server, or has a reason here why it cannot be."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.main import get_command

from server.cli import app
from tests.contract.sources import ROOT
from tests.docs.pages import RUNS, Block, agrees, blocks, commands, pages, run
from tests.support.real_server import RealServer

SETS_UP = "sets up what these tests run in"
IS_CI = "is what runs these tests, or takes minutes of all cores"
BUCKET = "needs a bucket and its credentials: tests/cli/test_bucket.py and tests/adapters_store run it against moto"
SERVES = "starts a server: the one of these tests is started so"
MINUTES = "trains for minutes: tests/examples checks what came of it"
MINUTES_OF_JOB = "trains a generator for minutes: tests/e2e/test_generators.py trains a tiny one"
# (page, first line of the block) -> why it is not run.
NOT_RUN = {
    ("README.md", "make serve"): SETS_UP,
    ("README.md", "make test"): IS_CI,
    ("README.md", "docker compose up --build"): "needs Docker: tests/contract/test_deploy.py reads the files",
    ("docs/access.md", ".venv/bin/polyrank serve --api-keys keys.json --host 0.0.0.0 --audit-log audit.log"): SERVES,
    ("docs/store.md", ".venv/bin/polyrank fsck --store s3://bucket/prefix"): BUCKET,
    (
        "docs/store.md",
        ".venv/bin/polyrank serve --port 8001 --store s3://bucket/prefix --redis redis://:password@host:6379/0",
    ): BUCKET,
    (
        "docs/adapters.md",
        ".venv/bin/polyrank generator train styles --from iso=iso-80 --from iso=iso-90 \\",
    ): MINUTES_OF_JOB,
    (
        "docs/adapters.md",
        "curl -s http://127.0.0.1:8000/generators/styles/adapters -H 'Content-Type: application/json' \\",
    ): MINUTES_OF_JOB,
    (
        "docs/adapters.md",
        "curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\",
    ): "needs an adapter with a choice: tests/e2e/test_variants_served.py makes and asks one",
    (
        "deploy/examples/clients/README.md",
        "vllm bench serve --backend openai --base-url http://127.0.0.1:8000 --endpoint /v1/completions \\",
    ): "needs other programs: tests/clients has requests of their shapes",
    ("deploy/examples/README.md", ".venv/bin/polyrank serve --preload deploy/examples/adapters"): SERVES,
    (
        "deploy/examples/RESULTS.md",
        "python -m deploy.examples.evaluate                              # PEFT in this process",
    ): "asks 448 questions: tests/e2e/test_examples_served.py asks 56",
    (
        "deploy/examples/README.md",
        ".venv/bin/python -m deploy.examples.evaluate                              # PEFT in this process, no server",
    ): "asks 448 questions: tests/e2e/test_examples_served.py asks 56",
    ("deploy/examples/README.md", ".venv/bin/python -m deploy.examples.train            # all seven"): MINUTES,
    ("deploy/examples/README.md", ".venv/bin/python -m deploy.examples.train my-task --out my-adapters"): MINUTES,
    (
        "deploy/examples/merging.md",
        "python -m deploy.examples.merging                        # seed 1; one hour on a busy two-core machine",
    ): MINUTES,
    (
        "deploy/examples/icm.md",
        "OMP_NUM_THREADS=1 python -m deploy.examples.train_generator FOLDER   # seed 0; 6 minutes of one core",
    ): MINUTES,
    (
        "deploy/examples/smora.md",
        "OMP_NUM_THREADS=1 python -m deploy.examples.train_smora   # seed 0; 11 minutes and 20 seconds of one core",
    ): MINUTES,
}


def pulled_as_pushed(server: RealServer, folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        given = ROOT / "deploy" / "examples" / "adapters" / "date-iso" / name
        assert (folder / "my-copy" / name).read_bytes() == given.read_bytes()


def smaller_and_as_good(server: RealServer, folder: Path) -> None:
    sizes = [httpx.get(f"{server.url}/adapters/{name}").json()["bytes"] for name in ("date-iso", "date-iso-small")]
    assert sizes[1] < sizes[0] / 2
    body = {"inputs": "Normalize the date: 3 Feb 1914\nAnswer:", "parameters": {"max_new_tokens": 12}}
    answer = httpx.post(f"{server.url}/generate?adapter=date-iso-small", json=body, timeout=60).json()
    assert answer["generated_text"].startswith(" 1914-02-03")


# (page, first line of the block) -> what is true after it, beside what it prints.
AFTERWARDS = {
    ("docs/adapters.md", ".venv/bin/polyrank push date-iso-2 deploy/examples/adapters/date-iso"): pulled_as_pushed,
    (
        "docs/adapters.md",
        ".venv/bin/polyrank compress date-iso --target date-iso-small --energy 0.99",
    ): smaller_and_as_good,
}


def versions(server: RealServer) -> dict[str, int]:
    found = httpx.get(f"{server.url}/adapters", params={"limit": 1000}).json()
    assert found["next"] is None
    return {each["name"]: each["version"] for each in found["adapters"]}


@pytest.fixture
def unchanged(real: RealServer) -> Iterator[RealServer]:
    """The server, which afterwards has the adapters that it had before."""
    before = versions(real)
    yield real
    for name, version in versions(real).items():
        if name not in before:
            httpx.delete(f"{real.url}/adapters/{name}").raise_for_status()
        elif version != before[name]:
            httpx.post(f"{real.url}/adapters/{name}/rollback", json={"version": before[name]}).raise_for_status()


@pytest.mark.parametrize("page", pages())
def test_a_page_does_what_it_says(page: str, unchanged: RealServer, tmp_path: Path) -> None:
    """From top to bottom, as somebody who follows it."""
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    for block in blocks(page):
        if (page, block.first) in NOT_RUN:
            continue
        assert block.language in RUNS, f"{page}: {block.first} is neither run nor listed in NOT_RUN"
        printed = run(block, unchanged, tmp_path)
        if block.expected is not None:
            assert agrees(block, printed), f"{page}\n{block.code}\nprinted\n{printed}\nnot\n{block.expected[1]}"
        if check := AFTERWARDS.get((page, block.first)):
            check(unchanged, tmp_path)


def test_what_is_not_run_is_there() -> None:
    assert set(NOT_RUN) | set(AFTERWARDS) <= {(page, block.first) for page in pages() for block in blocks(page)}


@pytest.mark.parametrize(("page", "line"), [(page, line) for page in pages() for line in commands(page)])
def test_commands(page: str, line: str) -> None:
    """Of blocks that are not run, too: commands, options and files exist."""
    words = shlex.split(line, comments=True)
    for path in re.findall(r"\bdeploy/[\w./-]*\w", line):
        assert (ROOT / path).exists(), path
    for index, word in enumerate(words):
        if word == ".venv/bin/polyrank":
            check_polyrank(words[index + 1 :])
        elif word == "make":
            assert re.search(rf"^{words[index + 1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif word == "-m" and words[index - 1].endswith("python"):
            assert (ROOT / words[index + 1].replace(".", "/")).with_suffix(".py").is_file()


def check_polyrank(words: list[str]) -> None:
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]  # type: ignore[attr-defined]
    assert not hasattr(command, "commands"), words
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    ends = next((index for index, word in enumerate(words) if word in ("|", "&&", ";", "&")), len(words))
    assert {word for word in words[:ends] if word.startswith("--")} <= options


@pytest.mark.parametrize(
    ("language", "shown", "printed", "same"),
    [
        ("json", '{"a": {"b": 1}}', '{"a": {"b": 1, "c": 2}, "d": 3}', True),
        ("json", '{"a": [{"b": 1}]}', '{"a": [{"b": 1}, {"b": 1}]}', False),
        ("json", '{"a": null}', "{}", False),
        ("json", '{"a": 1}', '{"a": true}', False),
        ("text", "a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("text", "a\n...\nd\n", "a\nd\n\n", True),
        ("text", "a ... d\n", "a b c d\n", True),
        ("text", "a ... d\n", "a\nb d\n", False),
        ("text", "a\n", "a\nb\n", False),
        ("text", " a\n", "a\n", False),
        ("text", "a.c\n", "abc\n", False),
    ],
)
def test_what_is_shown_is_compared(language: str, shown: str, printed: str, same: bool) -> None:
    assert agrees(Block("", "bash", "", (language, shown)), printed) is same
