"""Learned tokens (textual inversion, arXiv 2208.01618): their files, and tokenizers and text encoders that know them.

* "diffusers": {token: [n, d]}; one text tower
* "a1111": {"emb_params": [n, d]}, the token is the file's name; SDXL {"clip_l": [n, d], "clip_g": [n, d2]}. The layout
  of AUTOMATIC1111 and ComfyUI; diffusers takes the tensors of SDXL's tower by tower
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.core.files import write_bytes
from latentgen.core.tensors import encoded, require_finite
from latentgen.formats.lora.file import load_tensors

TOWERS: Mapping[str, str] = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
LAYOUTS = ("diffusers", "a1111")


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
