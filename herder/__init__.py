"""What people and programs outside touch: API types, the Python client, the command line."""

__version__ = "0.1.0"
