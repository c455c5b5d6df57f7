"""Stop signals (SIGINT, SIGTERM, SIGUSR1, SIGUSR2): the sender, repeats, and the exit code.

Ctrl-C comes from a person. The others come from the machine (a scheduler, a container, its wall
clock), as does the end of `workers.stop_after`: the same command is to be run again. SIGHUP goes
on: a closed terminal ends no sweep, but torchrun sends SIGHUP to ranks that it is about to kill.

The first request lets a checkpoint be written; a second Ctrl-C ends at once. A signal of the
machine's after the first request changes nothing: schedulers repeat SIGTERM, and end a process
that takes too long by SIGKILL.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP
)  # fmt: skip
STOPPED_BY_PERSON, STOPPED_BY_MACHINE = 130, 75  # exit codes; 75 is EX_TEMPFAIL of sysexits.h
# A scheduler that signals the process group as well as its leader (timeout, torchrun) sends twice.
REPEAT_SECONDS = 0.3


class Stopped(KeyboardInterrupt):
    """A request to stop by a signal; its text names the sender, and is the run's recorded reason.

    It can be pickled, so that one process can pass it on to another.
    """

    def __init__(self, number: int) -> None:
        super().__init__(int(number))
        self.number = int(number)
        by_person = number == signal.SIGINT
        self.exit_code = STOPPED_BY_PERSON if by_person else STOPPED_BY_MACHINE

    def __str__(self) -> str:
        if self.number == signal.SIGINT:
            return "interrupted by the user"
        return f"stopped by {signal.Signals(self.number).name}"


class OutOfTime(KeyboardInterrupt):
    """The end of the time that the command may take (`workers.stop_after`)."""

    exit_code = STOPPED_BY_MACHINE

    def __init__(self, stop_after: str) -> None:
        super().__init__(stop_after)

    def __str__(self) -> str:
        return f"stopped after workers.stop_after={self.args[0]}"


class TakenOver(KeyboardInterrupt):
    """The loss of a claim while several processes train under it: they can only be ended."""

    exit_code = STOPPED_BY_MACHINE

    def __str__(self) -> str:
        return "another process has taken over the run"


class Deadline:
    """The end of `workers.stop_after`, counted from here."""

    def __init__(self, stop_after: str, seconds: float) -> None:
        self._stop_after = stop_after
        self._end = time.monotonic() + seconds

    def check(self) -> float:
        """Return the seconds that are left.

        Raises:
            OutOfTime: there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            stop = OutOfTime(self._stop_after)
            for handler in _stop_handlers():  # a signal of the machine's is now the second request
                handler.first = handler.first or stop
            raise stop
        return left


class StopHandler:
    """Raise a request to stop at the first signal, and at a person's second one.

    Args:
        translate: maps a received signal to the request to raise, or to None to ignore it.
    """

    def __init__(self, translate: Callable[[int], KeyboardInterrupt | None] = Stopped) -> None:
        self.first: KeyboardInterrupt | None = None
        self._translate = translate
        self._last = 0.0

    def __call__(self, number: int, frame: object) -> None:
        stop, before = self._translate(number), self._last
        if stop is None or (self.first is not None and exit_code(stop) == STOPPED_BY_MACHINE):
            return
        self._last = time.monotonic()
        if self.first is not None and self._last - before < REPEAT_SECONDS:
            return
        self.first = self.first or stop
        raise stop


class StopSignals:
    """Let the first request to stop end a training after its step, a second Ctrl-C at once."""

    def __init__(self) -> None:
        self.request: KeyboardInterrupt | None = None
        self._handlers: dict[int, StopHandler] = {}

    @property
    def stop_requested(self) -> bool:
        return self.request is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Handle stop signals until the end; signals that the process ignores stay ignored."""
        other = StopHandler()  # in a process of another launcher, which has no handler of ours
        for number in STOP_SIGNALS:
            handler = signal.getsignal(number)
            self._handlers[number] = handler if isinstance(handler, StopHandler) else other
        with _handled_by(self._stop):
            yield

    def _stop(self, number: int, frame: object) -> None:
        try:
            self._handlers[number](number, frame)
        except KeyboardInterrupt as request:
            if self.request is not None:
                raise
            self.request = request


@contextmanager
def stops_raised(*, at_hangup: bool = False) -> Iterator[None]:
    """Raise `Stopped` at every stop signal; one that is ignored (nohup) stays ignored.

    Args:
        at_hangup: whether SIGHUP stops too. Otherwise it is ignored, here and in the processes
            that are started meanwhile.
    """
    with _handled_by(StopHandler(), at_hangup=at_hangup):
        yield


def first_stop() -> KeyboardInterrupt:
    """Return the first request to stop that this process has had."""
    first = (handler.first for handler in _stop_handlers() if handler.first is not None)
    return next(first, KeyboardInterrupt())


def _stop_handlers() -> list[StopHandler]:
    """Return the handlers of ours that are set."""
    handlers = map(signal.getsignal, STOP_SIGNALS)
    return [handler for handler in handlers if isinstance(handler, StopHandler)]


RESUMES = "the same command resumes"


def end_stopped(stop: KeyboardInterrupt, resumes: str = RESUMES) -> int:
    """Print why the process ends, and what resumes it; return its exit code."""
    print(f"finetune: {describe(stop)}; {resumes}", file=sys.stderr)
    return exit_code(stop)


def exit_code(stop: KeyboardInterrupt) -> int:
    if isinstance(stop, Stopped | OutOfTime | TakenOver):
        return stop.exit_code
    return STOPPED_BY_PERSON


def describe(stop: KeyboardInterrupt) -> str:
    """Return who asked to stop, as a reason."""
    return str(stop) or "interrupted by the user"


@contextmanager
def held_back() -> Iterator[None]:
    """Block stop signals until the end, then raise them; a process started here inherits that."""
    pending: list[int] = []
    with _handled_by(lambda number, frame: pending.append(number)):  # by any of the threads
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number in pending:
        signal.raise_signal(number)


@contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], None], *, at_hangup: bool = True
) -> Iterator[None]:
    """Handle the stop signals that this process does not ignore."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no handler can be set
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    taken = [number for number in STOP_SIGNALS if before[number] != signal.SIG_IGN]
    for number in taken:
        is_stop = at_hangup or number != signal.SIGHUP
        signal.signal(number, handler if is_stop else signal.SIG_IGN)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def listen_to(translate: Callable[[int], KeyboardInterrupt | None]) -> None:
    """Ignore stop signals but a SIGINT that `translate` maps to one: another process decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, StopHandler(translate))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
