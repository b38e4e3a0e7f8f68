"""From the threads that work to the pages that watch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Hub"]

_BEHIND = 256  # events that a page may be behind before it must look again


class Hub:
    """Hands each event to every page that listens; publishing never waits, and may be done in any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[dict[str, Any]]]] = {}
        self._next = 0

    def publish(self, event: dict[str, Any]) -> None:
        """Send an event, as JSON can hold it."""
        with self._lock:
            listeners = list(self._listeners.values())
        for loop, queue in listeners:
            try:
                loop.call_soon_threadsafe(_put, queue, event)
            except RuntimeError:  # the loop has ended
                continue

    @contextmanager
    def listen(self) -> Iterator[asyncio.Queue[dict[str, Any]]]:
        """Yield a queue of the events from now on; call it in the loop that reads it."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._listeners[number] = (asyncio.get_running_loop(), queue)
        try:
            yield queue
        finally:
            with self._lock:
                del self._listeners[number]


def _put(queue: asyncio.Queue[dict[str, Any]], event: dict[str, Any]) -> None:
    if queue.qsize() >= _BEHIND:
        while not queue.empty():
            queue.get_nowait()
        event = {"type": "again"}
    queue.put_nowait(event)
