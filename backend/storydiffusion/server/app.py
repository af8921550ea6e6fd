"""The endpoints, and their OpenAPI description.

A job is sent as multipart/form-data: a part `request` (JSON, `JobRequest`) and a part `images` for every
picture, in the order of the indices that `request` names them by. Its events are a stream of server-sent
events; its result is one ZIP, `result.json` and a PNG a panel.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import FastAPI, Header, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from storydiffusion import __version__
from storydiffusion.errors import StoryDiffusionError
from storydiffusion.server import protocol
from storydiffusion.server.engine import Engine
from storydiffusion.server.failures import Failure, Kind, Refused, failure_of
from storydiffusion.server.images import FORMATS
from storydiffusion.server.jobs import Job, Jobs, Limits, Run
from storydiffusion.server.security import LOOPBACK, MAX_BODY, Guard, answer
from storydiffusion.server.work import AnyWork, Part, work_of

log = logging.getLogger(__name__)

MAX_REQUEST = 4 * 1024 * 1024  # bytes of the JSON part
#: requests whose pictures are decoded at a time
DECODERS = 2

JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[A-Za-z0-9._:-]{1,128}$",
        description="A job submitted again with its key is the same job, not another.",
    ),
]
LastEventId = Annotated[
    str | None, Header(alias="Last-Event-ID", description="Of the last event seen; the stream goes on after it.")
]


class Server:
    """What one backend process holds: its engine, its jobs, and the guarded ASGI application.

    Args:
        token: of its clients, at least 256 bits.
        engine: the models.
        run: runs the jobs; the engine itself where None.
        hosts: names clients may call it by.
        limits, max_body: what may be held and sent.
        clock: seconds, by which results expire.
    """

    def __init__(
        self,
        token: str,
        engine: Engine | None = None,
        *,
        run: Run | None = None,
        hosts: Collection[str] = LOOPBACK,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_body: int = MAX_BODY,
    ) -> None:
        self.engine = engine or Engine()
        self.jobs = Jobs(run or self.engine.run, limits or Limits(), clock)
        self.api = _api(self)
        self.app: ASGIApp = Guard(self.api, token, hosts, max_body)

    def start(self) -> None:
        """Starts the worker, and reads the libraries meanwhile: they take seconds."""
        self.jobs.start()
        threading.Thread(target=_read_libraries, name="libraries", daemon=True).start()

    def close(self) -> None:
        self.jobs.close()


def _read_libraries() -> None:
    with contextlib.suppress(Exception):  # whoever needs them will say what is wrong
        import storydiffusion.storyboard  # noqa: F401


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The failures an endpoint can answer, for its description; those of `Guard` come with every one."""
    return {status: {"model": Failure} for status in sorted({400, 401, 403, 413, 415, 421, *statuses})}


