from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from made import assert_same_file, lora, trained
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from latentgen.core.errors import UserError
from latentgen.formats.lora.families import UNETS, family_shapes, shapes_of
from latentgen.formats.lora.file import LoraFile, from_tensors, load_tensors, read_lora, trained_lora
from latentgen.formats.lora.metadata import kohya_hash
from latentgen.formats.lora.writing import WRITTEN, to_tensors, write_lora
from latentgen.models.adapters import KINDS
from latentgen.models.deltas import Factors, delta

HOLDS = {
    "kohya": KINDS,
    "comfyui": KINDS,
    "diffusers": ("lora", "dora", "lokr"),
}
"""What each layout has a form for."""


@pytest.mark.parametrize(("layout", "kind"), [(name, kind) for name in WRITTEN for kind in HOLDS[name]])
@pytest.mark.parametrize("family", tiny.BASES)
def test_what_is_written_is_read_bit_for_bit(family: str, layout: str, kind: str, tmp_path: Path) -> None:
    alpha = 3 if (layout, kind) == ("diffusers", "lokr") else 2  # diffusers' LoKr has no alpha
    networks, file = lora(kind, family, alpha=alpha)
    write_lora(file, tmp_path / "a.safetensors", layout, networks)
    again = read_lora(tmp_path / "a.safetensors", networks)
    assert again.layout == layout
    if (layout, kind) != ("diffusers", "lokr"):
        assert_same_file(again, file)
    write_lora(again, tmp_path / "b.safetensors", layout, networks)
    assert_same_file(read_lora(tmp_path / "b.safetensors", networks), again)
    one, other = (load_tensors(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one[0].keys() == other[0].keys()
    assert one[1] == other[1]


@pytest.mark.parametrize("source", WRITTEN)
@pytest.mark.parametrize("target", WRITTEN)
def test_every_layout_turns_into_every_other(source: str, target: str, tmp_path: Path) -> None:
    networks, file = lora("dora", "sdxl", rank_pattern={"to_q$": 2}, alpha_pattern={"conv1$": 1.5})
    write_lora(file, tmp_path / "a.safetensors", source, networks)
    write_lora(read_lora(tmp_path / "a.safetensors", networks), tmp_path / "b.safetensors", target, networks)
    assert_same_file(read_lora(tmp_path / "b.safetensors", networks), file)


@pytest.mark.parametrize("layout", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_in_half_precision_alphas_stay_exact(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    networks, file = lora(alpha=1000.1)
    write_lora(file, tmp_path / "a.safetensors", layout, networks, dtype)
    again = read_lora(tmp_path / "a.safetensors", networks)
    for network, own in file.modules.items():
        for path, factors in own.items():
            read = again.modules[network][path]
            assert read.scale == pytest.approx(factors.scale, rel=1e-7)
            assert all(torch.equal(read.tensors[n], v.to(dtype)) for n, v in factors.tensors.items())


def full_size(family: str) -> LoraFile:
    """One module of each network of a family of full size, beside attention that tells the family."""
    generator = torch.Generator().manual_seed(0)
    modules: dict[str, dict[str, Factors]] = {}
    for network, shapes in family_shapes(family).items():
        ends = ("attn2.to_k", "conv1") if network == "unet" else ("layers.3.self_attn.q_proj", "layers.3.mlp.fc1")
        for path in (next(path for path in shapes if path.endswith(end)) for end in ends):
            o, i, *kernel = shapes[path]
            down = torch.randn(2, i, *kernel, generator=generator)
            up = torch.randn(o, 2, *(1 for _ in kernel), generator=generator)
            modules.setdefault(network, {})[path] = Factors("lora", {"down": down, "up": up}, torch.tensor(1.0))
    return LoraFile(modules=modules)


@pytest.mark.parametrize("layout", WRITTEN)
@pytest.mark.parametrize("family", UNETS)
def test_without_a_model_the_file_says_its_family(family: str, layout: str, tmp_path: Path) -> None:
    file = full_size(family)
    write_lora(file, tmp_path / "a.safetensors", layout)
    again = read_lora(tmp_path / "a.safetensors")
    assert_same_file(again, file)
    if layout == "kohya" and family != "sdxl-refiner":
        expected = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[family]
        assert again.metadata["ss_base_model_version"] == expected


def test_kohya_files_of_sdxl_have_the_original_names() -> None:
    tensors, _ = to_tensors(full_size("sdxl"), "kohya")
    stems = {key.split(".")[0] for key in tensors}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k" in stems
    assert "lora_te1_text_model_encoder_layers_3_self_attn_q_proj" in stems
    assert "lora_te2_text_model_encoder_layers_3_mlp_fc1" in stems
    tensors, _ = to_tensors(full_size("sd1"), "kohya")
    stems = {key.split(".")[0] for key in tensors}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k" in stems
    assert "lora_te_text_model_encoder_layers_3_mlp_fc1" in stems


def test_comfyui_files_have_the_names_of_its_modules() -> None:
    for family, tower in (("sd1", "clip_l"), ("sd2", "clip_h"), ("sdxl", "clip_g")):
        tensors, _ = to_tensors(full_size(family), "comfyui")
        where = f"text_encoders.{tower}.transformer.text_model.encoder.layers.3.mlp.fc1"
        assert {f"{where}.lora_down.weight", f"{where}.lora_up.weight", f"{where}.alpha"} <= set(tensors)
        assert any(key.startswith("diffusion_model.input_blocks.") for key in tensors)


def test_the_header_of_a_kohya_file(tmp_path: Path) -> None:
    networks, file = lora("lokr", "sd1", targets=("attention",), rank=2, alpha=1)
    file = LoraFile(modules=file.modules, metadata={"ss_output_name": "mine", "sshs_model_hash": "old"})
    write_lora(file, tmp_path / "a.safetensors", "kohya", networks)
    tensors, header = load_tensors(tmp_path / "a.safetensors")
    assert header["ss_network_module"] == "lycoris.kohya"
    assert json.loads(header["ss_network_args"]) == {"algo": "lokr"}
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "1.0")
    assert header["ss_output_name"] == "mine"
    assert header["sshs_model_hash"] == kohya_hash(tensors) != "old"
    content = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert header["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()


def test_kohya_files_give_every_module_an_alpha_where_any_has_one() -> None:
    """diffusers scales a module without one by the commonest alpha of the others."""
    networks, file = lora(targets=("attention",))
    unet = dict(file.modules["unet"])
    path = next(iter(unet))
    unet[path] = Factors("lora", unet[path].tensors)
    tensors, _ = to_tensors(LoraFile(modules={"unet": unet}), "kohya", shapes_of(networks))
    again = from_tensors(tensors, {}, shapes_of(networks))
    assert again.modules["unet"][path].scale == 1.0
    assert again.modules["unet"][path].alpha is not None


# --- what others write ---


def old_attention_keys(file: LoraFile) -> dict[str, torch.Tensor]:
    """Keys as diffusers wrote them before peft, when attention processors held the adapters."""
    keys: dict[str, torch.Tensor] = {}
    for path, factors in file.modules["unet"].items():
        block, part = path.split(".to_")
        stem = f"unet.{block}.processor.to_{part.removesuffix('.0')}_lora"
        keys |= {f"{stem}.down.weight": factors.tensors["down"], f"{stem}.up.weight": factors.tensors["up"]}
    for path, factors in file.modules["text_encoder"].items():
        block, part = path.rsplit(".", 1)
        stem = f"text_encoder.text_model.{block}.to_{part.removesuffix('_proj')}_lora"
        keys |= {f"{stem}.down.weight": factors.tensors["down"], f"{stem}.up.weight": factors.tensors["up"]}
    return keys


@pytest.mark.parametrize("prefixed", [True, False])
def test_attention_processors_of_old_diffusers(prefixed: bool) -> None:
    networks, file = lora(targets=("attention",), alpha=None)
    keys = old_attention_keys(file)
    if not prefixed:
        keys = {key.removeprefix("unet."): value for key, value in keys.items() if key.startswith("unet.")}
    again = from_tensors(keys, {}, shapes_of(networks))
    assert again.layout == "diffusers"
    expected = file.modules if prefixed else {"unet": file.modules["unet"]}
    without_alpha = {n: {p: Factors("lora", f.tensors) for p, f in own.items()} for n, own in expected.items()}
    assert_same_file(again, LoraFile(modules=without_alpha))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_folders(kind: str, use_rslora: bool, tmp_path: Path) -> None:
    if use_rslora and kind not in ("lora", "dora"):
        return
    networks, tuned = trained(kind, rank_pattern={"to_q$": 2}, alpha_pattern={"to_k$": 5}, use_rslora=use_rslora)
    file = LoraFile(modules={"unet": trained_lora(tuned).modules["unet"]})
    state = get_peft_model_state_dict(tuned["unet"])
    state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    tuned["unet"].peft_config["default"].save_pretrained(tmp_path)
    again = read_lora(tmp_path / "adapter_model.safetensors", networks)
    assert again.layout == "peft"
    for path, factors in file.modules["unet"].items():
        weight = torch.randn(shapes_of(networks)["unet"][path], generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(delta(again.modules["unet"][path], weight), delta(factors, weight))


def test_a_peft_file_without_its_settings_is_scaled_by_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    networks, file = lora(targets=("attention",))
    state = {
        f"base_model.model.{path}.lora_{letter}.weight": factors.tensors[name]
        for path, factors in file.modules["unet"].items()
        for letter, name in (("A", "down"), ("B", "up"))
    }
    save_file(state, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        again = read_lora(tmp_path / "a.safetensors", networks)
    assert "no adapter_config.json beside it" in caplog.text
    assert {factors.scale for factors in again.modules["unet"].values()} == {1.0}


def test_comfyui_files_with_pefts_spelling(tmp_path: Path) -> None:
    networks, file = lora(targets=("attention",))
    tensors, _ = to_tensors(file, "comfyui", shapes_of(networks))
    renamed = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in tensors.items()}
    assert renamed.keys() != tensors.keys()
    assert_same_file(from_tensors(renamed, {}, shapes_of(networks)), file)


def test_magnitudes_of_inputs_as_lycoris_writes_them() -> None:
    networks, file = lora(targets=("attention",))
    tensors, _ = to_tensors(file, "kohya", shapes_of(networks))
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    width = networks["unet"].config["cross_attention_dim"]
    tensors[f"{stem}.dora_scale"] = torch.rand(1, width) + 0.5
    again = from_tensors(tensors, {}, shapes_of(networks))
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    weight = torch.randn(shapes_of(networks)["unet"][path])
    columns = (weight + delta(again.modules["unet"][path], weight)).norm(dim=0)
    torch.testing.assert_close(columns, tensors[f"{stem}.dora_scale"][0])
    with pytest.raises(UserError, match="diffusers has one sort of adapter in a network"):
        to_tensors(again, "diffusers", shapes_of(networks))
    only = LoraFile(modules={"unet": {path: again.modules["unet"][path]}})
    with pytest.raises(UserError, match="DoRA of LoRA's outputs only; use kohya or comfyui"):
        to_tensors(only, "diffusers", shapes_of(networks))


def test_a_tucker_lora_becomes_a_plain_one_for_diffusers() -> None:
    networks, _ = lora()
    path = "mid_block.resnets.0.conv1"
    o, i, *kernel = shapes_of(networks)["unet"][path]
    factors = Factors(
        "lora",
        {"down": torch.randn(2, i, 1, 1), "mid": torch.randn(2, 2, *kernel), "up": torch.randn(o, 2, 1, 1)},
        torch.tensor(1.0),
    )
    file = LoraFile(modules={"unet": {path: factors}})
    tensors, header = to_tensors(file, "diffusers", shapes_of(networks))
    again = from_tensors(tensors, header, shapes_of(networks)).modules["unet"][path]
    assert set(again.tensors) == {"down", "up"}
    weight = torch.zeros(o, i, *kernel)
    torch.testing.assert_close(delta(again, weight), delta(factors, weight))
    tensors, _ = to_tensors(file, "kohya", shapes_of(networks))
    assert_same_file(from_tensors(tensors, {}, shapes_of(networks)), file)


# --- what cannot be used ---


@pytest.mark.parametrize("layout", WRITTEN)
def test_a_lora_of_another_family_says_what_it_looks_like(layout: str, tmp_path: Path) -> None:
    write_lora(full_size("sdxl"), tmp_path / "a.safetensors", layout)
    with pytest.raises(UserError) as error:
        read_lora(tmp_path / "a.safetensors", tiny.networks("sd1"))
    text = str(error.value)
    assert f"looks like a LoRA in the {layout} layout of Stable Diffusion XL" in text
    assert "18 keys" in text or "12 keys" in text
    assert "such as" in text
    assert "\n" not in text


def test_names_that_fit_with_shapes_that_do_not(tmp_path: Path) -> None:
    write_lora(full_size("sd2"), tmp_path / "a.safetensors", "kohya")
    with pytest.raises(UserError, match=r"does not fit the model's .*looks like a LoRA in the kohya layout of Stable"):
        read_lora(tmp_path / "a.safetensors", {"unet": tiny.networks("sd1")["unet"]})


def test_a_file_that_is_no_lora(tmp_path: Path) -> None:
    save_file({"model.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    for networks in (None, tiny.networks("sd1")):
        with pytest.raises(UserError, match=r"looks like no LoRA in a layout that is known \(1 keys, such as model.w"):
            read_lora(tmp_path / "a.safetensors", networks)


def test_a_few_keys_too_many_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    networks, file = lora(targets=("attention",))
    tensors, _ = to_tensors(file, "kohya", shapes_of(networks))
    with caplog.at_level(logging.WARNING):
        again = from_tensors({**tensors, "lora_unet_nowhere.alpha": torch.ones(())}, {}, shapes_of(networks), "x")
    assert f"1 of {len(tensors) + 1} keys of the kohya layout fit no module" in caplog.text
    assert "lora_unet_nowhere.alpha" in caplog.text
    assert_same_file(again, file)
    many = {f"lora_unet_nowhere_{n}.alpha": torch.ones(()) for n in range(len(tensors) + 1)}
    with pytest.raises(UserError, match=rf"{len(many)} of its {len(many) + len(tensors)} keys fit no module"):
        from_tensors({**tensors, **many}, {}, shapes_of(networks), "x")


def test_half_of_a_module_is_an_error() -> None:
    networks, file = lora(targets=("attention",))
    tensors, _ = to_tensors(file, "kohya", shapes_of(networks))
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    with pytest.raises(UserError, match="has no up of lora beside it; the file is broken, fetch it again"):
        from_tensors({k: v for k, v in tensors.items() if k != key}, {}, shapes_of(networks))
    stem = key.removesuffix(".lora_up.weight")
    with pytest.raises(UserError, match="belongs to lokr and lora factors"):
        from_tensors({**tensors, f"{stem}.lokr_w1": torch.ones(1, 1)}, {}, shapes_of(networks))
    twice = {k.replace("lora_te_", "lora_te1_"): v for k, v in tensors.items()}
    with pytest.raises(UserError, match="are the same tensor; remove one of them"):
        from_tensors({**tensors, **twice}, {}, shapes_of(networks))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_lora(tmp_path / "none.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_lora(tmp_path / "half.safetensors")


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    networks, file = lora(targets=("attention",))
    tensors, _ = to_tensors(file, "diffusers", shapes_of(networks))
    for broken in ("{", "[]"):
        with pytest.raises(UserError, match="settings are not"):
            from_tensors(tensors, {"lora_adapter_metadata": broken}, shapes_of(networks), "x")


def test_what_a_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    networks, file = lora("loha", targets=("attention",))
    with pytest.raises(UserError, match=r"the diffusers layout has no loha\.w1_a; use kohya or comfyui"):
        write_lora(file, tmp_path / "a.safetensors", "diffusers", networks)
    pool = "add_embedding.pool.q_proj"
    factors = Factors("lora", {"down": torch.ones(1, 4), "up": torch.ones(4, 1)})
    with pytest.raises(UserError, match=f"comfyui has no name for unet {pool}; use kohya or diffusers"):
        to_tensors(LoraFile(modules={"unet": {pool: factors}}), "comfyui", {"unet": {pool: torch.Size([4, 4])}})
    with pytest.raises(UserError, match='layout "peft" cannot be written; use kohya, comfyui, diffusers'):
        write_lora(file, tmp_path / "a.safetensors", "peft", networks)
    with pytest.raises(UserError, match="for no family of models that is known; name the model"):
        write_lora(file, tmp_path / "a.safetensors", "kohya")
    with pytest.raises(UserError, match="the model has no text_encoder encoder"):
        write_lora(file, tmp_path / "a.safetensors", "kohya", {"unet": networks["unet"]})
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    networks, file = lora(targets=("attention",))
    unet = copy.deepcopy(dict(file.modules["unet"]))
    next(iter(unet.values())).tensors["up"][0] = 1e6
    with pytest.raises(FloatingPointError, match="not finite"):
        write_lora(LoraFile(modules={"unet": unet}), tmp_path / "a.safetensors", "kohya", networks, torch.float16)
    assert not list(tmp_path.iterdir())


def test_kohya_files_that_diffusers_reads_wrongly_are_named(caplog: pytest.LogCaptureFixture) -> None:
    networks, file = lora(targets=("q_proj$", "to_q$"))
    with caplog.at_level(logging.WARNING):
        to_tensors(file, "kohya", shapes_of(networks))
    assert "no adapter at encoder.layers.0.self_attn.out_proj" in caplog.text
    caplog.clear()
    networks, file = lora(targets=("attention",), alpha_pattern={"to_q$|q_proj$": 1})
    with caplog.at_level(logging.WARNING):
        to_tensors(file, "kohya", shapes_of(networks))
    assert "alphas differ between modules" in caplog.text


def test_networks_without_an_adapter_are_not_in_the_file() -> None:
    with pytest.raises(UserError, match="none of unet, text_encoder has an adapter"):
        trained_lora(tiny.networks("sd1"))


def test_written_files_open_with_the_library(tmp_path: Path) -> None:
    networks, file = lora(targets=("attention",))
    write_lora(file, tmp_path / "deep" / "a.safetensors", "kohya", networks)
    expected, _ = to_tensors(file, "kohya", shapes_of(networks))
    loaded = load_file(tmp_path / "deep" / "a.safetensors")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
