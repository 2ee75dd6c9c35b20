"""The on-disk layout of model copies: blobs, manifests, parts, trash."""
