"""The orders that have not ended, and the backend that works on them.

A `JobDesk` keeps every order until it ends. When the backend goes and comes back, the same orders are
submitted again under the same keys: a backend that still has them goes on, a new one runs them once.
Network, scaling and PNG happen in threads; what is told arrives through `post`, on the caller's thread.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .client import Client, Event, Failure, Made, Unreachable
from .orders import Order
from .texts import tr

P = TypeVar("P")
RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class Told:
    """What became of an order: `kind` is an event of the protocol, or 'sent', 'results'.

    `results` are (panel, picture, seed); `preview` a picture.
    """

    key: str
    kind: str
    data: dict[str, Any]
    results: Sequence[tuple[str, Any, int]] = ()
    preview: Any = None
    failure: Failure | None = None


class Desk(Protocol):
    """What a controller needs of whoever runs orders."""

    def submit(self, order: Order[Any], tell: Callable[[Told], None]) -> None: ...
    def cancel(self, key: str) -> None: ...


class Server(Protocol):
    """What a desk needs of a client."""

    def submit(self, request: dict[str, Any], images: Sequence[bytes], key: str) -> str: ...
    def cancel(self, job: str) -> None: ...
    def forget(self, job: str) -> None: ...
    def result(self, job: str) -> list[Made]: ...


class Codec(Protocol):
    """Pictures to bytes and back, called from worker threads."""

    def encode(self, picture: Any, size: tuple[int, int] | None) -> bytes: ...
    def decode(self, data: bytes) -> Any: ...
    def inside(self, base: Any, made: Any, mask: Any) -> Any: ...


@dataclass
class _Open:
    order: Order[Any]
    tell: Callable[[Told], None]
    images: list[bytes] | None = None
    job: str = ""
    cancelled: bool = False
    fetching: bool = False


class JobDesk:
    """All methods are called on one thread, the one that `post` brings things back to."""

    def __init__(
        self,
        codec: Codec,
        post: Callable[[Callable[[], None]], None],
        run: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._codec, self._post = codec, post
        self._run = run or Worker().run
        self._open: dict[str, _Open] = {}
        self._client: Server | None = None
        self._early: list[Event] = []
        self.lost: Callable[[], None] = lambda: None

    @property
    def outstanding(self) -> int:
        return len(self._open)

    def connect(self, client: Server | None) -> None:
        """Another backend, or None while there is none: orders wait, and are sent to the next one."""
        self._client, self._early = client, []
        for one in self._open.values():
            one.job, one.fetching = "", False
            if client is None:
                one.tell(Told(one.order.key, "waiting", {}))
            else:
                self._send(one)

    def submit(self, order: Order[Any], tell: Callable[[Told], None]) -> None:
        one = self._open[order.key] = _Open(order, tell)
        if self._client is not None:
            self._send(one)
        else:
            tell(Told(order.key, "waiting", {}))

    def cancel(self, key: str) -> None:
        """The order ends at once for whoever asked; the backend hears of it as soon as it can."""
        one = self._open.pop(key, None)
        if one is None:
            return
        one.cancelled = True
        client, job = self._client, one.job
        if client is not None and job:
            self._run(lambda: _quietly(lambda: client.cancel(job)))
        one.tell(Told(key, "cancelled", {}))

    # ----------------------------------------------------------------------- sending

    def _send(self, one: _Open) -> None:
        client = self._client
        assert client is not None

        def work() -> None:
            if one.cancelled:
                return
            try:
                if one.images is None:
                    one.images = [
                        image if isinstance(image, bytes) else self._codec.encode(image, size)
                        for image, size in one.order.images
                    ]
                job = client.submit(one.order.request, one.images, one.order.key)
            except Failure as failure:
                self._post(lambda failure=failure: self._not_sent(client, one, failure))  # type: ignore[misc]
            except Exception as error:
                wrong = Failure("error", str(error) or type(error).__name__)
                self._post(lambda: self._not_sent(client, one, wrong))
            else:
                self._post(lambda: self._sent(client, one, job))

        self._run(work)

    def _sent(self, client: Server, one: _Open, job: str) -> None:
        if client is not self._client:
            return
        if one.cancelled:
            self._run(lambda: _quietly(lambda: client.cancel(job)))
            return
        one.job = job
        one.tell(Told(one.order.key, "sent", {}))
        early, self._early = self._early, []
        for event in early:
            self.told(event)

    def _not_sent(self, client: Server, one: _Open, failure: Failure) -> None:
        if client is not self._client or one.cancelled:
            return
        if isinstance(failure, Unreachable):
            self.lost()  # whoever watches the backend will connect again; the order waits
        else:
            self._end(one, Told(one.order.key, "failed", {}, failure=failure))

    # ----------------------------------------------------------------------- hearing

    def told(self, event: Event) -> None:
        """An event of the backend's stream."""
        job = event.data.get("job")
        one = next((one for one in self._open.values() if one.job == job), None)
        if one is None:
            if any(not other.job for other in self._open.values()):
                self._early = [*self._early[-500:], event]  # of a job whose id is still on its way
            return
        key, kind = one.order.key, event.kind
        if kind == "finished":
            self._fetch(one)
        elif kind == "failed":
            told = event.data.get("failure") or {}
            failure = Failure(told.get("kind", "error"), told.get("sentence", ""), told.get("remedy", ""))
            self._end(one, Told(key, "failed", event.data, failure=failure))
        elif kind == "cancelled":
            self._end(one, Told(key, "cancelled", event.data))
        elif kind == "preview":
            self._decode_preview(one, event)
        else:
            one.tell(Told(key, kind, event.data))

    def _decode_preview(self, one: _Open, event: Event) -> None:
        def work() -> None:
            try:
                picture = self._codec.decode(base64.b64decode(event.data.get("png", "")))
            except ValueError:
                return
            told = Told(one.order.key, "preview", {"panel": event.data.get("panel", "")}, preview=picture)
            self._post(lambda: None if one.order.key not in self._open else one.tell(told))

        self._run(work)

    def _fetch(self, one: _Open) -> None:
        client, job = self._client, one.job
        if client is None or one.fetching:
            return
        one.fetching = True

        def work() -> None:
            try:
                made = [(m.panel, self._picture(one.order, m), m.seed) for m in client.result(job)]
            except Failure as failure:
                self._post(lambda failure=failure: self._not_fetched(client, one, failure))  # type: ignore[misc]
            except Exception:  # a picture that cannot be read, or one that is not what was asked for
                wrong = Failure("result", tr("The result arrived damaged."), tr("Make it again."))
                self._post(lambda: self._not_fetched(client, one, wrong))
            else:
                self._post(lambda: self._end(one, Told(one.order.key, "results", {}, results=made)))
                _quietly(lambda: client.forget(job))

        self._run(work)

    def _picture(self, order: Order[Any], made: Made) -> Any:
        """What goes into the document: of an inpainted area nothing but the area. A film is a file as it is."""
        if order.kind == "film":
            return made.png
        picture = self._codec.decode(made.png)
        if order.kind != "inpaint":
            return picture
        (base, _), (mask, _) = (order.images[order.request[name]] for name in ("image", "mask"))
        return self._codec.inside(base, picture, mask)

    def _not_fetched(self, client: Server, one: _Open, failure: Failure) -> None:
        if client is not self._client:
            return
        one.fetching = False
        if isinstance(failure, Unreachable):
            self.lost()
        else:
            self._end(one, Told(one.order.key, "failed", {}, failure=failure))

    def _end(self, one: _Open, told: Told) -> None:
        if self._open.pop(one.order.key, None) is not None:
            one.tell(told)


