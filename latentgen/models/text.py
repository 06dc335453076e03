"""Text to token ids to context: a byte-level BPE of our own, packed as a transformers CLIPTokenizer.

The pre-tokenisation, the `</w>` word ends and the order of the vocabulary (bytes, bytes that end a word, merges, the
two special tokens last) are those of CLIP (arXiv 2103.00020 section 2.4), so that every tool that knows CLIP opens it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.models.chunks import MARKERS, fitted, pieces_of, words_of
from latentgen.models.context import Context
from latentgen.models.words import expand_prompt

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
MIN_PAIR_COUNT = 2  # a pair seen once says nothing about the language, only about that caption


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learn a byte-level BPE vocabulary from captions.

    The result depends on the captions and how often each occurs, not on their order: the merges are chosen by
    summed pair counts, and ties go to the pair that comes first in the vocabulary, whose start is fixed.

    Args:
        captions: any number; read once.
        vocab_size: the largest number of tokens, special ones included; at least 514. With few captions the
            vocabulary stays smaller, so take `len(tokenizer)` afterwards.
        max_length: tokens of one caption, start and end included; the `model_max_length`.

    Raises:
        UserError: `vocab_size` or `max_length` too small, or no captions.
    """
    symbols = _byte_symbols()
    smallest = len(symbols) + 2
    if vocab_size < smallest:
        raise UserError(f"tokenizer: vocab_size {vocab_size} is below {smallest}, the bytes and the two special tokens")
    if max_length < 3:
        raise UserError(f"tokenizer: max_length {max_length} leaves no room between start and end; use 3 or more")
    plain = _pack(symbols, [], max_length).backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, continuing_subword_prefix=""))
    bpe.normalizer, bpe.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=MIN_PAIR_COUNT,
        # Named first, the byte symbols get fixed ids; otherwise ids, and with them ties, follow the order of reading.
        special_tokens=symbols,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for caption in captions:
            seen += 1
            yield caption

    bpe.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("tokenizer: there are no captions to learn from")
    merges = [(first, second) for first, second in json.loads(bpe.to_str())["model"]["merges"]]
    return _pack(symbols, merges, max_length)


def _byte_symbols() -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return alphabet + [symbol + WORD_END for symbol in alphabet]


def _pack(symbols: list[str], merges: list[tuple[str, str]], max_length: int) -> CLIPTokenizer:
    tokens = [*symbols, *(first + second for first, second in merges), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    assert len(vocab) == len(tokens), "two merges spell the same token"
    packed: Any = merges  # the library's annotation lacks pairs, which it needs: "a b" as one string is ambiguous
    return CLIPTokenizer(vocab=vocab, merges=packed, model_max_length=max_length)


def tokens_cut(tokenizer: CLIPTokenizer, captions: Sequence[str], chunks: int = 1) -> list[int]:
    """For each caption, how many tokens fit into none of `chunks` pieces of `model_max_length`; 0: all are read."""
    return [len(cut) for cut in cut_tokens(tokenizer, captions, chunks)]


def cut_tokens(tokenizer: CLIPTokenizer, captions: Sequence[str], chunks: int = 1) -> list[list[int]]:
    """For each caption, the ids of those tokens."""
    room = tokenizer.model_max_length - MARKERS
    rows = zip(captions, _untruncated(tokenizer, captions), strict=True)
    return [
        [] if len(row) <= room + MARKERS else fitted(words_of(tokenizer, caption), room, chunks)[1]
        for caption, row in rows
    ]


def chunks_needed(tokenizer: CLIPTokenizer, caption: str) -> int:
    """Pieces that all of a caption takes."""
    return len(pieces_of(words_of(tokenizer, caption), tokenizer.model_max_length - MARKERS))


def shown(tokenizer: CLIPTokenizer, tokens: Sequence[int], length: int = 80) -> str:
    """Tokens as text, at most `length` signs of it."""
    text = str(tokenizer.decode(list(tokens)))
    return text if len(text) <= length else text[: length - 3] + "..."


def _untruncated(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[list[int]]:
    """Token ids with start and end; learned words of several vectors are spelled out."""
    whole = [expand_prompt(tokenizer, caption) for caption in captions]
    return tokenizer(whole, truncation=False, padding=False, verbose=False).input_ids if whole else []


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], chunks: int = 1) -> Tensor:
    """Token ids `[b, chunks * t]` (int64) of captions, t = `model_max_length`: pieces side by side, each with a start
    and an end, padded to t. Pieces that a caption does not need are those of the empty one; tokens that fit into no
    piece are cut (`tokens_cut` tells).

    With one piece the same ids as StableDiffusionPipeline makes. Learned words of several vectors are spelled out.
    """
    length = tokenizer.model_max_length
    ids = blank(tokenizer, len(captions), chunks)
    for row, caption, target in zip(_untruncated(tokenizer, captions), captions, ids, strict=True):
        if len(row) <= length:
            target[: len(row)] = torch.tensor(row, dtype=torch.int64)
        else:
            put_pieces(tokenizer, target, fitted(words_of(tokenizer, caption), length - MARKERS, chunks)[0])
    return ids


