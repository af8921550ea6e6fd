"""Ending with the process that started this one, also when that is killed.

The plugin cannot be trusted to say goodbye: Krita may crash. Two signs, each enough:

- the end of standard input, where that is a pipe: the parent's end of it closes with the parent;
- the end of the parent itself, from the kernel: a pidfd on Linux, kqueue on macOS, a handle on Windows.

Not used: Linux's PR_SET_PDEATHSIG, which fires when the *thread* that forked ends, not its process.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 0.5


def follow(pid: int, ended: Callable[[], None], stdin: bool = True) -> None:
    """Calls `ended`, from a thread of its own, when process `pid` or standard input (a pipe) ends."""
    once = threading.Lock()

    def first(wait: Callable[[], None]) -> None:
        wait()
        if once.acquire(blocking=False):
            ended()

    waits: list[Callable[[], None]] = [lambda: wait_for_process(pid)]
    if stdin and is_pipe(0):
        waits.append(wait_for_end_of_input)
    for wait in waits:
        threading.Thread(target=first, args=(wait,), name="parent", daemon=True).start()


def is_pipe(descriptor: int) -> bool:
    """Whether a descriptor is a pipe or socket, which ends when its other end does."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def wait_for_end_of_input() -> None:
    try:
        while os.read(0, 4096):
            pass
    except OSError:  # a pipe that broke has ended too
        pass


def wait_for_process(pid: int) -> None:
    """Returns when process `pid` has ended, or if there is none."""
    if sys.platform == "win32":
        _wait_windows(pid)
    elif hasattr(os, "pidfd_open") and sys.platform == "linux":
        _wait_pidfd(pid)
    elif hasattr(select, "kqueue"):
        _wait_kqueue(pid)
    else:
        _wait_polling(pid)


def _wait_pidfd(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError:  # kernels before 5.3, or a sandbox without the call
        _wait_polling(pid)
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
    finally:
        os.close(descriptor)


def _wait_kqueue(pid: int) -> None:
    api: Any = select  # only there on macOS and BSD
    queue = api.kqueue()
    try:
        watch = api.kevent(pid, api.KQ_FILTER_PROC, api.KQ_EV_ADD | api.KQ_EV_ONESHOT, api.KQ_NOTE_EXIT)
        queue.control([watch], 1, None)
    except ProcessLookupError:
        return
    except OSError:
        _wait_polling(pid)
    finally:
        queue.close()


def _wait_windows(pid: int) -> None:
    import ctypes

    api: Any = ctypes
    kernel = api.WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.restype = api.c_void_p
    kernel.WaitForSingleObject.argtypes = (api.c_void_p, api.c_uint32)
    synchronize, infinite, invalid_parameter = 0x00100000, 0xFFFFFFFF, 87
    handle = kernel.OpenProcess(synchronize, False, pid)
    if not handle:
        if api.get_last_error() != invalid_parameter:  # it is there, but not ours to wait for
            _wait_polling(pid)
        return
    kernel.WaitForSingleObject(handle, infinite)
    kernel.CloseHandle.argtypes = (api.c_void_p,)
    kernel.CloseHandle(handle)


def _wait_polling(pid: int) -> None:
    """Until this process is another's child, or `pid` is gone."""
    import psutil

    child = os.getppid() == pid
    while psutil.pid_exists(pid) and (not child or os.getppid() == pid):
        time.sleep(POLL_SECONDS)
