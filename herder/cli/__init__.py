"""The `herder` command: one verb, one file."""
