"""CLIP's tokenizers, which single files leave out: built from the vocabulary that open_clip brings."""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from latentgen.models.text import END, START, WORD_END

MERGES, LENGTH = 49152 - 256 - 2, 77
"""Merges that CLIP uses of those in the file, and tokens of a caption (arXiv 2103.00020)."""

PADDING: Mapping[tuple[str, str], str] = {
    ("sd2", "tokenizer"): "!",
    ("sdxl", "tokenizer_2"): "!",
    ("sdxl-refiner", "tokenizer_2"): "!",
}
"""What fills captions up, where it is not the end token: open_clip's towers were trained with zeros, the id of "!".

transformers then takes every "!" of a caption for this special token too, as it does in the published folders; with
them our ids, and diffusers', differ from open_clip's there.
"""


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their ids, and the merges in order."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *(a + b for a, b in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer for captions of 77 tokens; its ids are open_clip's."""
    vocab, merges = clip_vocabulary()
    packed: Any = merges  # the library's annotation lacks pairs
    return CLIPTokenizer(vocab=vocab, merges=packed, model_max_length=LENGTH, pad_token=pad_token)


@cache
def tokenizer_files(family: str, name: str) -> Mapping[str, str]:
    """The files of a family's "tokenizer" or "tokenizer_2", text by name."""
    with tempfile.TemporaryDirectory() as folder:
        clip_tokenizer(PADDING.get((family, name), END)).save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def is_usual(files: Mapping[str, str], family: str, name: str) -> bool:
    """Whether a tokenizer is the one that its family has anyway: then a single file need not say it."""
    if dict(files) == dict(tokenizer_files(family, name)):
        return True
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files.items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        own = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    usual = (LENGTH, PADDING.get((family, name), END))
    # Merges follow from the vocabulary: each makes one token, in order.
    return own.get_vocab() == clip_vocabulary()[0] and (own.model_max_length, own.pad_token) == usual
