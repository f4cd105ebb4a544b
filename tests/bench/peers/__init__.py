"""Other servers on the same work. What runs in a peer's own environment imports nothing but that peer."""
