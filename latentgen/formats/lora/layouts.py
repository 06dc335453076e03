"""The layouts of LoRA files as data: how networks, modules and tensors are called in each.

A key is PREFIX + module + SUFFIX; a `Layout` says what each of the three may be. The same tables read and write. Module
names are looked up among those of the networks at hand, in the spelling of the layout, and never taken apart: in a name
whose dots became underscores the dots cannot be told any more.

* "diffusers": what `load_lora_weights` of diffusers 0.42 reads, in every spelling that it and its older versions wrote;
  LoKr as `UNet2DConditionModel.load_lora_adapter` reads it
* "kohya": sd-scripts and LyCORIS; SDXL's U-Net in the original code's names, others in those of diffusers
* "comfyui": the names of ComfyUI's own modules, which its loader takes beside those of kohya (comfy/lora.py)
* "peft": adapter_model.safetensors of a peft folder; read only
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from latentgen.formats.lora.names import ldm_names, processor_names, text_names

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
NETWORKS = (UNET, TEXT, TEXT_2)

Names = Mapping[str, tuple[str, ...]]
"""For each module, what it is called; the first is written, all are read."""


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a LoRA file.

    Attributes:
        name: for users.
        prefixes: of a network's keys, longest first; which ones to write is `prefix`'s to say. None: any network.
        suffixes: for each tensor of `deltas.TENSORS` ("lora.down"), "alpha" and "magnitude": the first is written.
        names: network and all of its modules to what they are called.
        prefix: network and all networks' modules to the prefix that is written; None where the layout is only read.
        text_suffixes: as `suffixes`, in writing text towers, where that differs.
        magnitude_of_outputs: DoRA's magnitudes belong to the outputs and have peft's shapes, [o] or [1, o, 1, 1];
            else their shape tells whose they are, [o, 1, ...] or [1, i, ...].
    """

    name: str
    prefixes: tuple[tuple[str, str | None], ...]
    suffixes: Mapping[str, tuple[str, ...]]
    names: Callable[[str, Collection[str]], Names]
    prefix: Callable[[str, Mapping[str, Collection[str]]], str] | None
    text_suffixes: Mapping[str, str] = field(default_factory=dict)
    magnitude_of_outputs: bool = False

    def written(self, network: str, tensor: str) -> str | None:
        """The suffix under which a tensor of a network is written; None where the layout has no such tensor."""
        if network != UNET and tensor in self.text_suffixes:
            return self.text_suffixes[tensor]
        return self.suffixes.get(tensor, (None,))[0]


_LYCORIS = {
    **{f"lokr.{name}": (f".lokr_{name}",) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"loha.{name}": (f".hada_{name}",) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
}
_KOHYA = {
    "lora.down": (".lora_down.weight",),
    "lora.up": (".lora_up.weight",),
    "lora.mid": (".lora_mid.weight",),
    "alpha": (".alpha",),
    "magnitude": (".dora_scale",),
    **_LYCORIS,
}
_PEFT = {
    "lora.down": (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", "_lora.down.weight"),
    "lora.up": (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", "_lora.up.weight"),
    "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    **{tensor: spellings for tensor, spellings in _LYCORIS.items() if tensor.startswith("lokr.")},
}


def _diffusers_names(network: str, paths: Collection[str]) -> Names:
    if network == UNET:
        return {path: (path, *processor_names(path)) for path in paths}
    return {path: tuple(n for p in (path, *processor_names(path)) for n in text_names(p)) for path in paths}


def _peft_names(network: str, paths: Collection[str]) -> Names:
    return {path: (path,) if network == UNET else text_names(path) for path in paths}


def _kohya_names(network: str, paths: Collection[str]) -> Names:
    if network != UNET:
        return {path: tuple(name.replace(".", "_") for name in text_names(path)) for path in paths}
    original = ldm_names(paths)
    order = -1 if is_sdxl(paths) else 1
    both = {path: (path, *([original[path]] if path in original else []))[::order] for path in paths}
    return {path: tuple(name.replace(".", "_") for name in names) for path, names in both.items()}


def _comfy_names(network: str, paths: Collection[str]) -> Names:
    if network != UNET:
        return {path: text_names(path)[:1] for path in paths}
    return {path: (name,) for path, name in ldm_names(paths).items()}


def is_sdxl(unet: Collection[str]) -> bool:
    """Whether a U-Net with these modules takes sizes and pooled text beside its context, as SDXL's do."""
    return "add_embedding.linear_1" in unet


def _is_open_clip(text: Collection[str]) -> bool:
    """Whether a first text tower is as deep as Stable Diffusion 2's."""
    return "encoder.layers.22.mlp.fc1" in text


def _kohya_prefix(network: str, modules: Mapping[str, Collection[str]]) -> str:
    two = TEXT_2 in modules or is_sdxl(modules.get(UNET, ()))
    return {UNET: "lora_unet_", TEXT: "lora_te1_" if two else "lora_te_", TEXT_2: "lora_te2_"}[network]


def _comfy_prefix(network: str, modules: Mapping[str, Collection[str]]) -> str:
    if network == UNET:
        return "diffusion_model."
    tower = "clip_g" if network == TEXT_2 else "clip_h" if _is_open_clip(modules[network]) else "clip_l"
    return f"text_encoders.{tower}.transformer."


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "kohya",
            (
                ("lora_te1_", TEXT),
                ("lora_te2_", TEXT_2),
                ("lora_te_", TEXT),
                ("lora_unet_", UNET),
                ("lycoris_", UNET),  # SimpleTuner
            ),
            _KOHYA,
            _kohya_names,
            _kohya_prefix,
        ),
        Layout(
            "comfyui",
            (
                ("diffusion_model.", UNET),
                ("text_encoders.clip_l.transformer.", TEXT),
                ("text_encoders.clip_h.transformer.", TEXT),
                ("text_encoders.clip_g.transformer.", TEXT_2),
            ),
            # Its loader takes peft's names of LoRA as well.
            {
                **_KOHYA,
                "lora.down": (*_KOHYA["lora.down"], ".lora_A.weight"),
                "lora.up": (".lora_up.weight", ".lora_B.weight"),
            },
            _comfy_names,
            _comfy_prefix,
        ),
        Layout(
            "peft",
            (
                *((f"{network}.base_model.model.", network) for network in NETWORKS),
                ("base_model.model.", None),
            ),
            {**_PEFT, **_LYCORIS},
            _peft_names,
            None,
            magnitude_of_outputs=True,
        ),
        Layout(
            "diffusers",
            # Before text towers were adapted too, files held the U-Net's keys alone, with no prefix.
            (*((f"{network}.", network) for network in NETWORKS), ("", UNET)),
            _PEFT,
            _diffusers_names,
            lambda network, modules: f"{network}.",
            # diffusers knows a text tower's keys by this spelling, or by another that only attention has; and hands
            # them to transformers, which wants DoRA's magnitudes by their whole name.
            {
                "lora.down": ".lora_linear_layer.down.weight",
                "lora.up": ".lora_linear_layer.up.weight",
                "magnitude": ".lora_magnitude_vector.weight",
            },
            magnitude_of_outputs=True,
        ),
    )
}
