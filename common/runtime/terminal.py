"""Replaces sequences that control a terminal, which generated text may hold, before the text is shown."""

from __future__ import annotations

# C0 controls become their Unicode pictures (U+2400 and up). C1 controls and marks that reverse the direction of the
# text become replacement characters.
_REPLACEMENTS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_REPLACEMENTS[0x7F] = 0x2421
_REPLACEMENTS.update(dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD))
# JSON has already escaped the controls below a space.
_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in _REPLACEMENTS if code > 0x20}


def escape_controls(text: str) -> str:
    """Replace every character that controls a terminal, except line ends and tabs."""
    return text.translate(_REPLACEMENTS)


def escape_controls_json(text: str) -> str:
    """Escape every character that controls a terminal in a JSON text; the value stays the same."""
    return text.translate(_JSON_ESCAPES)
