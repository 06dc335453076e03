"""Captions as token ids: what training reads of them where a text encoder runs in the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from latentgen.models.text import tokenize


@dataclass(frozen=True)
class TokenIds:
    """What the text encoders read of captions, for training that runs them itself.

    Args:
        tokenizers: by the text encoder's name.
        chunks: pieces that each caption is read in.
    """

    tokenizers: Mapping[str, CLIPTokenizer]
    chunks: int

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids `[b, chunks * t]` for each text encoder, and which captions are `empty` `[b]`."""
        ids = {name: tokenize(tokenizer, captions, self.chunks) for name, tokenizer in self.tokenizers.items()}
        return {**ids, "empty": torch.tensor([caption == "" for caption in captions])}
