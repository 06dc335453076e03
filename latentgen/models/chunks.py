"""Texts longer than a text encoder reads: broken at word borders into pieces that are read one by one.

A piece has a start and an end of its own and is as long as the text encoder reads; the states of all pieces stand side
by side. So do AUTOMATIC1111's web UI and ComfyUI with prompts longer than 77 tokens. (kohya's scripts leave out the
states of the starts and ends that stand inside.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from transformers import CLIPTokenizer

from latentgen.models.words import expand_prompt

MAX_CHUNKS = 8
"""Most pieces that a text is read in."""

MARKERS = 2
"""The start and the end of a piece."""

T = TypeVar("T")


def words_of(tokenizer: CLIPTokenizer, text: str) -> list[list[int]]:
    """The token ids of each word of a text, without start and end.

    A word is what the tokenizer takes for one before it looks at pairs: letters, one digit, or signs in a row. A
    learned word of several vectors is one word.
    """
    read = tokenizer(expand_prompt(tokenizer, text), truncation=False, padding=False, verbose=False)
    ids, numbers, more = read.input_ids[1:-1], read.word_ids()[1:-1], _further_vectors(tokenizer)
    words: list[list[int]] = []
    before = None
    for token, number in zip(ids, numbers, strict=True):
        if words and (token in more or (number is not None and number == before)):
            words[-1].append(token)
        else:
            words.append([token])
        before = number
    return words


def _further_vectors(tokenizer: CLIPTokenizer) -> set[int]:
    """Ids of the second vector and those after it, `<cat>_1` and on, of learned words."""
    added = tokenizer.added_tokens_encoder
    return {number for name, number in added.items() if (m := re.fullmatch(r"(.+)_\d+", name)) and m[1] in added}


def pieces_of(words: Sequence[Sequence[T]], room: int) -> list[list[T]]:
    """The tokens of a text in pieces of at most `room`, at least one piece.

    A word that does not fit begins a new piece; one that fits into no piece is broken wherever a piece ends.
    """
    found: list[list[T]] = [[]]
    for word in words:
        if len(found[-1]) + len(word) > room >= len(word):
            found.append([])
        for token in word:
            if len(found[-1]) == room:
                found.append([])
            found[-1].append(token)
    return found


def fitted(words: Sequence[Sequence[T]], room: int, chunks: int) -> tuple[list[list[T]], list[T]]:
    """At most `chunks` pieces of at most `room` tokens, and the tokens that are cut because they fit into none.

    The last piece is full where anything is cut.
    """
    found = pieces_of(words, room)
    if len(found) <= chunks:
        return found, []
    rest = [token for piece in found[chunks - 1 :] for token in piece]
    return [*found[: chunks - 1], rest[:room]], rest[room:]
