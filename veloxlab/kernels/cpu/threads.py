"""A few threads that share the work of a loop with the calling thread, and wait without spinning."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise

from veloxlab.runtime import threads


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads() - 1), thread_name_prefix="veloxlab-kernels")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has no threads


def shared(loop: Callable[[int, int], object], pieces: int, count: int) -> None:
    """Call ``loop(first, last)`` for all ``pieces`` in ``count`` parts. Parts that no thread has begun run here."""
    own, *others = pairwise(pieces * i // count for i in range(count + 1))
    waiting: list[tuple[Future[object] | None, tuple[int, int]]] = []
    for part in others:
        try:
            waiting.append((_pool().submit(loop, *part), part))
        except RuntimeError:  # the interpreter ends, and threads start no more work
            waiting.append((None, part))
    loop(*own)
    for future, part in waiting:
        if future is None or future.cancel():
            loop(*part)
        else:
            future.result()
