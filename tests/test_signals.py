"""A stop says who asked for it, counts once, and ends in the exit code that scripts wait for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import pytest

from finetune import distributed, signals
from finetune.config.inputs import Inputs
from finetune.config.schema import Config
from finetune.signals import Deadline, OutOfTime, Stopped, StopSignals, TakenOver
from finetune.sweeps.lost_runs import write_cut_off
from finetune.sweeps.worker import Worker
from finetune.sweeps.worker_process import WorkerDied
from finetune.tracking.events import read_events
from finetune.tracking.run_folder import RunFolder, Status
from finetune.training.steps import Diverged

ENDS = {
    signal.SIGINT: (130, "interrupted by the user"),
    signal.SIGTERM: (75, "stopped by SIGTERM"),
    signal.SIGUSR1: (75, "stopped by SIGUSR1"),
    signal.SIGUSR2: (75, "stopped by SIGUSR2"),
}


@pytest.fixture(autouse=True)
def dispositions() -> Iterator[None]:
    """Let a test change what signals do."""
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ENDS)
def test_a_stop_has_its_code_and_its_reason(number: signal.Signals) -> None:
    """A person's is 130, the machine's 75: the same command is to be run again."""
    with signals.stops_raised():
        with pytest.raises(Stopped) as stop:
            send(number)
        assert signals.first_stop() is stop.value
    code, reason = ENDS[number]
    assert (signals.exit_code(stop.value), signals.describe(stop.value)) == (code, reason)


def test_a_closed_terminal_stops_nothing() -> None:
    """SIGHUP is ignored during a sweep, by the processes that it starts too, and not after it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with signals.stops_raised():
        send(signal.SIGHUP)
        with StopSignals().watched(), signals.held_back():
            send(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # which a child inherits
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_launcher_stops_its_ranks_by_a_hangup() -> None:
    """A torchrun sends SIGHUP on when its terminal is closed, and kills the ranks 30 s later."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with signals.stops_raised(at_hangup=True), pytest.raises(Stopped, match="stopped by SIGHUP"):
        send(signal.SIGHUP)


@pytest.mark.parametrize(
    ("stop", "reason", "code"),
    [
        *((Stopped(number), reason, code) for number, (code, reason) in ENDS.items()),
        (OutOfTime("3h"), "stopped after workers.stop_after=3h", 75),
        (TakenOver(), "another process has taken over the run", 75),
        (KeyboardInterrupt(), "interrupted by the user", 130),
    ],
)
def test_a_stop_can_be_passed_on(stop: KeyboardInterrupt, reason: str, code: int) -> None:
    """Its reason and exit code are the same in the process that gets it by a pipe."""
    received, sent = multiprocessing.Pipe(duplex=False)
    sent.send(stop)
    passed_on = received.recv()
    assert type(passed_on) is type(stop)
    assert (signals.describe(passed_on), signals.exit_code(passed_on)) == (reason, code)
    assert getattr(passed_on, "number", None) == getattr(stop, "number", None)


@pytest.mark.parametrize("number", ENDS)
def test_what_is_ignored_stays_ignored(number: signal.Signals) -> None:
    """nohup, and a shell's background job."""
    signal.signal(number, signal.SIG_IGN)
    with signals.stops_raised(), StopSignals().watched():
        send(number)
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("again", "seconds", "is_new"),
    [
        (signal.SIGTERM, 0.0, False),  # to the process and to its group
        (signal.SIGTERM, 0.35, False),  # a scheduler that repeats it: a checkpoint is being written
        (signal.SIGUSR1, 0.35, False),
        (signal.SIGINT, 0.0, False),
        (signal.SIGINT, 0.35, True),  # a person who wants an end now
    ],
)
@pytest.mark.parametrize("is_training", [False, True])
def test_a_request_that_is_sent_twice_counts_once(
    again: signal.Signals, seconds: float, is_new: bool, is_training: bool
) -> None:
    """The machine's counts once, whenever it comes; a person's later one ends at once."""
    with signals.stops_raised():
        training = StopSignals()
        if is_training:
            with training.watched():
                send(signal.SIGTERM)
                time.sleep(seconds)
                with pytest.raises(Stopped) if is_new else nullcontext():
                    send(again)
            assert str(training.request) == "stopped by SIGTERM"
        else:
            with pytest.raises(Stopped):
                send(signal.SIGTERM)
            time.sleep(seconds)
            with pytest.raises(Stopped) if is_new else nullcontext():
                send(again)
        assert signals.exit_code(signals.first_stop()) == 75


