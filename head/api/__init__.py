"""The HTTP/JSON control plane under /api/v1: one file per resource."""
