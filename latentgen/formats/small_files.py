"""LoRA files, learned words and ControlNets, told by the names and shapes of their tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from latentgen.formats.found import Found, dtypes_of, parameters_of
from latentgen.formats.headers import Entry


def lora_in(tensors: Mapping[str, Entry]) -> Found | None:
    """A file of small changes to a model, by the names that programs give to the factors."""
    ends = re.compile(
        r"\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer|hada_w1_a|lokr_w1|lokr_w1_a|oft_blocks)\b"
        r"|_lora\.(down|up)\."
    )
    factors = [name for name in tensors if ends.search(name)]
    if not factors:
        return None
    layout = next(name for name, pattern in LORA_LAYOUTS.items() if any(re.match(pattern, f) for f in factors))
    kinds = {"lokr": "LoKr", "hada": "LoHa", "oft": "OFT"}
    kind = next((word for piece, word in kinds.items() if any(piece in name for name in factors)), "LoRA")
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in tensors):
        kind = "DoRA"
    ranks = Counter(
        entry.shape[0]
        for name, entry in tensors.items()
        if re.search(r"(lora_A|lora_down|lora\.down|_lora\.down)\b", name) and entry.shape
    )
    first = [e.shape[1] for name, e in tensors.items() if re.search(r"attn2[._]to_k[._].*(lora_A|down)", name)]
    second = any(re.match(r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g", name) for name in factors)
    width = max(first, default=0)
    family = "sdxl" if second or width == 2048 else {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner"}.get(width)
    return Found(
        kind="lora",
        family=family,
        layout=layout,
        dtypes={"lora": dtypes_of(tensors)},
        parameters={"lora": parameters_of(tensors)},
        details={
            "method": kind,
            "rank": ranks.most_common(1)[0][0] if ranks else None,
            "modules": len({re.split(ends, name)[0] for name in factors}),
            "unet": any(re.match(r"lora_unet_|unet\.|diffusion_model\.|model\.diffusion_model\.", f) for f in factors),
            "text_encoders": any(re.match(r"lora_te|text_encoder|text_encoders\.", f) for f in factors),
        },
    )


LORA_LAYOUTS: Mapping[str, str] = {
    "kohya": r"lora_(unet|te|te1|te2|prior_te)_",
    "comfyui": r"(diffusion_model|text_encoders|model\.diffusion_model)\.",
    "peft": r"base_model\.model\.",
    "diffusers": r"(unet|text_encoder|text_encoder_2)\.",
    "other": r"",
}
"""Whose names a LoRA has, by their beginning; in order."""


def embedding_in(tensors: Mapping[str, Entry]) -> Found | None:
    """Learned words: one or two small tensors."""
    if not tensors or len(tensors) > 2 or any(len(entry.shape) > 2 for entry in tensors.values()):
        return None
    names = set(tensors)
    widths = {entry.shape[-1] for entry in tensors.values() if entry.shape}
    if names == {"clip_l", "clip_g"}:
        layout, family = "clip_l, clip_g", "sdxl"
    elif names == {"emb_params"}:
        layout, family = "emb_params", _by_width(widths)
    elif len(names) == 1 and "." not in next(iter(names)):
        layout, family = "diffusers", _by_width(widths)
    else:
        return None
    rows = max((entry.shape[0] if len(entry.shape) == 2 else 1) for entry in tensors.values())
    return Found(
        kind="embedding",
        family=family,
        layout=layout,
        dtypes={"embedding": dtypes_of(tensors)},
        parameters={"embedding": parameters_of(tensors)},
        details={"tokens": rows},
    )


def _by_width(widths: set[int]) -> str | None:
    return {768: "sd1", 1024: "sd2", 1280: "sdxl"}.get(max(widths, default=0))


def controlnet_in(tensors: Mapping[str, Entry]) -> Found | None:
    """A ControlNet (arXiv 2302.05543) in diffusers' names or its authors'; None where there is none.

    Args:
        tensors: name -> shape and type, as the file's header has them.
    """
    if "controlnet_cond_embedding.conv_in.weight" in tensors:
        layout = "diffusers"
    elif any("input_hint_block." in name for name in tensors):
        layout = "original"
    else:
        return None
    context = {entry.shape[1] for name, entry in tensors.items() if name.endswith("attn2.to_k.weight")}
    return Found(
        kind="controlnet",
        family={768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(max(context, default=0)),
        layout=layout,
        dtypes={"controlnet": dtypes_of(tensors)},
        parameters={"controlnet": parameters_of(tensors)},
    )
