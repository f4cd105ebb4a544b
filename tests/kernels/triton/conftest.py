"""The kernels run in Triton's interpreter, or on a GPU where there is one."""

import os

import pytest

pytest.importorskip("triton")

from tests.kernels.triton.interpreter import DEVICE


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # some of triton is imported at the first launch
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert "TRITON_INTERPRET" not in os.environ
