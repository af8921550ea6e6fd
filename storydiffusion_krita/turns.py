"""Slow things one step at a time, so that painting goes on between them. No Qt, no Krita."""

from __future__ import annotations

from collections.abc import Callable, Generator

Steps = Generator[None, None, None]


def in_turns(
    defer: Callable[[Callable[[], None]], None],
    steps: Steps,
    wanted: Callable[[], bool],
    failed: Callable[[], None],
) -> None:
    """Runs one step a turn of the event loop.

    Args:
        defer: calls something in a later turn.
        steps: the work; closed where it stops early, so that it can put back what it has changed.
        wanted: whether it goes on; asked before every step.
        failed: told of an exception, which is raised all the same.
    """

    def turn() -> None:
        if not wanted():
            steps.close()
            return
        try:
            next(steps)
        except StopIteration:
            return
        except Exception:
            failed()
            raise
        defer(turn)

    defer(turn)
