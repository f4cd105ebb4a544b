"""The base model through transformers, with adapter-aware linears and paged attention."""
