"""Recognises the kind of a file by its first bytes, not by its name."""

from __future__ import annotations

# A text may begin with "PAR1" too, but not with the byte that follows it in every parquet file.
GZIP, ZSTD, ZIP, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"PAR1\x15"

_BEGINNINGS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the data: run 'git lfs pull' there"),
    (GZIP, "gzip within an archive: unpack it"),
    (ZSTD, "zstd within an archive: unpack it"),
    (ZIP, "a zip archive: unpack it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\xfd7zXZ\0", "an xz archive: unpack it, or pack it with gzip or zstd"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!\x1a", "a rar archive: unpack it"),
    (b"%PDF", "a PDF: extract its text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document: save it as CSV"),
    (b"{\\rtf", "an RTF document: save it as text"),
    (b"SQLite format 3\0", "an SQLite database: export its table as CSV"),
    (b"ARROW1", "an Arrow file: save it as parquet, or give the directory of a saved data set"),
    (b"\xff\xff\xff\xff", "an Arrow stream: give the directory of the saved data set that it belongs to"),
    (b"\x93NUMPY", "a NumPy array: write its rows as JSON lines or parquet"),
    (b"\x89HDF", "an HDF5 file: write its rows as JSON lines or parquet"),
    (b"Obj\x01", "an Avro file: write its rows as JSON lines or parquet"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x7fELF", "a program"),
)
_PAGES = (b"<!doctype html", b"<html")
_BINARY = 0.05  # share of NUL bytes above which a file holds no text


def unreadable_kind(head: bytes) -> str:
    """What a file with this beginning is and what to do about it, if no rows can be read from it; else ''."""
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return what
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1:
        return "a Python pickle, which could run code: write its rows as JSON lines or parquet"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "a bzip2 archive: unpack it, or pack it with gzip or zstd"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:200].lower()
    if text.startswith(_PAGES):
        return "an HTML page, perhaps one to log in or one about the data: download the file itself"
    if text.startswith(b"<?xml"):
        return "XML: write its rows as JSON lines or CSV"
    return ""


def is_binary(head: bytes) -> bool:
    """Whether a file with this beginning holds binary data: more NUL bytes than a text would have."""
    return head.count(0) > _BINARY * len(head)
