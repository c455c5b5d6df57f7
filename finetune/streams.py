"""Standard output and error that outlive their reader: a closed pipe or terminal ends no run.

`| head`, a closed pager, a dead log collector, a terminal that is gone, a log on a full disk: what
is printed there is lost, and the files tell the rest. Nothing above has to catch such an error.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from types import TracebackType
from typing import BinaryIO, TextIO, cast

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ESHUTDOWN)  # for good
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a log file that cannot grow now


class LastingOutput(io.FileIO):
    """A file descriptor whose writes never fail: what cannot be written is dropped."""

    is_gone = False  # whether the reader went away

    def write(self, data: object) -> int:
        """Write, or drop; return how many bytes are done with."""
        size = memoryview(data).nbytes  # type: ignore[arg-type]  # any buffer
        try:
            while (done := super().write(data)) is None:  # type: ignore[arg-type]
                select.select([], [self.fileno()], [])  # another process made it non-blocking
        except OSError as error:
            if error.errno in GONE:
                self._leave()
            elif error.errno not in FULL:
                raise
            return size
        return done

    def _leave(self) -> None:
        """Send all that follows to nowhere, also what libraries and new processes write."""
        self.is_gone = True
        _open_nowhere(self.fileno())


def keep_streams() -> None:
    """Let this process go on when nobody reads its output any more.

    Streams that are not the interpreter's own (a notebook's, a test's) are left alone. Ctrl-C
    prints no traceback.
    """
    _open_missing()
    sys.excepthook = _show_error
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or (stream is getattr(sys, f"__{name}__") and not _descriptor(stream)):
            kept = _kept(stream, descriptor)
            setattr(sys, name, kept)
            setattr(sys, f"__{name}__", kept)


def _show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Show what nobody has caught, unless somebody has just pressed Ctrl-C."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def is_gone(stream: TextIO) -> bool:
    """Return whether a kept stream has lost its reader."""
    kept = _descriptor(stream)
    return kept is not None and kept.is_gone


def _open_missing() -> None:
    """Open closed descriptors (`>&-`), which the next file that is opened would be given."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_nowhere(descriptor)


def _open_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:  # it is, where the descriptor was closed
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    os.set_inheritable(descriptor, True)


def _kept(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream on a descriptor like the one that is there, but lasting."""
    raw = LastingOutput(descriptor, "w", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):  # the descriptor was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=True)
    _flush(stream)
    is_direct = stream.write_through  # python -u
    return io.TextIOWrapper(
        cast(BinaryIO, raw) if is_direct else io.BufferedWriter(raw),
        encoding=stream.encoding,
        # A terminal that is not UTF-8 shows an é as \xe9; Python would raise.
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=is_direct,
    )


def _flush(stream: io.TextIOWrapper) -> None:
    """Write what is buffered; where that cannot be, the next write finds out why."""
    try:
        stream.flush()
    except OSError:
        return


def _descriptor(stream: TextIO) -> LastingOutput | None:
    """Return what a kept stream writes to; None for any other stream."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, LastingOutput) else None
