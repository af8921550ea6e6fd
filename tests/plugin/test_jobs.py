from __future__ import annotations

import threading
from typing import Any

import pytest

from storydiffusion_krita.client import Event, Failure, Made, Unreachable
from storydiffusion_krita.jobs import JobDesk, Told, Worker
from storydiffusion_krita.orders import Order


class Codec:
    def encode(self, picture: Any, size: Any) -> bytes:
        return f"{picture}@{size}".encode()

    def inside(self, base: Any, made: Any, mask: Any) -> Any:
        return f"{made} in {mask} of {base}"

    def decode(self, data: bytes) -> Any:
        if data == b"damaged":
            raise ValueError
        return data.decode()


class Client:
    def __init__(self) -> None:
        self.submitted: list[tuple[str, list[bytes]]] = []
        self.cancelled: list[str] = []
        self.forgotten: list[str] = []
        self.error: Failure | None = None
        self.made = [Made("p1", b"png", 3)]
        self.before_answer: Any = lambda: None

    def submit(self, request: Any, images: Any, key: str) -> str:
        if self.error is not None:
            raise self.error
        self.submitted.append((key, list(images)))
        self.before_answer()
        return f"job-{key}"

    def cancel(self, job: str) -> None:
        self.cancelled.append(job)

    def forget(self, job: str) -> None:
        self.forgotten.append(job)

    def result(self, job: str) -> list[Made]:
        if self.error is not None:
            raise self.error
        return self.made


class Table:
    """A desk whose threads run when a test says so."""

    def __init__(self) -> None:
        self.tasks: list[Any] = []
        self.told: list[Told] = []
        self.lost = 0
        self.desk = JobDesk(Codec(), lambda call: call(), self.tasks.append)
        self.desk.lost = self._lost
        self.client = Client()

    def _lost(self) -> None:
        self.lost += 1

    def work(self) -> None:
        while self.tasks:
            self.tasks.pop(0)()

    def submit(self, key: str = "k", images: Any = (("picture", (8, 8)), (b"jpeg", None))) -> None:
        self.desk.submit(Order(key, "generate", ("p1",), {"kind": "generate"}, images), self.told.append)

    def event(self, kind: str, job: str = "job-k", **data: Any) -> None:
        self.desk.told(Event("1", kind, {"job": job, **data}))

    @property
    def kinds(self) -> list[str]:
        return [one.kind for one in self.told]


@pytest.fixture
def table() -> Table:
    one = Table()
    one.desk.connect(one.client)
    return one


def test_from_order_to_pictures(table: Table) -> None:
    table.submit()
    table.work()
    assert table.client.submitted == [("k", [b"picture@(8, 8)", b"jpeg"])]
    table.event("step", step=1, steps=2, panels=["p1"])
    table.event("finished")
    table.work()
    assert table.kinds == ["sent", "step", "results"]
    assert table.told[-1].results == [("p1", "png", 3)]
    assert table.client.forgotten == ["job-k"]
    assert table.desk.outstanding == 0


def test_of_an_inpainted_area_nothing_but_the_area_arrives(table: Table) -> None:
    images = (("other", (8, 8)), ("own", (8, 8)), ("mask", (8, 8)))
    request = {"kind": "inpaint", "image": 1, "mask": 2}
    table.desk.submit(Order("k", "inpaint", ("p1",), request, images), table.told.append)
    table.work()
    table.event("finished")
    table.work()
    assert table.told[-1].results == [("p1", "png in mask of own", 3)]


def test_events_that_overtake_the_answer_are_not_lost(table: Table) -> None:
    table.client.before_answer = lambda: table.event("step", step=1)
    table.submit()
    table.work()
    assert table.kinds == ["sent", "step"]


def test_events_of_other_clients_jobs_are_nobodys(table: Table) -> None:
    table.submit()
    table.work()
    table.event("failed", job="another", failure={"kind": "error", "sentence": "x"})
    assert table.kinds == ["sent"]


def test_an_order_waits_for_a_backend_and_is_sent_to_the_next_under_its_key(table: Table) -> None:
    table.submit()
    table.work()
    table.desk.connect(None)
    assert table.kinds == ["sent", "waiting"]
    new = Client()
    table.desk.connect(new)
    table.work()
    assert new.submitted == table.client.submitted
    table.event("finished")
    table.event("finished")  # a stream that is read again tells it twice
    table.work()
    assert table.kinds.count("results") == 1


def test_an_order_given_without_a_backend_is_sent_when_there_is_one() -> None:
    table = Table()
    table.submit()
    assert table.kinds == ["waiting"]
    table.desk.connect(table.client)
    table.work()
    assert len(table.client.submitted) == 1


def test_no_answer_is_a_lost_backend_not_a_failed_order(table: Table) -> None:
    table.client.error = Unreachable()
    table.submit()
    table.work()
    assert (table.lost, table.kinds, table.desk.outstanding) == (1, [], 1)


def test_a_refusal_ends_the_order_with_its_words(table: Table) -> None:
    table.client.error = Failure("plan", "Panel p1 is locked.", "Unlock it.")
    table.submit()
    table.work()
    assert table.kinds == ["failed"]
    assert table.told[0].failure is table.client.error
    assert table.desk.outstanding == 0


def test_a_failed_job_says_why(table: Table) -> None:
    table.submit()
    table.work()
    table.event("failed", failure={"kind": "out_of_memory", "sentence": "Too large.", "remedy": "Smaller."})
    failure = table.told[-1].failure
    assert failure is not None
    assert (failure.kind, failure.remedy) == ("out_of_memory", "Smaller.")


def test_cancelling_ends_it_here_at_once_and_there_as_soon_as_its_id_is_known(table: Table) -> None:
    table.submit()
    table.desk.cancel("k")
    assert table.kinds == ["cancelled"]
    table.work()
    assert table.client.submitted == []
    table.submit("late")
    task = table.tasks.pop()
    table.client.before_answer = lambda: table.desk.cancel("late")
    task()
    table.work()
    assert table.client.cancelled == ["job-late"]
    table.event("finished", job="job-late")
    table.work()
    assert "results" not in table.kinds


def test_a_damaged_picture_is_a_failure_not_a_crash(table: Table) -> None:
    table.client.made = [Made("p1", b"damaged", 1)]
    table.submit()
    table.work()
    table.event("finished")
    table.work()
    assert table.kinds[-1] == "failed"


def test_a_result_that_cannot_be_fetched_now_is_fetched_after_reconnecting(table: Table) -> None:
    table.submit()
    table.work()
    table.client.error = Unreachable()
    table.event("finished")
    table.work()
    assert table.lost == 1
    table.client.error = None
    table.desk.connect(table.client)
    table.work()
    table.event("finished")
    table.work()
    assert table.kinds[-1] == "results"


def test_a_mistake_in_one_task_does_not_stop_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    worker, done = Worker(), threading.Event()
    worker.run(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    worker.run(done.set)
    assert done.wait(5)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_preview_after_the_end_is_not_shown(table: Table) -> None:
    table.submit()
    table.work()
    table.event("preview", panel="p1", png="cG5n")
    table.desk.cancel("k")
    table.work()
    assert "preview" not in table.kinds