def _api(server: Server) -> FastAPI:
    jobs, engine = server.jobs, server.engine

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.start()
        yield
        server.close()

    api = FastAPI(
        title="StoryDiffusion",
        version=__version__,
        summary="The backend process: stories in, panels out.",
        description=__doc__ or "",
        lifespan=lifespan,
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _handle_errors(api)
    decoding: anyio.CapacityLimiter | None = None

    @api.get("/health", responses=_failures())
    async def health() -> protocol.Health:
        """Alive, and doing what."""
        return protocol.Health(
            status="ok",
            version=__version__,
            protocol=protocol.PROTOCOL,
            device=engine.device(),
            model=engine.loaded,
            running=jobs.running(),
            queued=jobs.waiting(),
        )

    @api.get("/models", responses=_failures())
    def models() -> protocol.ModelList:
        """The models, and how each would run on this machine as it is now."""
        return protocol.ModelList(models=tuple(engine.models()))

    @api.post(
        "/jobs",
        status_code=202,
        responses={
            200: {"model": protocol.JobView, "description": "The job that this Idempotency-Key stands for already"},
            **_failures(409, 422, 429),
        },
        openapi_extra={"requestBody": _job_body()},
    )
    async def submit(request: Request, response: Response, idempotency_key: Key = None) -> protocol.JobView:
        """Queue a job."""
        nonlocal decoding
        decoding = decoding or anyio.CapacityLimiter(DECODERS)
        asked, parts = await _read_multipart(request)
        fingerprint = _fingerprint(asked, parts)
        job = jobs.resubmitted(idempotency_key, fingerprint)
        if job is None:
            work = await anyio.to_thread.run_sync(partial(_checked, engine, asked, parts), limiter=decoding)
            job, new = jobs.submit(work, idempotency_key, fingerprint)
        else:
            new = False
        response.status_code = 202 if new else 200
        return jobs.view(job)

    @api.get("/jobs", responses=_failures())
    async def list_jobs() -> protocol.JobList:
        """Every job that is remembered: the running one, the queue in its order, the others."""
        return protocol.JobList(jobs=tuple(jobs.list()))

    @api.get("/jobs/{job_id}", responses=_failures(404, 422))
    async def job(job_id: JobId) -> protocol.JobView:
        """A job as it is now."""
        return jobs.view(jobs.get(job_id))

    @api.delete("/jobs/{job_id}", status_code=204, responses=_failures(404, 409, 422))
    async def forget(job_id: JobId) -> None:
        """Let go of a job that has ended, its result and its key."""
        jobs.forget(job_id)

    @api.post("/jobs/{job_id}/cancel", responses=_failures(404, 422))
    async def cancel(job_id: JobId) -> protocol.JobView:
        """Stop a job: at once if it waits, within one step if it runs. One that has ended stays as it is."""
        return jobs.view(jobs.cancel(job_id))

    @api.post("/jobs/{job_id}/move", responses=_failures(404, 409, 422))
    async def move(job_id: JobId, to: protocol.Move) -> protocol.JobView:
        """Give a waiting job another place in the queue."""
        return jobs.view(jobs.move(job_id, to.position))

    @api.get(
        "/jobs/{job_id}/result",
        response_class=Response,
        responses={
            200: {
                "description": "A ZIP: `result.json` (ResultIndex), then a PNG a panel. It can be fetched again "
                "until the job is forgotten or the result has expired.",
                "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
            },
            **_failures(404, 409, 410, 422),
        },
    )
    async def result(job_id: JobId) -> Response:
        """All pictures of a finished job."""
        return Response(jobs.result(job_id), media_type="application/zip")

    @api.get("/jobs/{job_id}/events", response_class=StreamingResponse, responses=_stream(404, 422))
    async def job_events(job_id: JobId, last_event_id: LastEventId = None) -> StreamingResponse:
        """What a job tells, from its beginning or from Last-Event-ID, to its end."""
        watched = jobs.get(job_id)
        return _streamed(jobs, last_event_id, watched)

    @api.get("/events", response_class=StreamingResponse, responses=_stream(422))
    async def events(last_event_id: LastEventId = None) -> StreamingResponse:
        """What all jobs tell, for as long as one listens."""
        return _streamed(jobs, last_event_id, None)

    api.openapi = partial(_described, api)  # type: ignore[method-assign]
    return api


# --------------------------------------------------------------------------- reading a job


class _InMemory(MultiPartParser):
    """Pictures of an unfinished story are not written to disk, not even for a moment."""

    spool_max_size = 2**62


async def _read_multipart(request: Request) -> tuple[protocol.JobRequest, list[Part]]:
    """The request and its images.

    Raises:
        Refused: it is not the multipart body that the description says.
    """
    if "multipart/form-data" not in request.headers.get("content-type", ""):
        raise Refused(415, "media_type", "A job is sent as multipart/form-data.", "See the API's description.")
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=protocol.MAX_IMAGES + 1,
        max_fields=1,
        max_part_size=MAX_REQUEST,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(
            400, "request", f"The multipart body cannot be read: {error.message}", "Send it again."
        ) from error
    try:
        if unknown := [name for name in form if name not in ("request", "images")]:
            raise Refused(422, "request", f"There is no part “{unknown[0][:40]}”.", "Send `request` and `images`.")
        sent = form.getlist("request")
        if len(sent) != 1:
            raise Refused(422, "request", "A job has one part `request`.", "Send one.")
        text = sent[0] if isinstance(sent[0], str) else await sent[0].read()
        if len(text) > MAX_REQUEST:
            raise Refused(413, "too_large", "The part `request` has more than 4 MiB.", "Shorten the story.")
        parts = [await _part(one, index) for index, one in enumerate(form.getlist("images"))]
    finally:
        await form.close()
    return protocol.JOB_REQUEST.validate_json(text), parts


async def _part(sent: UploadFile | str, index: int) -> Part:
    type_ = sent.content_type or "" if isinstance(sent, UploadFile) else ""
    if isinstance(sent, str) or type_ not in FORMATS:
        raise Refused(
            415, "media_type", f"Image {index} is not a file of type PNG, JPEG or WebP.", f"Send {', '.join(FORMATS)}."
        )
    return Part(type_, await sent.read())


def _fingerprint(request: protocol.JobRequest, parts: list[Part]) -> bytes:
    """What makes two submissions the same: the words and the pictures, not how they were packed."""
    digest = hashlib.blake2b(request.model_dump_json().encode(), digest_size=32)
    for part in parts:
        digest.update(hashlib.blake2b(part.data).digest())
    return digest.digest()


def _checked(engine: Engine, asked: protocol.JobRequest, parts: list[Part]) -> AnyWork:
    if not isinstance(asked, protocol.Film):
        engine.source(asked.story.model)
    return work_of(asked, parts)


# --------------------------------------------------------------------------- answering


def _streamed(jobs: Jobs, last_event_id: str | None, job: Job | None) -> StreamingResponse:
    def over() -> bool:
        return job is not None and job.state not in ("queued", "running")

    stream = jobs.events.stream(jobs.events.number_of(last_event_id), job.id if job else None, over)
    return StreamingResponse(stream, media_type="text/event-stream")


def _handle_errors(api: FastAPI) -> None:
    """Every failure is a `Failure`, whoever finds it."""

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return answer(error)

    @api.exception_handler(StoryDiffusionError)
    async def wrong(_: Request, error: StoryDiffusionError) -> JSONResponse:
        return JSONResponse(failure_of(error).model_dump(), 422)

    @api.exception_handler(RequestValidationError)
    @api.exception_handler(ValidationError)
    async def invalid(_: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        return JSONResponse(_invalid(error).model_dump(), 422)

    @api.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        kinds: dict[int, Kind] = {404: "not_found", 405: "method"}
        failure = Failure(kind=kinds.get(error.status_code, "request"), sentence=str(error.detail))
        return JSONResponse(failure.model_dump(), error.status_code, error.headers)

    @api.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    @api.exception_handler(Exception)
    async def mistake(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return JSONResponse(failure_of(error).model_dump(), 500)


def _invalid(error: RequestValidationError | ValidationError) -> Failure:
    """The first of the mistakes, by where it is; what was sent is not repeated."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))[:200]
    message = str(first["msg"])[:200]
    return Failure(
        kind="request",
        sentence=f"{where}: {message}." if where else f"{message}.",
        remedy="Send what the API's description says.",
    )


# --------------------------------------------------------------------------- the description


def _job_body() -> dict[str, Any]:
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["request"],
                    "additionalProperties": False,
                    "properties": {
                        "request": {"$ref": "#/components/schemas/JobRequest"},
                        "images": {
                            "type": "array",
                            "maxItems": protocol.MAX_IMAGES,
                            "items": {"type": "string", "format": "binary"},
                        },
                    },
                },
                "encoding": {
                    "request": {"contentType": "application/json"},
                    "images": {"contentType": ", ".join(FORMATS)},
                },
            }
        },
    }


def _stream(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "description": "Server-sent events: `id`, `event` (the name of the kind) and `data` (an Event in JSON). "
            "What a newer event supersedes is not repeated to a client that comes later.",
            "content": {"text/event-stream": {"schema": {"type": "string", "x-event": "#/components/schemas/Event"}}},
        },
        **_failures(*statuses),
    }


def _described(api: FastAPI) -> dict[str, Any]:
    if not api.openapi_schema:
        schema = get_openapi(
            title=api.title,
            version=api.version,
            summary=api.summary,
            description=api.description,
            routes=api.routes,
        )
        parts = schema.setdefault("components", {})
        schemas = parts.setdefault("schemas", {})
        schemas |= {name: one for name, one in protocol.components().items() if name not in schemas}
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"token": []}]
        api.openapi_schema = schema
    return api.openapi_schema
