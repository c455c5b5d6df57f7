"""Claims: who works on a run, conducts a sweep or fills a part of the cache, on any machine.

A claim is a lease in a file: its holder renews it, and whoever sees it unrenewed for a minute of
its own clock takes it over; that of a process that died on the same machine is free at once. No
lock of the file system is needed, so it holds on NFS and between nodes. It is a hint and no fence:
a holder that was halted for longer may go on beside its successor. So what a holder writes carries
its claim's token, readers keep to the newest claim, and a holder that lost its own stops.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import OwnerRecord, SoftFileLease, Timeout

log = logging.getLogger("finetune")

CLAIM_FILE = ".claim"  # the name, or the end of it, beside what it stands for
LEASE_SECONDS = 60.0
RENEW_SECONDS = 10.0
POLL_SECONDS = 0.5  # between two looks at a claim of somebody else's
LOOK_SECONDS = 0.5  # for which a holder trusts its last look at its own claim
LOST_SECONDS = 90.0  # without a renewal; network file systems show one up to a minute later
FIRST_PID_NAMESPACE = 0xEFFFFFFC  # its inode, fixed by the kernel; others are marked in the host


class ClaimLost(RuntimeError):
    """Another process has taken over; this one must write nothing more."""


class Claim:
    """A claim that this process holds."""

    def __init__(self, lease: SoftFileLease) -> None:
        self._lease = lease
        self.token = (lease.token or "")[:12]
        self._looked = _now()
        self._is_lost = False

    def check(self) -> None:
        """Make sure that the claim is still held; a process may have been halted meanwhile.

        Raises:
            ClaimLost: it is another's now, or its file cannot be renewed.
        """
        self._is_lost |= self._lease.compromise is not None or not self._is_ours()
        if self._is_lost:
            raise ClaimLost(f"another process has taken over {Path(self._lease.lock_file).parent}")

    def _is_ours(self) -> bool:
        """Return whether the file names this claim, by a look just now or shortly before."""
        now = _now()
        if now - self._looked <= LOOK_SECONDS:
            return True
        for pause in (0.0, POLL_SECONDS):  # for a moment a contender may have moved the file
            time.sleep(pause)
            owner = self._lease.owner
            if owner is not None and owner.token == self._lease.token:
                self._looked = now
                return True
        # Where the file cannot be read, a heartbeat that fails for long says so.
        return owner is None and now - self._looked < LEASE_SECONDS / 2


def _now() -> float:
    """Return the seconds of a clock that goes on while the machine is suspended, where there is."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # only Linux has it
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def build_lease(path: Path) -> SoftFileLease:
    """Return the lease of a file, with what all who contend for it must agree on."""
    return SoftFileLease(
        path, lease_duration=LEASE_SECONDS, heartbeat_interval=RENEW_SECONDS, thread_local=False
    )


@contextmanager
def claimed(
    path: Path, *, wait: bool = True, waiting: Callable[[], object] = lambda: None
) -> Iterator[Claim]:
    """Hold a claim; its folder is made where it is not there.

    Args:
        path: the file of the claim, beside what it stands for.
        wait: whether to wait for another holder to end. Without, one on another host, of which
            nobody here can know whether it lives, is waited for until it renews its claim.
        waiting: called once before waiting.

    Raises:
        Timeout: another process holds it, and is not waited for.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = build_lease(path)
    try:
        lease.acquire(timeout=0)
    except Timeout:
        if wait:
            waiting()
            lease.acquire(poll_interval=POLL_SECONDS)
        else:
            _outlast(lease)
    try:
        yield Claim(lease)
    finally:
        lease.release()


def _outlast(lease: SoftFileLease) -> None:
    """Acquire a lease whose holder does not renew it any more.

    Raises:
        Timeout: its holder renews it, or lives on this machine.
    """
    owner, renewal = lease.owner, _renewal(lease)
    if owner is not None and not _is_here(owner):
        log.info(
            "checking whether %s, process %d, still holds %s: up to %g s",
            owner.hostname, owner.pid, lease.lock_file, LEASE_SECONDS,
        )  # fmt: skip
        while _renewal(lease) == renewal:
            time.sleep(POLL_SECONDS)
            with suppress(Timeout):
                lease.acquire(timeout=0)
                return
    lease.acquire(timeout=0)


def _renewal(lease: SoftFileLease) -> tuple[int, int] | None:
    """Return inode and time of a claim's file as they are now; None without one."""
    with suppress(OSError):
        file = os.lstat(lease.lock_file)
        return file.st_ino, file.st_mtime_ns
    return None


@dataclass(frozen=True)
class Sighting:
    """A claim as one look at it found it."""

    holder: OwnerRecord | None  # None: nobody holds it, or its file cannot be read
    unrenewed_seconds: float  # by the clock of who looks; infinite once its holder is dead

    @property
    def is_lost(self) -> bool:
        """True if nobody works under it any longer."""
        return self.unrenewed_seconds >= LOST_SECONDS


class Watch:
    """Looks at a claim again and again, and so sees when its holder renews it no longer."""

    def __init__(self, path: Path) -> None:
        self._lease = build_lease(path)
        self._holder: OwnerRecord | None = None
        self._renewal: tuple[int, int] | None = None  # inode and time of the file, when last seen
        self._changed = time.monotonic()

    def look(self) -> Sighting:
        """Read the claim, without taking it for a moment as `is_free` does."""
        renewal = _renewal(self._lease)
        if renewal != self._renewal:
            self._holder = None
            with suppress(OSError):
                self._holder = None if renewal is None else self._lease.owner
            self._renewal, self._changed = renewal, time.monotonic()
        if self._holder is not None and _is_dead(self._holder):
            return Sighting(self._holder, math.inf)
        return Sighting(self._holder, time.monotonic() - self._changed)

    def is_free(self) -> bool:
        """Return whether nobody holds the claim now."""
        if not Path(self._lease.lock_file).exists():
            return True
        try:
            self._lease.acquire(timeout=0)
        except Timeout:
            return False
        self._lease.release()
        return True

    def holder(self) -> str | None:
        """Return where the holder runs, e.g. `node3, process 4711`; None for nobody."""
        with suppress(OSError):
            if (owner := self._lease.owner) is not None:
                here = "this machine" if _is_here(owner) else owner.hostname
                return f"{here}, process {owner.pid}"
        return None


def _is_here(owner: OwnerRecord) -> bool:
    """Return whether a holder's process number is one of this machine and container."""
    here = socket.gethostname()
    with suppress(OSError):  # filelock marks the names of hosts within containers
        namespace = os.stat("/proc/self/ns/pid").st_ino
        here += "" if namespace == FIRST_PID_NAMESPACE else f"?pidns-{namespace:x}"
    return owner.hostname == here


def _is_dead(owner: OwnerRecord) -> bool:
    """Return whether a holder on this machine has ended; False where that cannot be known."""
    if not _is_here(owner):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False
