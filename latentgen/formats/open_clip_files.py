"""A text tower of open_clip, by its name and local weights, as transformers' CLIPTextModelWithProjection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip

from latentgen.core.errors import UserError
from latentgen.formats.component_configs import CLIP_TOKENS, text_config
from latentgen.formats.families import find_places, part_names
from latentgen.formats.original.renaming import PROJECTION, to_diffusers
from latentgen.formats.part_check import check_part
from latentgen.formats.parts import Parts, canonical
from latentgen.formats.single_file.vocabulary import LENGTH, tokenizer_files
from latentgen.formats.tensor_files import read_tensors


def read_open_clip(path: Path, name: str, *, allow_pickle: bool = False) -> Parts:
    """The text tower in a file of an open_clip model; the image tower stays behind.

    Args:
        path: weights as open_clip saves them.
        name: of the model in open_clip, such as "ViT-H-14": its configuration says the heads and the activation.
        allow_pickle: open .pt and .bin files too, as `read_tensors` does.

    Returns:
        One part, "text_encoder_2", as SDXL has it: with the projection.

    Raises:
        UserError: no such model, one with another kind of text tower, or weights of another one.
    """
    shape, quick_gelu = _text_shape(name)
    header, tensors = read_tensors(path, allow_pickle=allow_pickle)
    place = find_places(header.tensors).get("text_encoder")
    if place is None or place.kind != "open_clip":
        raise UserError(f"{path} holds no text tower of open_clip: no tensor is named transformer.resblocks.0...")
    own = {key.removeprefix(place.prefix): tensors[key] for key in part_names(tensors, place)}
    state, _ = to_diffusers("open_clip", own)
    state = canonical("text_encoder_2", state)
    if PROJECTION not in state:
        raise UserError(f"{path} has no text_projection: it is not the whole text tower of {name}")
    derived = text_config({key: tuple(v.shape) for key, v in state.items()}, quick_gelu=quick_gelu)
    found = {key: derived[key] for key in shape}
    if found != shape | {"num_attention_heads": found["num_attention_heads"]}:
        wrong = next(key for key in shape if found[key] != shape[key])
        raise UserError(f"{path} is not {name}: its {wrong} is {found[wrong]}, that model's is {shape[wrong]}")
    config = derived | shape
    left = check_part("text_encoder_2", config, state, str(path))
    return Parts(
        family=None,
        configs={"text_encoder_2": config},
        states={"text_encoder_2": {key: value for key, value in state.items() if key not in left}},
        tokenizers={"tokenizer_2": tokenizer_files("sdxl", "tokenizer_2")},
    )


def _text_shape(name: str) -> tuple[dict[str, Any], bool]:
    """What open_clip knows of a model's text tower, in transformers' words; and whether it has OpenAI's activation."""
    config = open_clip.get_model_config(name)
    if config is None:
        near = [known for known in open_clip.list_models() if known.lower().startswith(name.lower()[:5])][:5]
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise UserError(f"open_clip has no model {name}{hint}")
    text = config["text_cfg"]
    plain = not {"hf_model_name", "hf_tokenizer_name"} & set(text) and text.get("embed_cls") is None
    vocabulary = (text.get("vocab_size", CLIP_TOKENS), text.get("context_length", LENGTH))
    if not plain or vocabulary != (CLIP_TOKENS, LENGTH):
        raise UserError(
            f"{name} has another kind of text tower than CLIP's: transformers' CLIPTextModel cannot hold it"
        )
    return {
        "hidden_size": text["width"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "projection_dim": config["embed_dim"],
    }, bool(config.get("quick_gelu", False))
