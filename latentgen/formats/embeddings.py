"""Learned tokens (textual inversion, arXiv 2208.01618): their files, and tokenizers and text encoders that know them.

* "diffusers": {token: [n, d]}; one text tower
* "a1111": {"emb_params": [n, d]}, the token is the file's name; SDXL {"clip_l": [n, d], "clip_g": [n, d2]}. The layout
  of AUTOMATIC1111 and ComfyUI; diffusers takes the tensors of SDXL's tower by tower
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.core.files import write_bytes
from latentgen.core.tensors import encoded, require_finite
from latentgen.formats.lora.file import load_tensors

TOWERS: Mapping[str, str] = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
LAYOUTS = ("diffusers", "a1111")

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned token.

    Attributes:
        token: what prompts call it.
        vectors: by "text_encoder" and "text_encoder_2": [n, d], as many as the token stands for.
    """

    token: str
    vectors: Mapping[str, Tensor]


def read_embedding(path: Path, token: str | None = None) -> Embedding:
    """Read a learned token, in either layout.

    Args:
        path: a safetensors file.
        token: what to call it; None: as the file says, and where it does not, its name: `cat.safetensors` is `<cat>`.

    Raises:
        UserError: it is not such a file.
    """
    path = Path(path)
    tensors, _ = load_tensors(path)
    name = f"<{path.stem}>"
    if tensors and tensors.keys() <= TOWERS.keys():
        found = {TOWERS[key]: value for key, value in tensors.items()}
    elif len(tensors) == 1:
        ((key, value),) = tensors.items()
        name, found = (name if key == "emb_params" else key), {"text_encoder": value}
    else:
        keys = ", ".join(list(tensors)[:3])
        raise UserError(f"{path}: not a learned token, which has one tensor or clip_l and clip_g; it has {keys}")
    vectors = {network: value[None] if value.dim() == 1 else value for network, value in found.items()}
    for value in vectors.values():
        if value.dim() != 2 or not value.is_floating_point():
            raise UserError(f"{path}: not a learned token: a tensor of shape {list(value.shape)}, {value.dtype}")
    return Embedding(token or name, vectors)


def write_embedding(embedding: Embedding, path: Path, layout: str = "diffusers") -> None:
    """Write a learned token, complete or not at all.

    Args:
        embedding: left unchanged.
        path: parents are made. In the a1111 layout prompts call the token by its name.
        layout: one of LAYOUTS.

    Raises:
        UserError: the layout has no form for it.
        FloatingPointError: a number is not finite; nothing is written.
    """
    vectors = {name: value.detach().cpu().contiguous() for name, value in embedding.vectors.items()}
    if layout not in LAYOUTS:
        raise UserError(f'embedding layout "{layout}" is unknown; use {" or ".join(LAYOUTS)}')
    if layout == "a1111":
        alone = set(vectors) == {"text_encoder"}
        tensors = {"emb_params" if alone else key: vectors[name] for key, name in TOWERS.items() if name in vectors}
    elif set(vectors) == {"text_encoder"}:
        tensors = {embedding.token: vectors["text_encoder"]}
    else:
        raise UserError(f"{path}: the diffusers layout has one text tower, {embedding.token} is of two; use a1111")
    require_finite(tensors, f"the learned token {path}")
    write_bytes(path, b"".join(encoded(tensors, {"format": "pt"})))


def token_names(token: str, count: int) -> list[str]:
    """The tokens that one of `count` vectors is made of: `<cat>`, `<cat>_1`, `<cat>_2`."""
    return [token, *(f"{token}_{n}" for n in range(1, count))]


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
    if not token or re.search(r"\s", token):
        raise UserError(f'token "{token}" cannot be one: use a word without spaces, such as <cat>')
    names = token_names(token, len(vectors))
    known = tokenizer.get_vocab()
    # With one more that is known, `expand_prompt` would take it for a part of this one.
    taken = [name for name in token_names(token, len(vectors) + 1) if name in known]
    if taken:
        raise UserError(f"token {taken[0]} is taken; choose another, such as <{token.strip('<>')}-2>")
    tokenizer.add_tokens(names)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(name) for name in names])
    _grow(text_encoder, int(ids.max()) + 1)
    weight = _rows(text_encoder)
    with torch.no_grad():
        weight[ids.to(weight.device)] = vectors.to(weight)
    _find_end_by_id(tokenizer, text_encoder)


def _rows(text_encoder: TextEncoder) -> Tensor:
    table: Any = text_encoder.get_input_embeddings()
    return table.weight


def _grow(text_encoder: TextEncoder, rows: int) -> None:
    """More rows, zeros yet; the library's own way draws random numbers."""
    old = _rows(text_encoder)
    if old.shape[0] >= rows:
        return
    more = old.new_zeros(rows - old.shape[0], old.shape[1])
    grown = nn.Embedding.from_pretrained(torch.cat([old.detach(), more]), freeze=not old.requires_grad)
    text_encoder.set_input_embeddings(grown)
    text_encoder.config.vocab_size = rows


def _find_end_by_id(tokenizer: CLIPTokenizer, text_encoder: TextEncoder) -> None:
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
