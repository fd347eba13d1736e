"""Rebuild resources/pride_and_prejudice.txt.xz from the Debian package r-cran-janeaustenr.

Usage: apt-get download r-cran-janeaustenr
       python make_haystack.py r-cran-janeaustenr_*.deb OUT.txt.xz

The package stores each novel as a character vector in R's lazy-load database. Everything is decoded
here in plain Python, so that nobody needs R: an `ar` archive, a tar, an index (Rdata.rdx) and a
database (Rdata.rdb).
"""

import bz2
import gzip
import io
import lzma
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

DATA = "usr/lib/R/site-library/janeaustenr/data/"
NOVEL = "prideprejudice"
STRING_FLAGS_UTF8 = 1 << 15
# R's serialisation format, "R Internals" section 1.8: an item's type is its flags' low byte.
SYMBOL, PAIRLIST, CHARACTER, LOGICALS, INTEGERS, STRINGS, VECTOR = 1, 2, 9, 10, 13, 16, 19
NIL, REFERENCE = 254, 255
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10


class RReader:
    """Read the few R types that a lazy-load index and a character vector are made of."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        self.references: list[Any] = []
        if self.stream.read(2) != b"X\n":
            raise ValueError("not R's binary serialisation: expected it to start with 'X\\n'")
        version = self.integer()
        self.stream.read(8)
        if version == 3:
            self.stream.read(self.integer())

    def integer(self) -> int:
        """Read one big-endian integer."""
        return int(struct.unpack(">i", self.stream.read(4))[0])

    def item(self) -> Any:
        """Read whatever comes next."""
        flags = self.integer()
        kind = flags & 0xFF
        if kind == NIL:
            return None
        if kind == REFERENCE:
            return self.references[(flags >> 8) - 1]
        if kind == SYMBOL:
            name = self.item()
            self.references.append(name)
            return name
        if kind == CHARACTER:
            size = self.integer()
            encoding = "utf-8" if flags & STRING_FLAGS_UTF8 else "latin-1"
            return None if size < 0 else self.stream.read(size).decode(encoding)
        if kind == PAIRLIST:
            return self.pairs(flags)
        return self.vector(kind, flags)

    def pairs(self, flags: int) -> dict[Any, Any]:
        """Read the rest of a pairlist as a mapping from tag to value."""
        if flags & HAS_ATTRIBUTES:
            self.item()
        tag = self.item() if flags & HAS_TAG else None
        head = {tag: self.item()}
        return {**head, **(self.item() or {})}

    def vector(self, kind: int, flags: int) -> Any:
        """Read a vector: a list, or a mapping where it carries names."""
        size = self.integer()
        if kind in (LOGICALS, INTEGERS):
            values: list[Any] = list(struct.unpack(f">{size}i", self.stream.read(4 * size)))
        elif kind in (STRINGS, VECTOR):
            values = [self.item() for _ in range(size)]
        else:
            raise ValueError(f"unexpected R type {kind}: expected strings, integers or a list")
        attributes = self.item() if flags & HAS_ATTRIBUTES else {}
        names = (attributes or {}).get("names")
        return dict(zip(names, values, strict=True)) if names else values


def unpack(block: bytes) -> bytes:
    """Undo the compression of one lazy-load item: four bytes of size, then a letter or zlib."""
    if block[4:5] == b"Z":
        return lzma.LZMADecompressor(
            format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]
        ).decompress(block[5:])
    if block[4:5] == b"2":
        return bz2.decompress(block[5:])
    return zlib.decompress(block[4:])


def deb_members(deb: bytes) -> dict[str, bytes]:
    """Return the data files of a Debian package by path."""
    offset = len(b"!<arch>\n")
    while offset < len(deb):
        name = deb[offset : offset + 16].decode().strip().rstrip("/")
        size = int(deb[offset + 48 : offset + 58])
        body = deb[offset + 60 : offset + 60 + size]
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body)) as tar:
                return {
                    member.name.removeprefix("./"): stream.read()
                    for member in tar
                    if (stream := tar.extractfile(member)) is not None
                }
        offset += 60 + size + size % 2
    raise ValueError("no data.tar member: expected a Debian package")


def main() -> None:
    """Decode the package named first into the file named second."""
    deb, target = Path(sys.argv[1]), Path(sys.argv[2])
    files = deb_members(deb.read_bytes())
    index = RReader(gzip.decompress(files[DATA + "Rdata.rdx"])).item()
    start, size = index["variables"][NOVEL]
    lines = RReader(unpack(files[DATA + "Rdata.rdb"][start : start + size])).item()
    text = "\n".join(line.rstrip() for line in lines).strip() + "\n"
    target.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{target.name}: {len(text)} characters, {target.stat().st_size} bytes compressed")


if __name__ == "__main__":
    main()
