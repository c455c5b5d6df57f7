"""Lines of text files: decompressed by their content, decoded by BOM or `data.encoding`.

A file is read line by line, so that it may be larger than the memory, and a byte that is not in the
encoding is named with its line.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

from finetune.files import open_file

DEFAULT_ENCODING = "utf-8"
LATIN = "cp1252"  # what Windows and old spreadsheets write in Western Europe and America
# The first bytes of a compressed file, and the codec by pyarrow's name.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
STANDARD: dict[str, Callable[[Any], Any]] = {
    "gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open,
}  # fmt: skip
ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z"}
BYTE_ORDER_MARKS = {  # UTF-32's first, since it begins as UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@contextmanager
def open_decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, decompressed if it is compressed.

    Raises:
        ValueError: it is an archive of several files.
    """
    with open_file(path) as file:
        start = file.read(8)
        file.seek(0)
        for magic, kind in ARCHIVES.items():
            if start.startswith(magic):
                raise ValueError(f"it is a {kind} archive; unpack it and name a file or the folder")
        codec = next((c for magic, c in COMPRESSIONS.items() if start.startswith(magic)), None)
        if codec is None:
            yield file
        elif codec in STANDARD:
            with STANDARD[codec](file) as unpacked:
                yield unpacked
        else:
            import pyarrow

            with pyarrow.CompressedInputStream(file, codec) as stream:
                yield cast(IO[bytes], BufferedReader(cast(Any, stream)))


def read_lines(path: Path, encoding: str = DEFAULT_ENCODING, *, longest: int = -1) -> Iterator[str]:
    r"""Yield the lines of a text file with their ends; they end at \n.

    Args:
        path: of the file.
        encoding: of its text.
        longest: bytes above which a line is yielded in pieces; -1 never splits a line.

    Raises:
        ValueError: a line is not in the encoding, or the file is cut off.
    """
    with open_decompressed(path) as file:
        try:
            yield from _decode(file, encoding, longest)
        except (EOFError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"it is a damaged compressed file: {error}") from None
        except OSError as error:  # pyarrow's, of a damaged stream, too
            raise ValueError(f"it cannot be read to its end: {error}") from None


def _decode(file: IO[bytes], encoding: str, longest: int) -> Iterator[str]:
    first = file.readline(longest)
    codec = _find_codec(first, encoding)
    if codec.startswith(("utf-16", "utf-32")):
        yield from _decode_wide(_chained(first, file), codec)
        return
    number, line = 1, first
    while line:
        try:
            if len(line) == longest and not line.endswith(b"\n"):
                describe = partial(_describe, number=number, encoding=encoding)
                yield from _decode_pieces(line, file, codec, describe)
            else:
                yield line.decode(codec)
        except UnicodeDecodeError as error:
            raise ValueError(_describe(error, number=number, encoding=encoding)) from None
        number, line, codec = number + 1, file.readline(longest), codec.removesuffix("-sig")


def _decode_pieces(
    piece: bytes, file: IO[bytes], codec: str, describe: Callable[..., str]
) -> Iterator[str]:
    """Yield a long line in pieces; a character across a border is in the later one."""
    decoder, longest = codecs.getincrementaldecoder(codec)(), len(piece)
    start = 0  # of the piece in its line
    try:
        while len(piece) == longest and not piece.endswith(b"\n"):
            yield decoder.decode(piece)
            start += len(piece)
            piece = file.readline(longest)
        yield decoder.decode(piece, final=True)
    except UnicodeDecodeError as error:
        before = start - (len(error.object) - len(piece))  # which the decoder had kept
        raise ValueError(describe(error, before=before)) from None


def _find_codec(start: bytes, encoding: str) -> str:
    for mark, codec in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return codec
    # A text in JSON or of named columns begins with ASCII, as RFC 4627 finds UTF-16 by.
    if encoding == DEFAULT_ENCODING and len(start) > 3 and start[:2].count(0) == 1:
        return "utf-16-le" if start[1] == 0 else "utf-16-be"
    return codecs.lookup(encoding).name


def _chained(first: bytes, rest: IO[bytes]) -> Iterator[bytes]:
    yield first
    while block := rest.read(1 << 20):
        yield block


def _decode_wide(blocks: Iterator[bytes], codec: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(codec)()
    number, begun = 1, ""
    try:
        for block in blocks:
            *lines, begun = (begun + decoder.decode(block)).split("\n")
            for line in lines:
                yield line + "\n"
                number += 1
        begun += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not {codec.upper()} from about line {number} on: {error.reason}; save the "
            "file as UTF-8"
        ) from None
    if begun:
        yield begun


def _describe(error: UnicodeDecodeError, number: int, encoding: str, *, before: int = 0) -> str:
    byte, position = error.object[error.start], before + error.start + 1
    name = "UTF-8" if encoding == DEFAULT_ENCODING else encoding
    other = LATIN if encoding == DEFAULT_ENCODING else "NAME"
    return (
        f"line {number} is not {name} (byte 0x{byte:02X} at its position {position}); "
        f"save the file as UTF-8, or name its encoding, such as data.encoding={other}"
    )


def split_at_carriage_returns(lines: Iterator[str]) -> Iterator[str]:
    r"""Yield lines that end at \r, \r\n or \n, as csv takes them; old spreadsheets end at \r."""
    for line in lines:
        if "\r" in line.rstrip("\r\n"):
            yield from LINE.findall(line)
        else:
            yield line
