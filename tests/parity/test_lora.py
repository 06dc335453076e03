"""What we train and write, in diffusers; what diffusers and kohya's tools write, here."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from made import assert_same_file, lora, trained
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from latentgen.formats.lora.apply import merge
from latentgen.formats.lora.families import shapes_of
from latentgen.formats.lora.file import LoraFile, from_tensors, load_tensors, read_lora, trained_lora
from latentgen.formats.lora.writing import write_lora
from latentgen.models.deltas import Factors, delta

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def assert_close(networks: Any, expected: Any) -> None:
    for name, made in tiny.outputs(networks).items():
        torch.testing.assert_close(made, expected[name], **CLOSE)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("targets", [("attention",), ("feed_forward",), ("all",)])
@pytest.mark.parametrize("family", tiny.BASES)
def test_our_files_in_diffusers(family: str, targets: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    networks, file = lora(
        kind, family, targets=targets, rank_pattern={"fc1|net.0|to_q": 2}, alpha_pattern={"fc2|proj_out|to_k": 1.5}
    )
    write_lora(file, tmp_path / "a.safetensors", "diffusers", networks)
    pipeline = tiny.pipeline_of(family, copy.deepcopy(networks))
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    merge(networks, file)
    assert_close({name: getattr(pipeline, name) for name in networks}, tiny.outputs(networks))


@pytest.mark.parametrize("targets", [("attention",), ("attention", "feed_forward", "convolution"), ("all",)])
@pytest.mark.parametrize("family", tiny.BASES)
def test_our_kohya_files_in_diffusers(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """One alpha for a network, and attention whole: what diffusers understands of kohya's files."""
    networks, file = lora("lora", family, targets=targets, rank_pattern={"to_q": 2})
    write_lora(file, tmp_path / "a.safetensors", "kohya", networks)
    pipeline = tiny.pipeline_of(family, copy.deepcopy(networks))
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    merge(networks, file)
    assert_close({name: getattr(pipeline, name) for name in networks}, tiny.outputs(networks))


def test_our_lokr_files_in_diffusers(tmp_path: Path) -> None:
    """Its pipelines refuse names without "lora" in them; the U-Net takes them."""
    networks, file = lora("lokr", targets=("attention",), rank=2)
    networks, file = {"unet": networks["unet"]}, LoraFile(modules={"unet": file.modules["unet"]})
    write_lora(file, tmp_path / "a.safetensors", "diffusers", networks)
    theirs = copy.deepcopy(networks["unet"])
    theirs.load_lora_adapter(tmp_path / "a.safetensors", prefix="unet")
    merge(networks, file)
    assert_close({"unet": theirs}, tiny.outputs(networks))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_weighted_lora_is_what_diffusers_draws(weight: float, tmp_path: Path) -> None:
    networks, file = lora(targets=("attention",))
    write_lora(file, tmp_path / "a.safetensors", "diffusers", networks)
    pipeline = tiny.pipeline_of("sd1", copy.deepcopy(networks))
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="mine")
    pipeline.set_adapters(["mine"], [weight])
    merge(networks, file, weight)
    assert_close({name: getattr(pipeline, name) for name in networks}, tiny.outputs(networks))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_diffusers_writes(family: str, converted: bool, kind: str, tmp_path: Path) -> None:
    """Its training scripts give `save_lora_weights` peft's names, or those of `convert_state_dict_to_diffusers`."""
    networks, tuned = trained(kind, family, alpha_pattern={"to_k|k_proj": 5})
    states = {name: get_peft_model_state_dict(network) for name, network in tuned.items()}
    if converted:
        states = {name: convert_state_dict_to_diffusers(state) for name, state in states.items()}
    settings = {name: network.peft_config["default"].to_dict() for name, network in tuned.items()}
    # What diffusers' scripts keep of it (training_utils._collate_lora_metadata keeps all).
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline.save_lora_weights(
        tmp_path,
        **{f"{name}_lora_layers": state for name, state in states.items()},
        **{f"{name}_lora_adapter_metadata": own for name, own in settings.items()},
    )
    again = read_lora(tmp_path / "pytorch_lora_weights.safetensors", networks)
    assert again.layout == "diffusers"
    assert_same_file(again, trained_lora(tuned))


def kohya_name(network: str, path: str) -> str:
    """sd-scripts' own rule for Stable Diffusion 1: prefix, and the module's path with underscores."""
    prefix, above = ("lora_unet", "") if network == "unet" else ("lora_te", "text_model.")
    return f"{prefix}.{above}{path}".replace(".", "_")


