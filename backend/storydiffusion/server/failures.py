"""Every failure that crosses the wire: a kind for programs, a sentence and a remedy for people."""

from __future__ import annotations

import errno
import re
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from storydiffusion.errors import OutOfMemoryError, StoryDiffusionError

Kind = Literal[
    "story",  # a mistake in the story or its script
    "plan",  # settings that contradict each other
    "image",  # a picture or mask that cannot be used
    "film",  # frames that cannot be one, or a format that cannot hold it
    "model",  # a model that is missing, damaged or of the wrong kind
    "out_of_memory",  # the remedy says what would fit
    "disk_full",
    "cancelled",
    "request",  # JSON, multipart, a header or a parameter that is not as the OpenAPI description says
    "unauthorized",  # no token, or another one
    "forbidden",  # a web page, or a Host this server does not answer to
    "not_found",
    "method",
    "media_type",
    "too_large",
    "conflict",  # the job is in another state, or its Idempotency-Key belongs to another request
    "expired",  # the result was there and was given up
    "busy",  # the queue is full
    "error",
    "internal",  # a mistake in this program
]


class Failure(BaseModel):
    """What went wrong: `kind` for a program, `sentence` for the artist, `remedy` for what to do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    sentence: str = Field(min_length=1)
    remedy: str = ""


class Refused(HTTPException):
    """A request that is answered with a failure instead of what it asked for."""

    def __init__(self, status: int, kind: Kind, sentence: str, remedy: str = "") -> None:
        super().__init__(status, sentence)
        self.failure = Failure(kind=kind, sentence=sentence, remedy=remedy)


def failure_of(error: BaseException) -> Failure:
    """An exception as a failure; one that is not meant for people keeps its words to the log."""
    if isinstance(error, Refused):
        return error.failure
    if isinstance(error, StoryDiffusionError):
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return _disk_full()
        kind = error.kind if error.kind in get_args(Kind) else "error"
        return Failure.model_validate(
            {"kind": kind, "sentence": _without_folders(error.sentence), "remedy": _without_folders(error.remedy)}
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _disk_full()
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return failure_of(
            OutOfMemoryError(
                "The machine has no memory left for this.", "Close other programs, or choose a smaller size or model."
            )
        )
    return Failure(
        kind="internal",
        sentence=f"The backend made a mistake ({type(error).__name__}).",
        remedy="Try again; if it happens again, send the backend's log with a report.",
    )


#: an absolute path of any system; its last name is kept
_PATH = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?[\\/](?:[^\s\\/:;,“”'\"]+[\\/])+([^\s\\/:;,“”'\"]+)")


def _without_folders(text: str) -> str:
    """A client learns the name of a file that is wrong, not where this machine keeps it."""
    return _PATH.sub(r"\1", text)


def _disk_full() -> Failure:
    return Failure(kind="disk_full", sentence="The disk is full.", remedy="Make room on it and try again.")
