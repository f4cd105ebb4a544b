"""API keys, where they are kept, and the record of changes."""
