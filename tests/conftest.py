"""Settings of every test."""

import torch

from tests.kernels.triton.interpreter import load_interpreted

load_interpreted()  # at import: other conftests may import triton before pytest is configured


def pytest_configure() -> None:
    """One thread: a tiny model's products are far too small to share, and parallel test runs would only collide."""
    torch.set_num_threads(1)
