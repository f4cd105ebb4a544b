"""Triton kernels for adapters and paged attention on a GPU, one op one file. Reached through `kernels.dispatch` alone.

Proven in Triton's interpreter and compiled ahead of time (`RESOURCES.md`); not measured on a GPU.
"""
