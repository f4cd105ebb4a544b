"""Tests of the base model, its adapter-aware modules and paged attention."""
