"""Adapters at rest and by name: formats, the append-only log, the registry."""