def _quietly(call: Callable[[], None]) -> None:
    with contextlib.suppress(Failure):  # it has ended, or its backend has
        call()


class Worker:
    """One thread, one thing after another: orders reach the backend in the order they were given."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="storydiffusion jobs", daemon=True).start()

    def run(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)

    def _work(self) -> None:
        while True:
            try:
                self._tasks.get()()
            except Exception:  # the thread outlives a mistake in one task; the next order must not wait for ever
                traceback.print_exc()


class Listener:
    """Follows a backend's events, through broken connections, until it is stopped."""

    def __init__(
        self,
        client: Client,
        post: Callable[[Callable[[], None]], None],
        heard: Callable[[Event], None],
        broken: Callable[[Failure], None],
    ) -> None:
        self._client, self._post, self._heard, self._broken = client, post, heard, broken
        self._stop = threading.Event()
        threading.Thread(target=self._work, name="storydiffusion events", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _work(self) -> None:
        last_id = ""
        while not self._stop.is_set():
            try:
                for event in self._client.events(last_id):
                    if self._stop.is_set():
                        return
                    last_id = event.id
                    self._post(lambda event=event: self._tell(event))  # type: ignore[misc]
                # only a server that ends closes its stream, and the next one does not know our jobs
                self._post(lambda: self._tell_broken(Unreachable()))
            except Failure as failure:
                self._post(lambda failure=failure: self._tell_broken(failure))  # type: ignore[misc]
            self._stop.wait(RETRY_SECONDS)

    def _tell(self, event: Event) -> None:
        if not self._stop.is_set():
            self._heard(event)

    def _tell_broken(self, failure: Failure) -> None:
        if not self._stop.is_set():
            self._broken(failure)