SUFFIXES = {
    "lora": {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"},
    "loha": {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_what_kohyas_tools_write(kind: str, tmp_path: Path) -> None:
    networks, file = lora(kind)
    keys: dict[str, torch.Tensor] = {}
    for network, own in file.modules.items():
        for path, factors in own.items():
            stem = kohya_name(network, path)
            keys |= {f"{stem}.{SUFFIXES[factors.kind][n]}": v for n, v in factors.tensors.items()}
            if factors.alpha is not None:
                keys[f"{stem}.alpha"] = factors.alpha
            if factors.magnitude is not None:
                keys[f"{stem}.dora_scale"] = factors.magnitude
    save_file(keys, tmp_path / "a.safetensors", {"ss_network_dim": "3", "ss_seed": "1"})
    again = read_lora(tmp_path / "a.safetensors", networks)
    assert again.layout == "kohya"
    assert again.metadata == {"ss_network_dim": "3", "ss_seed": "1"}
    assert_same_file(again, file)
    write_lora(again, tmp_path / "b.safetensors", "kohya", networks)
    ours, header = load_tensors(tmp_path / "b.safetensors")
    assert ours.keys() == keys.keys()
    assert all(torch.equal(ours[key], value) for key, value in keys.items())
    assert header["ss_seed"] == "1"


T = "transformer_blocks"
ORIGINAL_NAMES = {
    "sd1": {
        "input_blocks.0.0": "conv_in",
        f"input_blocks.1.1.{T}.0.attn2.to_k": f"down_blocks.0.attentions.0.{T}.0.attn2.to_k",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
        "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
        f"output_blocks.5.1.{T}.0.ff.net.0.proj": f"up_blocks.1.attentions.2.{T}.0.ff.net.0.proj",
        "time_embed.0": "time_embedding.linear_1",
        "out.2": "conv_out",
    },
    "sdxl": {
        f"input_blocks.5.1.{T}.1.attn2.to_v": f"down_blocks.1.attentions.1.{T}.1.attn2.to_v",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.2.0.in_layers.2": "down_blocks.0.resnets.1.conv1",
        "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        f"output_blocks.0.1.{T}.0.ff.net.2": f"up_blocks.0.attentions.0.{T}.0.ff.net.2",
        "output_blocks.5.0.skip_connection": "up_blocks.1.resnets.2.conv_shortcut",
        "time_embed.0": "time_embedding.linear_1",
    },
}
"""The original code's names in its own U-Nets, by hand for the tiny ones: two levels, two layers each."""


def factors_for(weight: torch.Size, alpha: torch.Tensor | None) -> Factors:
    o, i, *kernel = weight
    tensors = {"down": torch.randn(2, i, *kernel), "up": torch.randn(o, 2, *(1 for _ in kernel))}
    return Factors("lora", tensors, alpha)


@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_what_kohyas_tools_write_for_sdxl(names: str) -> None:
    networks, _ = lora(family="sdxl", targets=("attention",))
    shapes = shapes_of(networks)
    expected: dict[str, Factors] = {}
    keys: dict[str, torch.Tensor] = {}
    for name, path in ORIGINAL_NAMES["sdxl"].items():
        expected[path] = own = factors_for(shapes["unet"][path], torch.tensor(1.0))
        stem = f"lora_unet_{name if names == 'original' else path}".replace(".", "_")
        keys |= {f"{stem}.lora_{part}.weight": value for part, value in own.tensors.items()}
        keys[f"{stem}.alpha"] = torch.tensor(1.0)
    again = from_tensors(keys, {}, shapes)
    assert again.layout == "kohya"
    assert_same_file(again, LoraFile(modules={"unet": expected}))


TOWERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


@pytest.mark.parametrize("alpha", [None, torch.tensor(1.0)], ids=["extracted", "trained"])
@pytest.mark.parametrize("family", ORIGINAL_NAMES)
def test_what_comfyui_writes(family: str, alpha: torch.Tensor | None, caplog, tmp_path: Path) -> None:
    """Names of its own modules; its extraction has no alphas, its training has. Differences of norms and biases, which
    both add, are no LoRA: they are left out with a warning."""
    networks, _ = lora(family=family, targets=("attention",))
    shapes = shapes_of(networks)
    stems = {("unet", path): f"diffusion_model.{name}" for name, path in ORIGINAL_NAMES[family].items()}
    for network in networks.keys() & TOWERS.keys():
        for path in ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc2"):
            stems[network, path] = f"text_encoders.{TOWERS[network]}.transformer.text_model.{path}"
    expected: dict[str, dict[str, Factors]] = {}
    keys: dict[str, torch.Tensor] = {}
    for (network, path), stem in stems.items():
        own = factors_for(shapes[network][path], alpha)
        expected.setdefault(network, {})[path] = own
        keys |= {f"{stem}.lora_{part}.weight": value for part, value in own.tensors.items()}
        if alpha is not None:
            keys[f"{stem}.alpha"] = alpha.clone()
    save_file(keys, tmp_path / "a.safetensors")
    again = read_lora(tmp_path / "a.safetensors", networks)
    assert again.layout == "comfyui"
    assert_same_file(again, LoraFile(modules=expected))
    write_lora(again, tmp_path / "b.safetensors", "comfyui", networks)
    ours, _ = load_tensors(tmp_path / "b.safetensors")
    assert ours.keys() == keys.keys()
    assert all(torch.equal(ours[key], value) for key, value in keys.items())
    more = {"diffusion_model.out.0.diff": torch.ones(4), "diffusion_model.out.2.diff_b": torch.ones(4)}
    with caplog.at_level(logging.WARNING):
        assert_same_file(from_tensors({**keys, **more}, {}, shapes), again)
    assert f"2 of {len(keys) + 2} keys of the comfyui layout fit no module" in caplog.text


def test_peft_computes_what_we_merge_after_a_round_trip_through_every_layout(tmp_path: Path) -> None:
    networks, tuned = trained("lora", "sdxl")
    file = trained_lora(tuned)
    for layout in ("kohya", "comfyui", "diffusers"):
        write_lora(file, tmp_path / "a.safetensors", layout, networks)
        file = read_lora(tmp_path / "a.safetensors", networks)
    merge(networks, file)
    assert_close(networks, tiny.outputs(tuned))


def test_the_delta_is_pefts_own() -> None:
    _, tuned = trained("loha")
    for path, factors in trained_lora({"unet": tuned["unet"]}).modules["unet"].items():
        layer = tuned["unet"].get_submodule(path)
        weight = layer.get_base_layer().weight
        torch.testing.assert_close(delta(factors, weight), layer.get_delta_weight("default"))
