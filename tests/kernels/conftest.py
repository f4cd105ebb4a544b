"""Every kernel test starts from the same seed; C++ tests need a compiler once per machine."""

import os
import shlex
import shutil
from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20261123)


@pytest.fixture(scope="session")
def native() -> None:
    """The C++ kernels are loaded; a build that fails where there is a compiler is an error, not a skip."""
    if os.environ.get("POLYRANK_KERNELS") == "reference":
        pytest.skip("POLYRANK_KERNELS=reference")
    if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None:
        pytest.skip("no C++ compiler")
    assert dispatch.load("cpu") == "cpu"


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
