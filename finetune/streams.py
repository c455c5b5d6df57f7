"""Keep running when standard output or error is closed: a broken pipe ends no run.

`| head`, a closed pager, terminal or log collector, a log on a full disk: what is printed there is
dropped, and the run's files have it. Callers need not catch such errors.
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
                self._redirect_to_null()
            elif error.errno not in FULL:
                raise
            return size
        return done

    def _redirect_to_null(self) -> None:
        """Redirect the descriptor to /dev/null, for libraries and child processes too."""
        self.is_gone = True
        _open_null(self.fileno())


def keep_streams() -> None:
    """Keep this process running when its output is closed.

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
    """Print the traceback of an uncaught exception, but none of Ctrl-C."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def is_gone(stream: TextIO) -> bool:
    """Return whether a kept stream has lost its reader."""
    kept = _descriptor(stream)
    return kept is not None and kept.is_gone


def _open_missing() -> None:
    """Open closed descriptors (`>&-`), which the next opened file would get."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor)


def _open_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:  # it is, where the descriptor was closed
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)


def _kept(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream on a descriptor with the settings of another, whose writes never fail."""
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
    """Write what is buffered; an error shows at the next write."""
    try:
        stream.flush()
    except OSError:
        return


def _descriptor(stream: TextIO) -> LastingOutput | None:
    """Return what a kept stream writes to; None for any other stream."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, LastingOutput) else None