def test_a_repeated_signal_of_the_machine_does_not_hide_a_persons() -> None:
    """Ctrl-C ends at once, however often a scheduler has sent SIGTERM just before."""
    with signals.stops_raised():
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        time.sleep(0.35)
        send(signal.SIGTERM)
        with pytest.raises(Stopped, match="interrupted by the user"):
            send(signal.SIGINT)


def test_a_signal_after_the_deadline_does_not_cut_off_what_is_saved() -> None:
    """The scheduler's time may end as `workers.stop_after` does; Ctrl-C still ends at once."""
    with signals.stops_raised():
        with pytest.raises(OutOfTime) as stop:
            Deadline("3h", -1.0).check()
        send(signal.SIGTERM)
        assert signals.first_stop() is stop.value
        with pytest.raises(Stopped, match="interrupted by the user"):
            send(signal.SIGINT)


def test_a_worker_leaves_signals_to_the_sweep() -> None:
    """Whatever its process is sent, it stops for what the sweep says and why."""
    heard, stops = multiprocessing.Pipe(duplex=False)
    signals.listen_to(lambda number: heard.recv() if heard.poll() else None)
    for number in signals.STOP_SIGNALS:
        send(number)
    stops.send(Stopped(signal.SIGTERM))
    training = StopSignals()
    with training.watched():
        send(signal.SIGINT)  # a scheduler's, or the sweep's
        send(signal.SIGINT)
    assert str(training.request) == "stopped by SIGTERM"


def test_another_launchers_process_is_stopped_in_training() -> None:
    """Where no handler is ours, the first signal ends the step; a repeated one is no second."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    training = StopSignals()
    with training.watched():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
    assert str(training.request) == "stopped by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_request_desynchronises_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop that all ranks have agreed on does not; a second one ends this rank alone."""
    desynchronised: list[BaseException] = []
    monkeypatch.setattr(distributed, "_desynchronised", desynchronised)
    monkeypatch.setattr(distributed, "is_launched", lambda: True)
    monkeypatch.setattr(distributed, "_broadcast", lambda verb, payload: None)
    inputs = cast(Inputs, None)  # unused where nothing is broadcast
    with signals.stops_raised():
        with pytest.raises(Stopped), distributed.training_together(Config(), inputs, Diverged):
            send(signal.SIGTERM)
        assert not desynchronised
        time.sleep(signals.REPEAT_SECONDS)
        with pytest.raises(Stopped), distributed.training_together(Config(), inputs, Diverged):
            send(signal.SIGINT)
        assert len(desynchronised) == 1


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_run_that_is_ended_at_once_is_recorded(tmp_path: Path, is_locked: bool) -> None:
    """It does not stay `running`, unless another process works on it."""
    run = RunFolder(tmp_path)
    run.write_status(Status("running", started=1.0))
    if is_locked:
        with run.claimed():
            write_cut_off(run, "stopped by SIGTERM")
        assert run.status() == Status("running", started=1.0)
        return
    write_cut_off(run, "stopped by SIGTERM")
    status = run.status()
    assert status is not None
    assert (status.state, status.reason, status.started) == ("interrupted", "stopped by SIGTERM", 1)
    assert [event["state"] for event in read_events(run.events)] == ["interrupted"]


def test_signals_wait_until_a_process_is_started() -> None:
    """None is lost, and none comes in between."""
    came_to: list[str] = []
    with signals.stops_raised(), pytest.raises(Stopped):  # noqa: PT012  # raised at the end
        with signals.held_back():
            send(signal.SIGTERM)
            came_to.append("the end of the block")
        came_to.append("what follows")
    assert came_to == ["the end of the block"]


def test_a_stopped_worker_begins_nothing() -> None:
    """Also a thread that was about to ask it."""
    with Worker() as worker:
        worker.interrupt(Stopped(signal.SIGTERM))
        with pytest.raises(WorkerDied, match="stopped before this began"):
            worker.run("train", [])
        assert worker._process is None
