"""Words that a tokenizer did not come with."""

from __future__ import annotations

import re

from transformers import CLIPTokenizer

from latentgen.core.errors import UserError


def names(word: str, vectors: int) -> list[str]:
    """The tokens that a word of so many vectors is made of: `<x>`, `<x>_1`, `<x>_2` ..., as diffusers names them."""
    return [word, *(f"{word}_{number}" for number in range(1, vectors))]


def add_word(tokenizer: CLIPTokenizer, word: str, vectors: int = 1) -> None:
    """Add a word to a tokenizer.

    Raises:
        UserError: it is known already.
    """
    known = tokenizer.get_vocab()
    taken = [name for name in names(word, vectors) if name in known or f"{name}</w>" in known]
    if taken or not word.strip() or re.search(r"\s", word):
        reason = f"is a word of the tokenizer already: {taken[0]}" if taken else "must be one word"
        raise UserError(f'token "{word}": {reason}; choose another, such as <my-{word.strip("<> ") or "cat"}>')
    tokenizer.add_tokens(names(word, vectors))


def spelled(tokenizer: CLIPTokenizer, text: str) -> str:
    """A text with each learned word of several vectors followed by the rest of them."""
    added = tokenizer.get_added_vocab()
    for word in added:
        rest = []
        while f"{word}_{len(rest) + 1}" in added:
            rest.append(f"{word}_{len(rest) + 1}")
        if rest:
            # Not where the rest has been written out already.
            text = re.sub(rf"{re.escape(word)}(?!_\d)(?!\s+{re.escape(rest[0])})", " ".join([word, *rest]), text)
    return text
