"""Recognises the encoding of a text file by its first bytes."""

from __future__ import annotations

import codecs
import re

from common.data.errors import NotUnicodeError
from common.data.kinds import is_binary
from common.data.rows import FileFormat
from common.errors import DataError

# The marks of UTF-32 begin with those of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_ASCII_AS_UTF16 = ((re.compile(rb"([\t-~]\0){4}"), "utf-16-le"), (re.compile(rb"(\0[\t-~]){4}"), "utf-16-be"))
_ROWS = re.compile(rb"[\n\r}]")  # where a row ends; "}" because many JSON files have one line
_HIGH = re.compile(rb"[\x80-\xff]+")
# The characters beyond ASCII in Western European text in Windows-1252: letters, quotation marks, dashes and the like.
_WESTERN = frozenset(
    "\u20ac\u2026\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u2122\u0152\u0153\u0160\u0161\u0178\u017d\u017e"
).union(map(chr, range(0xA0, 0xFF)))
_FEW = 0.02  # share of lines; by default so many unusable rows are passed over


def _invalid(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)  # the handler is used to decode alone
    return "\udcff", error.end


# Undecodable bytes become lone surrogates, which spoil only the columns that hold them.
INVALID = "invalid_to_surrogate"
codecs.register_error(INVALID, _invalid)


def encoding_of(head: bytes, cut: bool, form: FileFormat, label: str) -> str:
    """The encoding of a text file that begins with `head`.

    Args:
        cut: whether the file is longer than `head`.

    Raises:
        DataError: the file is not text.
        NotUnicodeError: it is not UTF-8, and `form` names no encoding.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    for ascii_text, name in _ASCII_AS_UTF16:
        if ascii_text.match(head):
            return name
    if is_binary(head) and not form.encoding:
        share = head.count(0) / len(head)
        raise DataError(label, f"it is no text: {share:.0%} of its bytes are NUL; is it damaged, or of another format?")
    if head.isascii():
        return form.encoding or "utf-8"
    rows = [row for row in _ROWS.split(head)[: -1 if cut else None] if row.strip()]
    high = [line for line in rows if not line.isascii()]
    invalid = [line for line in high if not _is_utf8(line)]
    if len(invalid) <= len(high) / 2:
        return "utf-8"
    if form.encoding:
        return form.encoding
    if _is_western(invalid) and len(invalid) > _FEW * len(rows):
        raise NotUnicodeError(label, "it is not UTF-8; it looks like Windows-1252", "cp1252")
    if len(invalid) > max(1, len(rows) / 2):
        raise NotUnicodeError(label, "it is not UTF-8", "cp1251, gb18030, big5, shift_jis or euc_kr")
    return "utf-8"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_western(lines: list[bytes]) -> bool:
    """Whether most bytes beyond ASCII are single Western letters and marks between ASCII ones."""
    runs = [run for line in lines for run in _HIGH.findall(line)]
    alone = [run for run in runs if len(run) == 1]
    known = [run for run in alone if run.decode("cp1252", "replace") in _WESTERN]
    return len(alone) > 0.7 * len(runs) and len(known) > 0.9 * len(alone)