def blank(tokenizer: CLIPTokenizer, rows: int, chunks: int) -> Tensor:
    """Token ids `[rows, chunks * t]` of nothing: the empty caption in every piece."""
    padding: Any = tokenizer.pad_token_id
    piece = torch.full((tokenizer.model_max_length,), padding, dtype=torch.int64)
    piece[:MARKERS] = torch.tensor(_untruncated(tokenizer, [""])[0], dtype=torch.int64)
    return piece.repeat(rows, chunks)


def put_pieces(tokenizer: CLIPTokenizer, target: Tensor, pieces: Sequence[Sequence[int]]) -> None:
    """Write pieces, each of at most t - 2 ids, into a row `[n * t]` of `blank`."""
    end: Any = tokenizer.eos_token_id
    rows = target.view(-1, tokenizer.model_max_length)[: len(pieces)]
    for piece, own in zip(rows, pieces, strict=True):
        piece[1 : len(own) + 1] = torch.tensor(own, dtype=torch.int64)
        piece[len(own) + 1] = end


@dataclass(frozen=True)
class Tower:
    """A text encoder and its tokenizer.

    Args:
        name: what other tools call it: "text_encoder", or "text_encoder_2" (SDXL's second; the refiner's only one).
        encoder: with a projection in SDXL's second tower, without elsewhere.
    """

    name: str
    encoder: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("text_encoder", "tokenizer")


def encode_text(towers: Sequence[Tower], captions: Sequence[str], chunks: int = 1) -> Context:
    """What the U-Net reads of captions, one row each, without sizes. There is no attention mask: padding takes part.

    Of one tower without projection these are its last hidden states after the final normalisation, as in Stable
    Diffusion 1 and 2. With projections (SDXL, arXiv 2307.01952, section 2.1) they are the last but one of every tower,
    side by side, and the last tower's projection is the pooled text.

    Args:
        chunks: pieces that each caption is read in; their states stand one after the other, `[b, chunks * t, d]`, and
            the pooled text is the first piece's.
    """
    return encode_tokens(towers, [tokenize(tower.tokenizer, captions, chunks) for tower in towers])


def encode_tokens(towers: Sequence[Tower], tokens: Sequence[Tensor], encoders: Sequence[Any] = ()) -> Context:
    """`encode_text` of token ids `[b, n * t]`, one tensor a tower, t = `prompt_length` and n pieces.

    Args:
        encoders: called in place of the towers' own, as wrappers and averages of them are in training.
    """
    called = list(encoders) or [tower.encoder for tower in towers]
    length = prompt_length(towers)
    shape = (len(tokens[0]), tokens[0].shape[1] // length)
    pairs = [
        (call, ids.to(own.encoder.device).reshape(-1, length))
        for call, own, ids in zip(called, towers, tokens, strict=True)
    ]
    if not projects(towers):
        ((encoder, ids),) = pairs
        return Context(_side_by_side(encoder(input_ids=ids).last_hidden_state, *shape))
    given = [encoder(input_ids=ids, output_hidden_states=True) for encoder, ids in pairs]
    states = torch.cat([out.hidden_states[-2] for out in given], dim=-1)
    return Context(_side_by_side(states, *shape), given[-1].text_embeds.unflatten(0, shape)[:, 0])


def _side_by_side(states: Tensor, captions: int, chunks: int) -> Tensor:
    """States `[b * n, t, d]` of pieces to `[b, n * t, d]`."""
    return states.unflatten(0, (captions, chunks)).flatten(1, 2)


def projects(towers: Sequence[Tower]) -> bool:
    """Whether the last tower gives a pooled text, as in SDXL."""
    return isinstance(towers[-1].encoder, CLIPTextModelWithProjection)


def states_width(towers: Sequence[Tower]) -> int:
    """Width d of the states `[b, t, d]`."""
    return sum(tower.encoder.config.hidden_size for tower in towers)


def pooled_width(towers: Sequence[Tower]) -> int:
    """Width p of the pooled text `[b, p]`; 0 where there is none."""
    return int(towers[-1].encoder.config.projection_dim or 0) if projects(towers) else 0


def prompt_length(towers: Sequence[Tower], chunks: int = 1) -> int:
    """Tokens `chunks * t` of a caption, padded or cut; all towers read as many."""
    return chunks * min(tower.tokenizer.model_max_length for tower in towers)
