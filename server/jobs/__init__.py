"""Work that takes longer than a request: queued, run in a process of its own, told by its id."""
