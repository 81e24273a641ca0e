"""Text out of bytes that are not UTF-8, told from text that needed nothing."""

from __future__ import annotations

import codecs

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _windows(byte: int) -> str:
    """The character of a byte in Windows-1252; for the five bytes that it leaves out, Latin-1's."""
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


_ESCAPED = {0xDC00 + byte: _windows(byte) for byte in range(0x80, 0x100)}


def text_in(data: bytes) -> tuple[str, str | None]:
    """The text of some bytes, and what was mended in it: None for UTF-8, with or without a mark.

    UTF-16 is known by its mark. Of other bytes those that are UTF-8 are taken so, and each of the rest as Windows-1252.
    """
    try:
        return data.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        if data.startswith(UTF16):
            return data.decode("utf-16", "replace"), "utf-16"
        return data.decode("utf-8-sig", "surrogateescape").translate(_ESCAPED), "windows-1252"


def without_halves(text: str) -> str:
    """The text with surrogate pairs joined, and U+FFFD for each half that is left alone."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
