"""The queue, its one worker, and what becomes of jobs.

Kept here: a job ends exactly once, as finished, failed or cancelled, and says so; a resubmitted job (same
Idempotency-Key, same content) is the same job; what is held is bounded, and what is given up is told.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from storydiffusion.errors import Cancelled
from storydiffusion.server.events import Events
from storydiffusion.server.failures import Failure, Refused, failure_of
from storydiffusion.server.images import Pixels, encode_png, pack
from storydiffusion.server.protocol import (
    Expired,
    Failed,
    Finished,
    JobKind,
    JobView,
    Loading,
    MadePanel,
    PanelMade,
    Position,
    Preview,
    Queued,
    ResultIndex,
    Started,
    State,
    Step,
    WasCancelled,
)
from storydiffusion.server.work import AnyWork

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What may be held.

    Attributes:
        queued: jobs that wait.
        queued_bytes: of their pixels.
        result_bytes: of finished results; above it, fetched ones go first, then the oldest.
        result_seconds: how long a result waits to be fetched.
        remembered: jobs that have ended.
    """

    queued: int = 256
    queued_bytes: int = 2 * 1024**3
    result_bytes: int = 512 * 1024**2
    result_seconds: float = 3600.0
    remembered: int = 1000


@dataclass
class Job:
    id: str
    kind: JobKind
    panels: tuple[str, ...]
    fingerprint: bytes
    key: str | None
    work: AnyWork | None
    state: State = "queued"
    stop: threading.Event = field(default_factory=threading.Event)
    failure: Failure | None = None
    result: bytes | None = None
    fetched: bool = False
    ended: float = 0.0


class Report:
    """What a running job tells; handed to whoever runs it."""

    def __init__(self, job: str, events: Events) -> None:
        self.job, self.events = job, events
        self.unknown_words: tuple[str, ...] = ()

    def loading(self, model: str) -> None:
        self.events.publish(Loading(job=self.job, model=model))

    def started(self, unknown_words: Sequence[str]) -> None:
        self.unknown_words = tuple(unknown_words)
        self.events.publish(Started(job=self.job, unknown_words=self.unknown_words))

    def step(self, panels: Sequence[str], step: int, steps: int) -> None:
        self.events.publish(Step(job=self.job, panels=tuple(panels), step=step, steps=steps))

    def preview(self, panel: str, png: str) -> None:
        self.events.publish(Preview(job=self.job, panel=panel, png=png))

    def panel(self, panel: str) -> None:
        self.events.publish(PanelMade(job=self.job, panel=panel))


#: Runs a job (one of `work.AnyWork`): its pictures in the order of its outputs. Asks the last argument often;
#: True means stop, by raising `Cancelled`.
Run = Callable[[Any, Report, Callable[[], bool]], Sequence[Pixels | bytes]]


