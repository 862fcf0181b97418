"""Tokenizers for small models with random weights: each character of a text is a token."""

from __future__ import annotations

from collections.abc import Sequence


class Letters:
    """Ids below 90 for characters; decoded texts are printable, and differ from the encoded ones."""

    eos_token_ids = frozenset({95})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return an id for each character; none is special."""
        return [ord(letter) % 90 for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return a character for each id."""
        return "".join(chr(32 + i) for i in ids)


class Readable(Letters):
    """The same ids, decoded to the text that was encoded, if its characters are from a space to a y."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the character of each id."""
        return "".join(chr(90 + i if i < 32 else i) for i in ids)
