"""The doing daemon on every node: model copies, engines, readings."""
