"""Words that a tokenizer and its text encoder did not come with: learned ones (textual inversion, arXiv 2208.01618)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentgen.core.errors import UserError

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection


def token_names(token: str, count: int) -> list[str]:
    """The tokens that one of `count` vectors is made of: `<cat>`, `<cat>_1`, `<cat>_2`."""
    return [token, *(f"{token}_{n}" for n in range(1, count))]


def add_token(tokenizer: CLIPTokenizer, token: str, count: int = 1) -> list[str]:
    """Teach a tokenizer a token that stands for `count` vectors; returns the names of all of them.

    Raises:
        UserError: the token is taken or cannot be one; nothing is changed then.
    """
    if not token or re.search(r"\s", token):
        raise UserError(f'token "{token}" cannot be one: use a word without spaces, such as <cat>')
    names = token_names(token, count)
    known = tokenizer.get_vocab()
    # With one more that is known, `expand_prompt` would take it for a part of this one.
    taken = [name for name in token_names(token, count + 1) if name in known or f"{name}</w>" in known]
    if taken:
        raise UserError(f"token {taken[0]} is taken; choose another, such as <{token.strip('<>')}-2>")
    tokenizer.add_tokens(names)
    return names


def add_embedding(tokenizer: CLIPTokenizer, text_encoder: TextEncoder, token: str, vectors: Tensor) -> None:
    """Teach a tokenizer and its text encoder a token, in place.

    Prompts must then go through `expand_prompt`, so that a token of several vectors takes as many places.

    Args:
        tokenizer: gets one token for each vector, after all that it has.
        text_encoder: gets their rows.
        token: must hold no spaces.
        vectors: [n, d].

    Raises:
        UserError: the token is taken or cannot be one, or the vectors have another width; nothing is changed then.
    """
    width = _rows(text_encoder).shape[1]
    if vectors.dim() != 2 or not len(vectors) or vectors.shape[1] != width:
        raise UserError(
            f"{token}: vectors {list(vectors.shape)} for a text encoder of width {width}; it is for another model"
        )
    names = add_token(tokenizer, token, len(vectors))
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(name) for name in names])
    grow_rows(text_encoder, int(ids.max()) + 1)
    weight = _rows(text_encoder)
    with torch.no_grad():
        weight[ids.to(weight.device)] = vectors.to(weight)
    find_end_by_id(tokenizer, text_encoder)


def _rows(text_encoder: TextEncoder) -> Tensor:
    table: Any = text_encoder.get_input_embeddings()
    return table.weight


def grow_rows(text_encoder: TextEncoder, rows: int) -> None:
    """More rows, zeros yet; the library's own way draws random numbers."""
    old = _rows(text_encoder)
    if old.shape[0] >= rows:
        return
    more = old.new_zeros(rows - old.shape[0], old.shape[1])
    grown = nn.Embedding.from_pretrained(torch.cat([old.detach(), more]), freeze=not old.requires_grad)
    text_encoder.set_input_embeddings(grown)
    text_encoder.config.vocab_size = rows


def find_end_by_id(tokenizer: CLIPTokenizer, text_encoder: TextEncoder) -> None:
    """Pool at the end token; configurations of old pool at the largest id, which a new token would be.

    They say `eos_token_id` 2 (transformers pull request 24773). For prompts without new tokens it is the same place.
    """
    if text_encoder.config.eos_token_id != 2 or tokenizer.eos_token_id == 2:
        return
    end: Any = tokenizer.eos_token_id
    text_encoder.config.eos_token_id = end
    pooling = text_encoder.text_model if isinstance(text_encoder, CLIPTextModelWithProjection) else text_encoder
    pooling.eos_token_id = end


def expand_prompt(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The prompt with every learned token followed by the rest of its vectors' tokens: `<cat>` to `<cat> <cat>_1`.

    As diffusers' `maybe_convert_prompt`; parts that a prompt names itself are left as they are.
    """
    added = [name for name in tokenizer.added_tokens_encoder if name not in tokenizer.all_special_tokens]
    if not added:
        return prompt
    longest_first = "|".join(re.escape(name) for name in sorted(added, key=len, reverse=True))
    return re.sub(longest_first, lambda match: _expanded(match[0], added), prompt)


def _expanded(token: str, added: list[str]) -> str:
    count = 1
    while f"{token}_{count}" in added:
        count += 1
    return " ".join(token_names(token, count))


def learned_vectors(tokenizer: CLIPTokenizer, text_encoder: TextEncoder, token: str) -> Tensor:
    """The vectors [n, d] of a token that `add_embedding` added; a copy.

    Raises:
        UserError: there is no such token.
    """
    added = list(tokenizer.added_tokens_encoder)
    if token not in added:
        raise UserError(f"token {token} was not added to this tokenizer")
    names = _expanded(token, added).split(" ")
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(name) for name in names])
    weight = _rows(text_encoder)
    return weight.detach()[ids.to(weight.device)]
