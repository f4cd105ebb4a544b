"""What is measured, one section a file; each adds its rows and ratios to the session."""
