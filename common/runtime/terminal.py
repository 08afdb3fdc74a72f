"""What a model has written, which may be sequences that drive a terminal, made harmless to it."""

from __future__ import annotations

# C0 controls become their Unicode pictures; C1 controls, and marks that reverse the direction of what follows, become
# replacement characters.
_HARMLESS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_HARMLESS[0x7F] = 0x2421
_HARMLESS.update(dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD))
# JSON has escaped those below a space already.
_ESCAPED = {code: f"\\u{code:04x}" for code in _HARMLESS if code > 0x20}


def escape_controls(text: str) -> str:
    """`text` with nothing in it that a terminal obeys but line ends and tabs."""
    return text.translate(_HARMLESS)


def escape_controls_json(text: str) -> str:
    """JSON that means the same; what a terminal obeys is escaped."""
    return text.translate(_ESCAPED)
