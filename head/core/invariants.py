"""`check_invariants(state)`: what must hold after every step; tests and the simulator call it, production does not.

Each rule is a function that returns the broken facts in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from head.core.state import State

Rule = Callable[[State], Iterator[str]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Adds a rule."""
    RULES.append(function)
    return function


def check_invariants(state: State) -> None:
    """Raises AssertionError that names every broken rule."""
    broken = [f"{function.__name__}: {fact}" for function in RULES for fact in function(state)]
    assert not broken, "; ".join(broken[:20])
