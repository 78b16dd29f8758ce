"""Texts: when two are the same, what is decoded of old files, and how a sentence is cleaned."""

import contextlib
import html
import unicodedata


def text_key(text: str) -> str:
    """A text without case, spacing and punctuation: equal keys are the same text."""
    key = "".join(character for character in text.casefold() if character.isalnum())
    return key or text


def clean(text: str) -> str:
    """Plain text of a sentence: HTML entities and '' quotes undone, Unicode composed, spaces single."""
    with contextlib.suppress(ValueError):  # an entity of thousands of digits is none
        text = html.unescape(text)
    return " ".join(unicodedata.normalize("NFC", text).replace("''", '"').split())


def decode(line: bytes) -> str:
    """UTF-8, or Windows-1252 for a line that a past editor saved so."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")
