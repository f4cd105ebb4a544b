"""Who may use the server: API keys, what each may do, and the record of what was changed."""
