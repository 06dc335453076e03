"""Prompts in which brackets say how much words count: `(word:1.3)`, `(word)` and `[word]`.

With z the states of the prompt and z0 those of the empty prompt at the same place, a token of weight w is read as
z' = z0 + w (z - z0): 1 leaves it, 0 takes it out of its own place, more goes further the same way. What other words
took from it in the text encoder's attention stays, and so does the pooled text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from latentgen.models.chunks import MARKERS, fitted, pieces_of, words_of
from latentgen.models.context import Context
from latentgen.models.text import Tower, blank, encode_text, encode_tokens, put_pieces

ROUND, SQUARE = 1.1, 1 / 1.1
"""The weights of `(word)` and of `[word]`."""

_ESCAPED = r"\\(?P<escaped>[()\[\]\\])"
_CLOSING = r":\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
_REST = rf"{_ESCAPED}|{_CLOSING}|(?P<bracket>[()\[\]])|(?s:.)"


class Run(NamedTuple):
    """Words of a prompt that count alike."""

    text: str
    weight: float


class _Bit:
    """A piece of text with its weight so far; a bracket that has a partner is a border without text."""

    def __init__(self, text: str) -> None:
        self.text, self.weight, self.border = text, 1.0, False


def parse(prompt: str, words: Collection[str] = ()) -> list[Run]:
    """The runs of a prompt, brackets taken out. Weights of nested brackets multiply.

    A bracket without a partner is text, and so is one behind a backslash. Only round brackets take a number.

    Args:
        words: learned ones, which are text whatever signs they have.
    """
    bits: list[_Bit] = []
    opened: list[tuple[str, int]] = []
    for sign, text, weight in _signs(prompt, words):
        bits.append(_Bit(text))
        if sign in ("(", "["):
            opened.append((sign, len(bits) - 1))
        elif sign in (")", "]"):
            start = _close(opened, "(" if sign == ")" else "[")
            if start is not None:
                _weigh(bits[start:], weight)
    return _runs(bits)


def _signs(prompt: str, words: Collection[str]) -> Iterator[tuple[str, str, float]]:
    """(bracket or "", what it is as text, the weight that it gives where it closes) from left to right."""
    odd = sorted((word for word in words if re.search(r"[()\[\]\\]", word)), key=len, reverse=True)
    known = "".join(f"{re.escape(word)}|" for word in odd)
    for match in re.finditer(known + _REST, prompt):
        if match["weight"] is not None:
            yield ")", match[0], float(match["weight"])
        elif match["bracket"] is not None:
            yield match[0], match[0], SQUARE if match[0] == "]" else ROUND
        else:
            yield "", match["escaped"] or match[0], 1.0


def _close(opened: list[tuple[str, int]], sign: str) -> int | None:
    """Where the bracket that is closed began; those opened inside of it and never closed are forgotten."""
    for number in range(len(opened) - 1, -1, -1):
        if opened[number][0] == sign:
            start = opened[number][1]
            del opened[number:]
            return start
    return None


def _weigh(bits: Sequence[_Bit], weight: float) -> None:
    """Multiply what stands between two brackets, which become borders."""
    for bracket in (bits[0], bits[-1]):
        bracket.text, bracket.border = "", True
    for bit in bits:
        bit.weight *= weight


def _runs(bits: Sequence[_Bit]) -> list[Run]:
    runs: list[Run] = []
    joins = False
    for bit in bits:
        if bit.border:
            joins = False
        elif joins:  # between two borders all have one weight
            runs[-1] = Run(runs[-1].text + bit.text, bit.weight)
        else:
            runs.append(Run(bit.text, bit.weight))
            joins = True
    return runs


def plain(prompt: str, words: Collection[str] = ()) -> str:
    """The prompt without its brackets."""
    return "".join(run.text for run in parse(prompt, words))


def _weighted_words(tokenizer: CLIPTokenizer, prompt: str) -> list[list[tuple[int, float]]]:
    """(token id, weight) of each word. A bracket ends a word."""
    runs = parse(prompt, tokenizer.added_tokens_encoder)
    return [[(token, run.weight) for token in word] for run in runs for word in words_of(tokenizer, run.text)]


def prompt_chunks(tokenizer: CLIPTokenizer, prompt: str) -> int:
    """Pieces that all of a prompt takes."""
    return len(pieces_of(_weighted_words(tokenizer, prompt), tokenizer.model_max_length - MARKERS))


def prompt_cut(tokenizer: CLIPTokenizer, prompt: str, chunks: int) -> list[int]:
    """Ids of the tokens of a prompt that fit into none of `chunks` pieces."""
    words = _weighted_words(tokenizer, prompt)
    return [token for token, _ in fitted(words, tokenizer.model_max_length - MARKERS, chunks)[1]]


def tokenize_prompts(tokenizer: CLIPTokenizer, prompts: Sequence[str], chunks: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids `[b, chunks * t]` (int64), as `tokenize` gives them of prompts without brackets, and each token's
    weight, alike (float32); starts, ends and padding weigh 1."""
    ids = blank(tokenizer, len(prompts), chunks)
    weights = torch.ones(ids.shape)
    length = tokenizer.model_max_length
    for prompt, target, own in zip(prompts, ids, weights, strict=True):
        pieces = fitted(_weighted_words(tokenizer, prompt), length - MARKERS, chunks)[0]
        put_pieces(tokenizer, target, [[token for token, _ in piece] for piece in pieces])
        for row, piece in zip(own.view(-1, length)[: len(pieces)], pieces, strict=True):
            row[1 : len(piece) + 1] = torch.tensor([weight for _, weight in piece])
    return ids, weights


def encode_prompts(towers: Sequence[Tower], prompts: Sequence[str], chunks: int = 1) -> Context:
    """`encode_text` of prompts whose brackets say how much words count.

    Of prompts without brackets, and of tokens that weigh 1, the states are those of `encode_text`, bit for bit. The
    empty prompt is what the text encoder makes of it, also where a model knows no text as zeros.
    """
    read = [tokenize_prompts(tower.tokenizer, prompts, chunks) for tower in towers]
    context = encode_tokens(towers, [ids for ids, _ in read])
    if all(bool((weights == 1).all()) for _, weights in read):
        return context
    states = context.states
    nothing = encode_text(towers, [""]).states.repeat(1, chunks, 1)
    widths = [tower.encoder.config.hidden_size for tower in towers]
    each = [weights[..., None].expand(-1, -1, width) for (_, weights), width in zip(read, widths, strict=True)]
    w = torch.cat(each, dim=-1).to(states)
    return context._replace(states=torch.where(w == 1, states, nothing + w * (states - nothing)))
