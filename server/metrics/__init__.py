"""Metrics for Prometheus. Their names are in `server.metrics.names`."""

from server.metrics.registry import Metrics
from server.metrics.timer import GenerationTimer

__all__ = ["GenerationTimer", "Metrics"]
