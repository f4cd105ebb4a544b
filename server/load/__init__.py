"""`polyrank bench`: requests in a planned order to any server of OpenAI's completions API, or of `/generate`, timed."""
