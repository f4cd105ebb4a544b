"""Settings of every test."""

import torch

from tests.kernels.triton.interpreter import load_interpreted
from tests.support.real_server import real

__all__ = ["real"]  # one server for all packages that ask for it

load_interpreted()  # at import: other conftests may import triton before pytest is configured


def pytest_configure() -> None:
    """One thread: a tiny model's products are far too small to share, and parallel test runs would only collide."""
    torch.set_num_threads(1)
