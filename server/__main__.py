"""`python -m server` is `polyrank`."""

from server.cli import main

main()
