"""Names the calls of this process for NVIDIA's profilers, where the package `nvtx` is (the extra `profile`).

Ranges are of the host: a call on a GPU ends when its kernels are queued. Without the package, or while no profiler
listens, a range costs well below a microsecond.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


@functools.cache
def _domain() -> Any:
    """The package's domain of ours, None without the package."""
    try:
        package = importlib.import_module("nvtx")
    except ImportError:
        return None
    return package.get_domain("moe_efa")


@functools.cache
def _attributes(name: str) -> Any:
    return _domain().get_event_attributes(message=name)


@contextlib.contextmanager
def annotate(name: str) -> Iterator[None]:
    """A range of this thread, for what is done within."""
    domain = _domain()
    if domain is None:
        yield
        return
    domain.push_range(_attributes(name))
    try:
        yield
    finally:
        domain.pop_range()


def annotated(name: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Decorates a function with a range; "of gradients" is added for a call with ``gradient=True``."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if _domain() is None:
                return function(*args, **kwargs)
            with annotate(f"{name} of gradients" if kwargs.get("gradient") else name):
                return function(*args, **kwargs)

        return call

    return decorate
