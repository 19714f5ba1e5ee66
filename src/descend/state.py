"""The per-parameter state, and how an optimizer knows that nobody has touched it."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any


def _exposing(name: str) -> Callable[..., Any]:
    method = getattr(defaultdict, name)

    def exposing(self: State, *args: Any, **kwargs: Any) -> Any:
        self.exposed = True
        return method(self, *args, **kwargs)

    exposing.__name__, exposing.__doc__ = name, method.__doc__
    return exposing


class Initial(dict[str, Any]):
    """State made before the first step, which rules that count no steps would take for that of a later one."""


class State(defaultdict[Any, Any]):
    """``optimizer.state``: a ``defaultdict(dict)`` that remembers whether it ever let its content out.

    A state tensor that nobody else has seen cannot have been replaced or edited, so the next step need not look at
    it. Once anything was read or written from outside, every step looks at everything again. The optimizer itself
    reads through ``dict``'s own methods, which do not count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exposed = True
        self.owner: Callable[[], Any] = lambda: None

    @classmethod
    def owned_by(cls, optimizer: Any) -> State:
        """An empty state that only ``optimizer`` has seen."""
        state = cls(dict)
        state.exposed = False
        state.owner = weakref.ref(optimizer)
        return state

    def __reduce__(self) -> Any:
        return defaultdict, (dict, {key: copy.copy(value) for key, value in dict.items(self)})

    def __copy__(self) -> Any:
        self.exposed = True
        return defaultdict(dict, dict.items(self))

    copy = __copy__

    __getitem__ = _exposing("__getitem__")
    __setitem__ = _exposing("__setitem__")
    __delitem__ = _exposing("__delitem__")
    __iter__ = _exposing("__iter__")
    __reversed__ = _exposing("__reversed__")
    __or__ = _exposing("__or__")
    __ror__ = _exposing("__ror__")
    __ior__ = _exposing("__ior__")
    clear = _exposing("clear")
    get = _exposing("get")
    items = _exposing("items")
    keys = _exposing("keys")
    pop = _exposing("pop")
    popitem = _exposing("popitem")
    setdefault = _exposing("setdefault")
    update = _exposing("update")
    values = _exposing("values")
