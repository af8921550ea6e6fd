"""What jobs tell: one log for all of them, written by the worker, read by any number of clients.

A client that comes late or reads slowly gets everything that still counts: what is superseded (a step by
the next, a preview by the next of its panel, a position by a newer one) is replaced in the log, the rest
stays until its job is forgotten. So the log is bounded by the jobs there are, and nobody can fall behind.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Hashable

from storydiffusion.server.protocol import FINAL, Event, Position, Preview, Step

#: seconds between comments on a quiet stream, by which both ends notice that the other is gone
HEARTBEAT = 10.0


class Events:
    """The log. Ids look like `3f9a2c1b-17`: this process, and how many events it had told."""

    def __init__(self) -> None:
        self.process = secrets.token_hex(4)
        self._count = 0
        self._log: dict[Hashable, tuple[int, Event]] = {}  # in the order of its numbers
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], None]] = set()
        self._closed = False

    def publish(self, event: Event) -> None:
        """Callable from any thread."""
        with self._lock:
            self._count += 1
            key = _key(event, self._count)
            self._log.pop(key, None)
            self._log[key] = (self._count, event)
        self._wake()

    def since(self, number: int, job: str | None = None) -> list[tuple[int, Event]]:
        """The events after `number` that still count, of one job or of all, oldest first."""
        found = []
        with self._lock:
            for at, event in reversed(self._log.values()):
                if at <= number:
                    break
                if job is None or event.job == job:
                    found.append((at, event))
        return found[::-1]

    def forget(self, job: str) -> None:
        with self._lock:
            for key in [key for key, (_, event) in self._log.items() if event.job == job]:
                del self._log[key]
        self._wake()

    def close(self) -> None:
        """Ends every stream."""
        self._closed = True
        self._wake()

    def number_of(self, event_id: str | None) -> int:
        """What a client has seen, by its Last-Event-ID; 0 if that is none of this process's."""
        match = re.fullmatch(rf"{self.process}-([0-9]{{1,15}})", event_id or "", re.ASCII)
        return int(match[1]) if match else 0

    async def stream(
        self, seen: int, job: str | None, over: Callable[[], bool], heartbeat: float = HEARTBEAT
    ) -> AsyncIterator[bytes]:
        """Server-sent events after number `seen`; ends with a job's last event, or when `over()` and
        nothing more is to be said."""
        loop, wake = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            loop.call_soon_threadsafe(wake.set)

        with self._lock:
            self._listeners.add(listener)
        try:
            yield b"retry: 500\n\n"
            while not self._closed:
                wake.clear()
                ended = over()
                for number, event in self.since(seen, job):
                    seen = number
                    yield self.encode(number, event)
                    if job is not None and isinstance(event, FINAL):
                        return
                if ended:
                    return
                try:
                    await asyncio.wait_for(wake.wait(), heartbeat)
                except asyncio.TimeoutError:
                    yield b": still here\n\n"
        finally:
            with self._lock:
                self._listeners.discard(listener)

    def encode(self, number: int, event: Event) -> bytes:
        """One event in the format of the HTML standard, section 9.2."""
        return f"id: {self.process}-{number}\nevent: {event.event}\ndata: {event.model_dump_json()}\n\n".encode()

    def _wake(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener()
            except RuntimeError:  # its loop has ended; so has its client
                with self._lock:
                    self._listeners.discard(listener)


def _key(event: Event, number: int) -> Hashable:
    """Events of equal keys supersede each other."""
    if isinstance(event, Step):
        return (event.job, "step", event.panels)
    if isinstance(event, Preview):
        return (event.job, "preview", event.panel)
    if isinstance(event, Position):
        return (event.job, "position")
    return number
