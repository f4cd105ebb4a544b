"""Smaller adapters with a stated error: rank truncation, 8-bit factors, bases shared by many."""
