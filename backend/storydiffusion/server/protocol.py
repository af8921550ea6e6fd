"""Every JSON object that crosses the wire.

Unknown keys are refused, numbers are not read from text, and every text and list has a limit. A request
names models, panels and pictures by ids and indices; it has no room for a path.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from storydiffusion.server.failures import Failure

#: raised when a client of the last version would misunderstand this one
PROTOCOL = 1

MAX_PANELS = 512
MAX_IMAGES = 1000
MAX_FRAMES = 500

PanelId: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
ModelId: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Text: TypeAlias = Annotated[str, Field(max_length=4000)]
Name: TypeAlias = Annotated[str, Field(max_length=200)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=2**63 - 1)]
#: which of the request's `images` parts, from 0
ImageIndex: TypeAlias = Annotated[int, Field(ge=0, lt=MAX_IMAGES)]
Panels: TypeAlias = Annotated[tuple[PanelId, ...], Field(min_length=1, max_length=MAX_PANELS)]
Strength: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# --------------------------------------------------------------------------- what a client asks for


class WireCharacter(Wire):
    """Someone who stays themselves; `description` is what prompts say for the name."""

    name: Name
    description: Text


class WirePanel(Wire):
    """One picture of the story; `prompt` holds its [Name] tags, `seed` null follows the story's."""

    id: PanelId
    prompt: Text
    caption: Text = ""
    seed: Seed | None = None
    locked: bool = False


class WireStory(Wire):
    """A story, with the names and defaults of a story file. `width` and `height` in pixels."""

    title: Name = ""
    characters: tuple[WireCharacter, ...] = Field((), max_length=64)
    panels: tuple[WirePanel, ...] = Field(min_length=1, max_length=MAX_PANELS)
    style: Annotated[str, Field(max_length=64)] = "none"
    model: ModelId = "storyworld"
    width: int = Field(256, ge=64, le=4096, multiple_of=8)
    height: int = Field(256, ge=64, le=4096, multiple_of=8)
    seed: Seed = 0
    negative_prompt: Text = ""
    guidance_scale: float | None = Field(None, ge=0, le=100)
    steps: int | None = Field(None, ge=1, le=1000)


class PanelPicture(Wire):
    """What a panel looks like now; other panels are made from it. With `mask`, only its white part counts."""

    panel: PanelId
    image: ImageIndex
    mask: ImageIndex | None = None


class Sheet(Wire):
    """A picture of characters that is no panel; `prompt` says what it shows (empty: their descriptions)."""

    id: PanelId
    characters: tuple[Name, ...] = Field(min_length=1, max_length=16)
    image: ImageIndex
    mask: ImageIndex | None = None
    prompt: Text = ""


class JobBase(Wire):
    """What all jobs say.

    `plan`: how panels attend to each other; 'none' makes each on its own. `window`: panels made jointly.
    `previews`: whether events show the panels while they are made.
    """

    story: WireStory
    plan: Literal["default", "paper", "everywhere", "none"] = "default"
    window: int = Field(4, ge=2, le=16)
    previews: bool = True
    pictures: tuple[PanelPicture, ...] = Field((), max_length=MAX_IMAGES)
    sheets: tuple[Sheet, ...] = Field((), max_length=64)


class Generate(JobBase):
    """Make `panels` (null: all that are not locked): the first `window` jointly, later ones from them."""

    kind: Literal["generate"]
    panels: Panels | None = None


class Extend(JobBase):
    """Make `panels` from `pictures` and `sheets`, each for itself."""

    kind: Literal["extend"]
    panels: Panels


class Regenerate(JobBase):
    """Make `panels` again from what the others look like now.

    `sources` 'before': what `generate` made them from, so that with nothing changed they come out the
    same; 'all': every picture given, also of later panels.
    """

    kind: Literal["regenerate"]
    panels: Panels
    sources: Literal["before", "all"] = "before"


class Refine(JobBase):
    """Change the panel's picture `image`, by `strength`."""

    kind: Literal["refine"]
    panel: PanelId
    image: ImageIndex
    strength: Strength = 0.6


class Inpaint(JobBase):
    """Change the panel's picture `image` where `mask` is white; outside it stays to the bit."""

    kind: Literal["inpaint"]
    panel: PanelId
    image: ImageIndex
    mask: ImageIndex
    strength: Strength = 1.0


class Keyframe(Wire):
    """Frame `frame` (the first is 0) of a stretch is this picture, to the pixel."""

    frame: int = Field(ge=0, lt=MAX_FRAMES)
    image: ImageIndex


class Transition(Wire):
    """Make the frames between pictures. `id` names the stretch and seeds its noise; of `story` the model, the
    size, the seed and the steps count. `keyframes` hold the first and the last frame, and any between."""

    kind: Literal["transition"]
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,130}$")]
    story: WireStory
    frames: int = Field(16, ge=2, le=MAX_FRAMES)
    keyframes: tuple[Keyframe, ...] = Field(min_length=2, max_length=MAX_IMAGES)
    prompt: Text = ""
    easing: Literal["linear", "smooth"] = "smooth"
    previews: bool = True


class FilmFrame(Wire):
    """A picture of a film, shown for `count` frames."""

    image: ImageIndex
    count: int = Field(1, ge=1, le=10_000)


class FilmCaption(Wire):
    """A line that a player can show from frame `start` on, for `length` frames."""

    text: Text
    start: int = Field(ge=0, le=1_000_000)
    length: int = Field(ge=1, le=1_000_000)


