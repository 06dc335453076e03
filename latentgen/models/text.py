"""Text to token ids to context: a byte-level BPE of our own, packed as a transformers CLIPTokenizer.

The pre-tokenisation, the `</w>` word ends and the order of the vocabulary (bytes, bytes that end a word, merges, the
two special tokens last) are those of CLIP (arXiv 2103.00020 section 2.4), so that every tool that knows CLIP opens it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from latentgen.core.errors import UserError

log = logging.getLogger(__name__)

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


def tokens_cut(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[int]:
    """For each caption, how many tokens do not fit into `model_max_length`; 0 means that all do."""
    lengths = (len(ids) for ids in _untruncated(tokenizer, captions))
    return [max(0, length - tokenizer.model_max_length) for length in lengths]


def _untruncated(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(captions), truncation=False, padding=False, verbose=False).input_ids if captions else []


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Token ids [b, t] (int64) of captions, start and end added, cut and padded to t = `model_max_length`.

    The same ids as StableDiffusionPipeline makes. The first caption that is cut is reported in the log, once.
    """
    rows = _untruncated(tokenizer, captions)
    length = tokenizer.model_max_length
    padding: Any = tokenizer.pad_token_id
    ids = torch.full((len(rows), length), padding, dtype=torch.int64)
    for row, caption, target in zip(rows, captions, ids, strict=True):
        if len(row) > length:
            _report_cut(length, len(row) - length, caption)
            row = [*row[: length - 1], row[-1]]
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids


def _report_cut(length: int, cut: int, caption: str) -> None:
    if _cut_reported.is_set():
        return
    _cut_reported.set()
    shown = caption if len(caption) <= 80 else caption[:77] + "..."
    log.warning('caption too long: its last %d tokens are cut, %d fit (reported once): "%s"', cut, length, shown)


_cut_reported = threading.Event()  # loader threads tokenize too


def encode_text(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Context [b, t, d] for the U-Net: the last hidden states after the final normalisation, one row per caption.

    As in Stable Diffusion 1 there is no attention mask: padding takes part.
    """
    ids = tokenize(tokenizer, captions).to(text_encoder.device)
    return text_encoder(input_ids=ids).last_hidden_state
