"""Generators and what they make."""