class Film(Wire):
    """Make one file of finished frames; no model is needed. `rate`: frames a second."""

    kind: Literal["film"]
    format: Literal[".mp4", ".webm", ".gif", ".apng"] = ".mp4"
    rate: float = Field(gt=0, le=240)
    frames: tuple[FilmFrame, ...] = Field(min_length=1, max_length=MAX_IMAGES)
    captions: tuple[FilmCaption, ...] = Field((), max_length=MAX_PANELS)


PanelsRequest: TypeAlias = Generate | Extend | Regenerate | Refine | Inpaint
JobRequest: TypeAlias = Annotated[PanelsRequest | Transition | Film, Field(discriminator="kind")]
JOB_REQUEST: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)

JobKind = Literal["generate", "extend", "regenerate", "refine", "inpaint", "transition", "film"]
State = Literal["queued", "running", "finished", "failed", "cancelled"]


class Move(Wire):
    """Where in the queue a job goes; 0 is next to run, past the end is last."""

    position: int = Field(ge=0, le=10_000)


# --------------------------------------------------------------------------- what the server answers


class JobView(Wire):
    """A job as it is now. `panels`: the ids of what it makes. `position` counts the jobs before it in the queue,
    null unless queued. `result` says whether its pictures can be fetched."""

    id: str
    kind: JobKind
    state: State
    panels: tuple[str, ...]
    position: int | None = None
    failure: Failure | None = None
    result: bool = False


class JobList(Wire):
    """Every job that is remembered: the running one, the queue in its order, then the others."""

    jobs: tuple[JobView, ...]


class PlacementView(Wire):
    """How a model would lie in memory, and how many panels of its own size at a time."""

    device: Literal["cuda", "mps", "cpu"]
    dtype: str
    offload: Literal["none", "model", "sequential"]
    panels: int


class ModelView(Wire):
    """A model by name. `fits` is null where its size is not known; `failure` says why it cannot be used
    now, `placement` how it would run. Of a model that is not installed both are an estimate. `longest`: no
    side of a picture should be longer (0: only the area counts)."""

    id: str
    title: str
    family: str
    width: int
    height: int
    longest: int = 0
    steps: int
    guidance_scale: float
    licence: str
    notes: str
    installed: bool
    loaded: bool
    fits: bool | None
    placement: PlacementView | None = None
    failure: Failure | None = None


class ModelList(Wire):
    """The models this server offers, in the catalogue's order."""

    models: tuple[ModelView, ...]


class Health(Wire):
    """Alive. `device` and `model` are null until known: the libraries take seconds to load."""

    status: Literal["ok"]
    version: str
    protocol: int
    device: Literal["cuda", "mps", "cpu"] | None
    model: str | None
    running: str | None
    queued: int


class MadePanel(Wire):
    """A panel of a result; `file` names its PNG in the ZIP. Of a stretch, `panel` is its id and `frame` says
    which one this is; those that were given are not sent back. A film is one file, `panel` is 'film'."""

    panel: str
    frame: int | None = None
    file: str
    seed: int
    width: int
    height: int
    prompt: str


class ResultIndex(Wire):
    """`result.json` in the ZIP of a result."""

    job: str
    kind: JobKind
    model: str
    panels: tuple[MadePanel, ...]
    unknown_words: tuple[str, ...]
    seconds: float


# --------------------------------------------------------------------------- what the server tells


class Told(Wire):
    job: str


class Queued(Told):
    event: Literal["queued"] = "queued"
    kind: JobKind
    panels: tuple[str, ...]


class Position(Told):
    """Jobs before this one in the queue; a newer position replaces an older one."""

    event: Literal["position"] = "position"
    position: int


class Loading(Told):
    """The model is being read, which can take minutes."""

    event: Literal["loading"] = "loading"
    model: str


class Started(Told):
    """`unknown_words`: words of the prompts that the model never saw."""

    event: Literal["started"] = "started"
    unknown_words: tuple[str, ...] = ()


class Step(Told):
    """Step `step` of `steps` of these panels, which are made together. A newer step replaces an older one."""

    event: Literal["step"] = "step"
    panels: tuple[str, ...]
    step: int
    steps: int


class Preview(Told):
    """A panel as it stands, a small PNG in base64. A newer preview replaces an older one."""

    event: Literal["preview"] = "preview"
    panel: str
    png: str


class PanelMade(Told):
    event: Literal["panel"] = "panel"
    panel: str


class Finished(Told):
    """The result can be fetched; `bytes` is its size."""

    event: Literal["finished"] = "finished"
    panels: tuple[str, ...]
    seconds: float
    bytes: int


class Failed(Told):
    event: Literal["failed"] = "failed"
    failure: Failure


class WasCancelled(Told):
    event: Literal["cancelled"] = "cancelled"


class Expired(Told):
    """The result of a finished job was given up; the job can be submitted again."""

    event: Literal["expired"] = "expired"


Event: TypeAlias = Annotated[
    Queued | Position | Loading | Started | Step | Preview | PanelMade | Finished | Failed | WasCancelled | Expired,
    Field(discriminator="event"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
FINAL = (Finished, Failed, WasCancelled)


def components() -> dict[str, Any]:
    """The JSON schemas of requests, events and the result's index, by name, for the OpenAPI description."""
    found: dict[str, Any] = {}
    for name, adapter in (
        ("JobRequest", JOB_REQUEST),
        ("Event", EVENT),
        ("ResultIndex", TypeAdapter(ResultIndex)),
    ):
        schema = adapter.json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[name] = schema
    return found