class Jobs:
    """The queue. Every method may be called from any thread."""

    def __init__(self, run: Run, limits: Limits = Limits(), clock: Callable[[], float] = time.monotonic) -> None:
        self.events = Events()
        self._run, self._limits, self._clock = run, limits, clock
        self._jobs: dict[str, Job] = {}
        self._keys: dict[str, Job] = {}
        self._queue: list[Job] = []
        self._running: Job | None = None
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        self._worker: threading.Thread | None = None

    def start(self) -> None:
        self._worker = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Cancels everything and ends the streams; the worker stops at its next question."""
        with self._changed:
            self._closed = True
            for job in [*self._queue, *([self._running] if self._running else [])]:
                self._cancel(job)
            self._changed.notify_all()
        self.events.close()

    def join(self, seconds: float) -> None:
        """Waits for the worker of a closed queue, which may be within a step."""
        if self._worker is not None:
            self._worker.join(seconds)

    # ----------------------------------------------------------------------- what clients ask for

    def resubmitted(self, key: str | None, fingerprint: bytes) -> Job | None:
        """The job that this key already stands for.

        Raises:
            Refused: it stands for another request.
        """
        with self._changed:
            job = self._keys.get(key or "")
            if job is not None and job.fingerprint != fingerprint:
                raise Refused(
                    409,
                    "conflict",
                    "This Idempotency-Key was used for another request.",
                    "Use a new key for every new job.",
                )
            return job

    def submit(self, work: AnyWork, key: str | None, fingerprint: bytes) -> tuple[Job, bool]:
        """Queues a job; the job, and whether it is a new one.

        Raises:
            Refused: the queue is full, or the key belongs to another request.
        """
        with self._changed:
            self._sweep()
            if same := self.resubmitted(key, fingerprint):
                return same, False
            waiting = sum(job.work.held_bytes for job in self._queue if job.work)
            if (
                self._closed
                or len(self._queue) >= self._limits.queued
                or waiting + work.held_bytes > self._limits.queued_bytes
            ):
                raise Refused(
                    429, "busy", f"{len(self._queue)} jobs are waiting already.", "Wait for some, or cancel them."
                )
            job = Job(secrets.token_hex(16), work.kind, work.panels, fingerprint, key, work)
            self._jobs[job.id] = job
            if key is not None:
                self._keys[key] = job
            self._queue.append(job)
            self.events.publish(Queued(job=job.id, kind=job.kind, panels=job.panels))
            self.events.publish(Position(job=job.id, position=len(self._queue) - 1))
            self._changed.notify_all()
            return job, True

    def get(self, job_id: str) -> Job:
        """Raises Refused where there is no such job."""
        with self._changed:
            self._sweep()
            if job_id not in self._jobs:
                raise Refused(404, "not_found", "There is no such job.", "Submit it again.")
            return self._jobs[job_id]

    def view(self, job: Job) -> JobView:
        with self._changed:
            position = self._queue.index(job) if job in self._queue else None
            return JobView(
                id=job.id,
                kind=job.kind,
                state=job.state,
                panels=job.panels,
                position=position,
                failure=job.failure,
                result=job.result is not None,
            )

    def list(self) -> list[JobView]:
        with self._changed:
            self._sweep()
            first = [*([self._running] if self._running else []), *self._queue]
            others = [job for job in self._jobs.values() if job not in first]
            return [self.view(job) for job in [*first, *others]]

    def running(self) -> str | None:
        running = self._running
        return running.id if running else None

    def waiting(self) -> int:
        return len(self._queue)

    def cancel(self, job_id: str) -> Job:
        """A queued job is cancelled at once, a running one before its next U-Net call; an ended one stays."""
        with self._changed:
            job = self.get(job_id)
            self._cancel(job)
            return job

    def move(self, job_id: str, position: int) -> Job:
        """Raises Refused where the job is not waiting any more."""
        with self._changed:
            job = self.get(job_id)
            if job.state != "queued":
                raise Refused(409, "conflict", f"The job is {job.state}, not waiting.", "Move one that waits.")
            before = list(self._queue)
            self._queue.remove(job)
            self._queue.insert(position, job)
            self._tell_positions(before)
            return job

    def result(self, job_id: str) -> bytes:
        """Raises Refused where there is none (yet, or any more)."""
        with self._changed:
            job = self.get(job_id)
            if job.state in ("queued", "running"):
                raise Refused(409, "conflict", "The job has not finished.", "Wait for its event 'finished'.")
            if job.state != "finished":
                raise Refused(409, "conflict", "The job did not finish; it made nothing.", "Submit it again.")
            if job.result is None:
                raise Refused(410, "expired", "The result was given up to make room.", "Submit the job again.")
            job.fetched = True
            return job.result

    def forget(self, job_id: str) -> None:
        """Lets go of an ended job, its result and its key.

        Raises:
            Refused: it has not ended.
        """
        with self._changed:
            job = self.get(job_id)
            if job.state in ("queued", "running"):
                raise Refused(409, "conflict", f"The job is {job.state}.", "Cancel it first.")
            self._drop(job)

    # ----------------------------------------------------------------------- the worker

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait(timeout=30)
                    self._sweep()
                if self._closed:
                    return
                before = list(self._queue)
                job = self._queue.pop(0)
                job.state, self._running = "running", job
                self._tell_positions(before)
            self._finish(job, *self._attempt(job))
            del job, before  # nothing of a job is held while the next is waited for

    def _attempt(self, job: Job) -> tuple[bytes | None, BaseException | None, float]:
        """Runs a job: its result or its error, and the seconds it took."""
        assert job.work is not None
        began = time.perf_counter()
        report = Report(job.id, self.events)
        try:
            pictures = self._run(job.work, report, job.stop.is_set)
            seconds = time.perf_counter() - began
            return result_of(job.id, job.work, pictures, report.unknown_words, seconds), None, seconds
        except BaseException as error:  # the worker outlives whatever a job does
            return None, error, time.perf_counter() - began

    def _finish(self, job: Job, result: bytes | None, error: BaseException | None, seconds: float) -> None:
        with self._changed:
            job.work, job.ended, self._running = None, self._clock(), None
            if result is not None:
                job.state, job.result = "finished", result
                self.events.publish(
                    Finished(job=job.id, panels=job.panels, seconds=round(seconds, 3), bytes=len(result))
                )
            elif isinstance(error, Cancelled):
                job.state = "cancelled"
                self.events.publish(WasCancelled(job=job.id))
            else:
                failure = failure_of(error or RuntimeError())
                if failure.kind in ("internal", "error"):
                    log.error("a job failed", exc_info=error)
                job.state, job.failure = "failed", failure
                self.events.publish(Failed(job=job.id, failure=failure))
            self._sweep()

    def _cancel(self, job: Job) -> None:
        job.stop.set()
        if job.state == "queued":
            before = list(self._queue)
            self._queue.remove(job)
            job.state, job.work, job.ended = "cancelled", None, self._clock()
            self.events.publish(WasCancelled(job=job.id))
            self._tell_positions(before)

    def _tell_positions(self, before: Sequence[Job]) -> None:
        """Tells the jobs whose place is not what it was."""
        for position, job in enumerate(self._queue):
            if position >= len(before) or before[position] is not job:
                self.events.publish(Position(job=job.id, position=position))

    def _sweep(self) -> None:
        """Gives up results that are too old or too many, and forgets the oldest of the ended jobs."""
        ended = [job for job in self._jobs.values() if job.state not in ("queued", "running")]
        holding = sorted((job for job in ended if job.result is not None), key=lambda job: (not job.fetched, job.ended))
        held = sum(len(job.result or b"") for job in holding)
        # a result that is larger than the limit can still be fetched until the next one comes
        newest = max(holding, key=lambda job: job.ended, default=None)
        now = self._clock()
        for job in holding:
            too_old = now - job.ended > self._limits.result_seconds
            if too_old or (held > self._limits.result_bytes and job is not newest):
                held -= len(job.result or b"")
                job.result = None
                self.events.publish(Expired(job=job.id))
        for job in sorted(ended, key=lambda job: job.ended)[: max(0, len(ended) - self._limits.remembered)]:
            self._drop(job)

    def _drop(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        if job.key is not None:
            self._keys.pop(job.key, None)
        self.events.forget(job.id)


def result_of(
    job: str, work: AnyWork, pictures: Sequence[Pixels | bytes], unknown: Sequence[str], seconds: float
) -> bytes:
    """The ZIP of a finished job: `result.json` first, then a PNG a panel or a frame, or a film."""
    files = {
        one.file: made if isinstance(made, bytes) else encode_png(made)
        for one, made in zip(work.outputs, pictures, strict=True)
    }
    index = ResultIndex(
        job=job,
        kind=work.kind,
        model=work.model,
        panels=tuple(
            MadePanel(
                panel=one.panel,
                frame=one.frame,
                file=one.file,
                seed=one.seed,
                width=0 if isinstance(made, bytes) else made.shape[1],
                height=0 if isinstance(made, bytes) else made.shape[0],
                prompt=one.prompt,
            )
            for one, made in zip(work.outputs, pictures, strict=True)
        ),
        unknown_words=tuple(unknown),
        seconds=round(seconds, 3),
    )
    return pack({"result.json": index.model_dump_json().encode(), **files})
