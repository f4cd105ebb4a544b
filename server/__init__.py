"""The Polyrank service: HTTP API, engine and model."""
