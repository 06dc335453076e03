"""Words that a text encoder learns: new rows of its embedding, the rest of it untouched (arXiv 2208.01618)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from latentgen.core.errors import UserError
from latentgen.models.text import Tower
from latentgen.models.words import add_token, find_end_by_id


class LearnedTokens(nn.Module):
    """New rows for each text encoder, {its name: `[k, d]`}, as parameters in float32."""

    def __init__(self, rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.rows = nn.ParameterDict({name: own.detach().float().clone() for name, own in rows.items()})

    def forward(self) -> dict[str, Tensor]:
        """The rows; called so that wrappers for several processes see it."""
        return dict(self.rows.items())


class GrownEmbedding(nn.Module):
    """An embedding with more rows than it had; the new ones are put in before each forward pass.

    Attributes:
        known: the embedding as it was, `[n, d]`.
        learned: holds one tensor `[k, d]`, of the ids n to n + k - 1; in a list, because an attribute would become a
            parameter of the text encoder, which it is not.
    """

    def __init__(self, known: nn.Embedding) -> None:
        super().__init__()
        self.known = known
        self.learned: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        assert self.learned, "learned words are put in before the text encoder is called"
        count, (learned,) = self.known.num_embeddings, self.learned
        new = functional.embedding((ids - count).clamp(min=0), learned.to(self.known.weight.dtype))
        return torch.where((ids >= count)[..., None], new, self.known(ids.clamp(max=count - 1)))


def grow(towers: Sequence[Tower], words: Mapping[str, tuple[str, int]]) -> LearnedTokens:
    """Give the tokenizers new words and the text encoders room for them; returns what is to be learned.

    Args:
        towers: changed in place.
        words: the new word, such as `<my-dog>` -> a known one to start from (empty: the mean of all), and how many
            vectors it stands for.

    Raises:
        UserError: a word is known already, or starts from an unknown one.
    """
    rows = {tower.name: torch.cat([_first(tower, *start) for start in words.values()]) for tower in towers}
    for tower in towers:
        for word, (_, vectors) in words.items():
            add_token(tower.tokenizer, word, vectors)
        find_end_by_id(tower.tokenizer, tower.encoder)
        known = tower.encoder.get_input_embeddings()
        assert isinstance(known, nn.Embedding)
        tower.encoder.set_input_embeddings(GrownEmbedding(known))
    learned = LearnedTokens(rows)
    put(learned(), {tower.name: tower.encoder for tower in towers})
    return learned


def put(rows: Mapping[str, Tensor], encoders: Mapping[str, Any]) -> None:
    """Let the next forward passes of these grown text encoders, wrapped or not, use these rows."""
    for name, own in rows.items():
        encoder = encoders[name]
        plain = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
        embedding = plain.get_input_embeddings()
        assert isinstance(embedding, GrownEmbedding)
        embedding.learned = [own]


def rows_of(words: Mapping[str, int], rows: Tensor) -> dict[str, Tensor]:
    """Each word's vectors `[v, d]` among the learned rows `[k, d]` of a tower."""
    parts = rows.split(list(words.values()))
    return {word: part.detach().clone() for word, part in zip(words, parts, strict=True)}


def _first(tower: Tower, start: str, vectors: int) -> Tensor:
    """Where a word's vectors `[v, d]` begin."""
    embedding = tower.encoder.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    table = embedding.weight.detach().float()
    if not start:
        return table.mean(dim=0, keepdim=True).repeat(vectors, 1)
    ids: Any = tower.tokenizer(start, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(f'token start "{start}": the tokenizer sees no word in it; name a known one, or leave it out')
    return table[[ids[n % len(ids)] for n in range(vectors)]]


def settled(tower: Tower, words: Mapping[str, Tensor]) -> Tower:
    """A copy of a tower with learned words `[v, d]`, which its tokenizer has, as ordinary rows of its embedding."""
    encoder = copy.deepcopy(tower.encoder)
    grown = encoder.get_input_embeddings()
    assert isinstance(grown, GrownEmbedding)
    rows = torch.cat([grown.known.weight.detach(), *(own.to(grown.known.weight) for own in words.values())])
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(rows))
    encoder.config.vocab_size = len(rows)
    return replace(tower, encoder=encoder)
