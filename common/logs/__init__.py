"""Logs as files: segments and their index of times, lines cut from them, searching, daemons' own logs, what is kept."""
