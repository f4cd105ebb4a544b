"""Measurements, side by side on the same work; never asserted. `make bench` runs `python -m tests.bench`."""
