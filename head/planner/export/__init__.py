"""A plan as the command lines and configuration files of other tools."""
