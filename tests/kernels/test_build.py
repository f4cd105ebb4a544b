"""Building once, and living without: no case here compiles the real sources."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import dispatch
from kernels.cpu import build


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(build.KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_cpu_loaded", None)
    return tmp_path / "cache"


def test_no_compiler_is_told_once_and_the_reference_runs(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert dispatch.load() == "reference"
        assert dispatch.load() == "reference"
    told = [record.getMessage() for record in caplog.records if "not available" in record.getMessage()]
    assert len(told) == 1
    assert "'no-such-compiler' is not on PATH" in told[0]


def test_a_compiler_that_refuses_is_quoted(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = cache.parent / "compiler"
    compiler.write_text("#!/bin/sh\necho 'I do not like this' >&2\nexit 3\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    assert dispatch.load() == "reference"
    assert "ended with 3: I do not like this" in caplog.text
    assert [path.suffix for path in cache.iterdir()] == [".lock"], "a failed build leaves nothing else"


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    assert dispatch.load() == "reference"
    assert "not available" in caplog.text


def test_a_library_that_does_not_load_is_told(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir()
    (cache / f"kernels-{build._digest()}.so").write_text("no library")
    assert dispatch.load() == "reference"
    assert "not available" in caplog.text


def test_reference_can_be_forced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.KERNELS_VARIABLE, "reference")
    assert dispatch.load() == "reference"
    assert not cache.exists()


def test_a_misspelt_choice_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.KERNELS_VARIABLE, "refrence")
    with pytest.raises(ValueError, match="POLYRANK_KERNELS='refrence': expected one of auto, reference"):
        dispatch.load()


@pytest.fixture
def tiny_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_builds_once_and_again_when_a_source_changes(
    cache: Path, tiny_sources: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build.library()
    assert first.parent == cache
    assert caplog.text.count("Building CPU kernels") == 1

    monkeypatch.setenv("CXX", "no-such-compiler")  # a cached library needs no compiler
    assert build.library() == first
    (tiny_sources / "one.cpp").write_text('extern "C" int one() { return 2; }')
    with pytest.raises(build.BuildFailed):
        build.library()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_two_processes_build_once(cache: Path, tiny_sources: Path) -> None:
    script = (
        "import sys, pathlib; from kernels.cpu import build; "
        f"build.SOURCES = pathlib.Path({str(tiny_sources)!r}); print(build.library())"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum("Building CPU kernels" in errors for _, errors in outputs) == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("header", "source"),
    [
        ("inline int two() { return 2; }", "int one() { return two() - 1; }"),  # which only the shared header has
        ("this is no header", "int one() { return 1; }"),
    ],
    ids=["sound", "refused"],
)
def test_shared_headers_are_a_help_and_no_condition(cache: Path, tiny_sources: Path, header: str, source: str) -> None:
    (tiny_sources / build.SHARED).write_text(header)
    (tiny_sources / "one.cpp").write_text(f'extern "C" __attribute__((visibility("default"))) {source}')
    assert ctypes.CDLL(str(build.library())).one() == 1


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_what_killed_builds_left_is_removed(cache: Path, tiny_sources: Path) -> None:
    for name in ("build-old", "build-new"):
        (cache / name).mkdir(parents=True)
        (cache / name / "half.o").write_text("half")
    os.utime(cache / "build-old", (1e9, 1e9))
    build.library()
    assert [folder.name for folder in cache.glob("build-*")] == ["build-new"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"POLYRANK_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/polyrank"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/polyrank"),
    ],
)
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("POLYRANK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert build.cache_folder() == Path(expected)
