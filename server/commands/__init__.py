"""The subcommands of `polyrank`."""
