"""Models of every family, from a folder to a single file and back, with what the file says of itself and without."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentgen.core.errors import UserError
from latentgen.formats.component_configs import tiny_vae_config
from latentgen.formats.families import CONFIGS, recognise
from latentgen.formats.folder_parts import parts_of_folder, write_folder_from
from latentgen.formats.headers import read_header
from latentgen.formats.model_folder import load_model
from latentgen.formats.original.layouts import LAYOUTS
from latentgen.formats.original.renaming import to_original
from latentgen.formats.parts import Parts
from latentgen.formats.single_file.read import V_WITNESS, Wishes, read_single_file
from latentgen.formats.single_file.write import write_single_file

VARIANTS = ("ssd-1b", "vega", "koala", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")


def assert_equal(one: Parts, other: Parts) -> None:
    assert one.states.keys() == other.states.keys()
    for part, state in one.states.items():
        assert state.keys() == other.states[part].keys()
        for key, value in state.items():
            assert value.dtype == other.states[part][key].dtype
            assert torch.equal(value, other.states[part][key]), f"{part}/{key}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`written(name)`: the parts of a tiny model and its single file; not to be changed."""
    folder = tmp_path_factory.mktemp("files")

    def make(name: str) -> tuple[Parts, Path]:
        parts, path = parts_of_folder(published.saved(name)), folder / f"{name}.safetensors"
        if not path.exists():
            write_single_file(parts, path)
        return parts, path

    return make


@pytest.fixture
def bare(written: Any, tmp_path: Path) -> Any:
    """`bare(name, change)`: the file as others write it, without our metadata, after `change(tensors)`."""

    def make(name: str, change: Any = None, metadata: dict[str, str] | None = None) -> Path:
        tensors = load_file(written(name)[1])
        if change is not None:
            tensors = change(tensors) or tensors
        save_file(tensors, tmp_path / "bare.safetensors", metadata)
        return tmp_path / "bare.safetensors"

    return make


@pytest.mark.parametrize("name", published.UNETS)
def test_folder_to_file_to_folder_is_exact(name: str, written: Any, tmp_path: Path) -> None:
    parts, path = written(name)
    again = read_single_file(path)
    assert_equal(parts, again)
    assert again.family == parts.family == published.family(name)
    assert again.configs == parts.configs
    assert (again.scheduler, again.pipeline) == (parts.scheduler, parts.pipeline)
    write_folder_from(again, tmp_path / "again")
    assert_equal(parts, parts_of_folder(tmp_path / "again"))
    if name not in LAYOUTS:  # of the others the texts and the pictures are the same once more
        return
    write_single_file(parts_of_folder(tmp_path / "again"), tmp_path / "again.safetensors")
    first, second = load_file(path), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", published.UNETS)
def test_shapes_alone_say_the_configurations(name: str, written: Any, bare: Any) -> None:
    parts, _ = written(name)
    path = bare(name)
    again = read_single_file(path)
    assert_equal(parts, again)
    for part, config in again.configs.items():
        own = parts.configs[part]
        differing = {key for key, value in config.items() if own.get(key) != value}
        # Two words for one structure; and the side of the training pictures, which no tensor tells.
        assert differing <= {
            "sample_size",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
            "architectures",
        }, part
    found = recognise(read_header(path))
    assert (found.kind, found.family) == ("model", published.family(name))
    assert found.variant == (name if name in VARIANTS else None)
    assert found.in_channels == parts.configs["unet"]["in_channels"]
    assert again.pipeline["_class_name"] == parts.pipeline["_class_name"]
    expected = {"v": "v_prediction", "eps": "epsilon"}[published.prediction(name)]
    assert again.scheduler["prediction_type"] == expected
    assert again.tokenizers.keys() == parts.tokenizers.keys()


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_the_files_have_the_names_of_the_original_programs(name: str, written: Any) -> None:
    names = set(load_file(written(name)[1]))
    for place in LAYOUTS[name].values():
        assert any(key.startswith(place.prefix) for key in names)
    expected = {
        "sd1": "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
        "sd2": "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight",
        "sdxl": "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc.bias",
        "sdxl-refiner": "conditioner.embedders.0.model.text_projection",
    }
    assert expected[name] in names
    assert "first_stage_model.decoder.up.1.block.0.conv1.weight" in names
    assert "model.diffusion_model.output_blocks.0.0.in_layers.2.weight" in names


def test_a_model_of_our_own_comes_back_with_its_words_and_its_history(tiny_model: Any, tmp_path: Path, caplog) -> None:
    from latentgen.formats.model_folder import save_model

    save_model(tiny_model("flow", recipe={"name": "mine"}), tmp_path / "model")
    parts = parts_of_folder(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        write_single_file(parts, tmp_path / "mine.safetensors")
    assert "other programs" in caplog.text
    assert "flow" in caplog.text
    write_folder_from(read_single_file(tmp_path / "mine.safetensors"), tmp_path / "again")
    ours, again = load_model(tmp_path / "model"), load_model(tmp_path / "again")
    assert (again.prediction, again.schedule, again.metadata) == (ours.prediction, ours.schedule, ours.metadata)
    assert again.towers[0].tokenizer.get_vocab() == ours.towers[0].tokenizer.get_vocab()
    for part in ("unet", "vae", "text_encoder"):
        one, other = ours.networks()[part].state_dict(), again.networks()[part].state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert "vocabulary is not CLIP's" in caplog.text


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_half_precision_is_stored_and_comes_back(dtype: torch.dtype, digits: str, written: Any, tmp_path: Path) -> None:
    parts, _ = written("sdxl")
    write_single_file(parts, tmp_path / "half.safetensors", dtype)
    found = recognise(read_header(tmp_path / "half.safetensors"))
    assert set(found.dtypes.values()) == {(digits,)}
    again = read_single_file(tmp_path / "half.safetensors")
    key = "conv_in.weight"
    assert torch.equal(again.states["unet"][key], parts.states["unet"][key].to(dtype))


def test_numbers_too_large_for_half_precision_are_refused(written: Any, tmp_path: Path) -> None:
    parts, _ = written("sd1")
    vae = {**parts.states["vae"], "decoder.conv_in.bias": torch.full((64,), 7e4)}
    large = replace(parts, states={**parts.states, "vae": vae})
    for write, path in ((write_single_file, tmp_path / "a.safetensors"), (write_folder_from, tmp_path / "a")):
        with pytest.raises(UserError, match=r"vae/decoder.conv_in.bias.*float16.*--dtype bf16"):
            write(large, path, torch.float16)
        assert not path.exists()


def test_zero_terminal_snr_has_its_mark(written: Any, bare: Any, tmp_path: Path) -> None:
    parts, _ = written("sdxl-v")
    told = replace(parts, scheduler={**parts.scheduler, "rescale_betas_zero_snr": True})
    write_single_file(told, tmp_path / "z.safetensors")
    tensors = load_file(tmp_path / "z.safetensors")
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0
    save_file(tensors, tmp_path / "plain.safetensors")
    again = read_single_file(tmp_path / "plain.safetensors").scheduler
    assert (again["prediction_type"], again["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert "v_pred" not in load_file(written("sdxl")[1])


@pytest.mark.parametrize(("spread", "guess"), [(0.01, "epsilon"), (0.5, "v_prediction")])
def test_sd2_is_told_by_one_tensor_and_says_so(spread: float, guess: str, bare: Any, caplog) -> None:
    name = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    path = bare("sd2", lambda tensors: tensors | {name: spread * torch.randn_like(tensors[name])})
    with caplog.at_level(logging.WARNING):
        parts = read_single_file(path)
    assert V_WITNESS in parts.states["unet"]
    assert parts.scheduler["prediction_type"] == guess
    assert parts.configs["unet"]["sample_size"] == {"epsilon": 64, "v_prediction": 96}[guess]
    assert "--prediction" in caplog.text


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd1"])
def test_the_user_may_say_the_prediction(name: str, bare: Any, written: Any, caplog) -> None:
    for path in (bare(name), written(name)[1]):
        again = read_single_file(path, Wishes(prediction="v"))
        assert again.scheduler["prediction_type"] == "v_prediction"
    assert "--prediction" not in caplog.text


def test_sd2_text_towers_of_all_lengths_are_read(written: Any, bare: Any) -> None:
    parts, _ = written("sd2")
    state = parts.states["text_encoder"]

    def short(tensors: dict[str, Any]) -> dict[str, Any]:
        """As diffusers' script writes it: without the layer that is not read, and without the projection."""
        prefix = "cond_stage_model.model."
        gone = (f"{prefix}transformer.resblocks.2.", f"{prefix}text_projection")
        return {key: value for key, value in tensors.items() if not key.startswith(gone)}

    again = read_single_file(bare("sd2", short)).states["text_encoder"]
    assert again.keys() == state.keys()
    assert all(torch.equal(value, again[key]) for key, value in state.items())


def test_sd2_in_the_later_layout_and_sd1_without_text_model_are_read(written: Any, bare: Any) -> None:
    def later(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): v for k, v in tensors.items()}

    def older(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k.replace("transformer.text_model.", "transformer."): v for k, v in tensors.items()}

    for name, change in (("sd2", later), ("sd1", older)):
        again = read_single_file(bare(name, change))
        assert again.family == name
        assert_equal(written(name)[0], again)


def test_averaged_weights_are_an_option(bare: Any) -> None:
    def with_averages(tensors: dict[str, Any]) -> dict[str, Any]:
        average = {
            "model_ema." + key.removeprefix("model.").replace(".", ""): value + 1
            for key, value in tensors.items()
            if key.startswith("model.diffusion_model.")
        }
        return tensors | average | {"model_ema.decay": torch.tensor(0.9999), "betas": torch.ones(1000)}

    path = bare("sd1", with_averages)
    last = read_single_file(path).states["unet"]
    averaged = read_single_file(path, Wishes(ema=True)).states["unet"]
    assert all(torch.equal(value + 1, averaged[key]) for key, value in last.items())
    with pytest.raises(UserError, match="no averaged weights"):
        read_single_file(bare("sd1"), Wishes(ema=True))


def test_what_belongs_nowhere_is_said_once(bare: Any, caplog) -> None:
    more = {"model.diffusion_model.strange.weight": torch.ones(2), "elsewhere.bias": torch.ones(2)}
    with caplog.at_level(logging.WARNING):
        read_single_file(bare("sd1", lambda tensors: tensors | more))
    assert caplog.text.count("left out") == 1
    assert "2 tensors" in caplog.text


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("model.diffusion_model.time_embed.0.bias", "unet.*time_embedding.linear_1.bias"),
        ("first_stage_model.quant_conv.bias", "vae.*quant_conv.bias"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder.*final_layer_norm.bias"),
        ("model.diffusion_model.output_blocks.1.", "not whole"),
    ],
)
def test_missing_tensors_are_named(gone: str, said: str, bare: Any) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_single_file(bare("sd1", lambda t: {key: value for key, value in t.items() if not key.startswith(gone)}))
    assert "\n" not in str(caught.value)


def test_networks_alone_become_folders_of_their_classes(written: Any, bare: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    parts, _ = written("sd1")
    kinds = {
        "first_stage_model.": ("vae", AutoencoderKL),
        "model.diffusion_model.": ("unet", UNet2DConditionModel),
        "cond_stage_model.transformer.": ("text_encoder", CLIPTextModel),
    }
    for prefix, (part, kind) in kinds.items():
        for keep in ("", prefix):

            def only(tensors: dict[str, Any], prefix: str = prefix, keep: str = keep) -> dict[str, Any]:
                own = {key: value for key, value in tensors.items() if key.startswith(prefix)}
                return {key.replace(prefix, keep): value for key, value in own.items()}

            alone = read_single_file(bare("sd1", only))
            assert list(alone.states) == [part]
            target = tmp_path / f"{part}-{bool(keep)}"
            write_folder_from(alone, target)
            network = kind.from_pretrained(target, local_files_only=True)
            assert len(network.state_dict()) == len(parts.states[part])


def test_a_unet_alone_takes_the_rest_from_a_base(written: Any, bare: Any) -> None:
    parts, _ = written("sdxl")
    unet = {key: value + 1 for key, value in parts.states["unet"].items()}
    changed = to_original("unet", unet)[0]
    alone = bare("sdxl", lambda _: changed)
    again = read_single_file(alone, Wishes(base=published.saved("sdxl")))
    assert_equal(replace(parts, states={**parts.states, "unet": unet}), again)
    assert again.tokenizers == parts.tokenizers
    with pytest.raises(UserError, match="the configuration says"):
        read_single_file(alone, Wishes(base=published.saved("sdxl-inpaint")))


def test_tiny_autoencoders_are_read_and_renamed_both_ways(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
    )
    state: dict[str, Any] = vae.state_dict()
    original, left = to_original("tiny_vae", state)
    assert not left
    assert "taesd_decoder.1.weight" in original, "the original counts the clamp that comes first"
    save_file(original, tmp_path / "taesd.safetensors")
    found = recognise(read_header(tmp_path / "taesd.safetensors"))
    assert found.kind == "tiny_vae"
    parts = read_single_file(tmp_path / "taesd.safetensors")
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        key: tuple(value.shape) for key, value in parts.states["vae"].items()
    }
    config = tiny_vae_config({key: tuple(value.shape) for key, value in state.items()})
    assert (config["num_encoder_blocks"], config["num_decoder_blocks"]) == ([1, 2], [2, 1])
    write_folder_from(parts, tmp_path / "out")
    opened = AutoencoderTiny.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, opened[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(4, 8)}, "latentgen lora"),
        ({"emb_params": torch.ones(2, 768)}, "embedding"),
        ({"control_model.input_hint_block.0.weight": torch.ones(2)}, "ControlNet"),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(2)}, "Flux"),
        ({"something.weight": torch.ones(2, 2)}, "unknown"),
    ],
)
def test_other_files_are_refused_by_name(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        read_single_file(tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


def test_widths_that_the_family_does_not_fit_ask_for_a_base(bare: Any, tiny_model: Any, tmp_path: Path) -> None:
    from latentgen.formats.model_folder import save_model

    save_model(tiny_model("eps"), tmp_path / "model")
    write_single_file(parts_of_folder(tmp_path / "model"), tmp_path / "own.safetensors")
    save_file(load_file(tmp_path / "own.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="--base FOLDER"):
        read_single_file(tmp_path / "bare.safetensors")
    again = read_single_file(tmp_path / "bare.safetensors", Wishes(base=tmp_path / "model"))
    assert_equal(parts_of_folder(tmp_path / "model"), again)


def test_the_file_says_its_configurations_in_json(written: Any) -> None:
    header = read_header(written("sdxl-v")[1])
    assert json.loads(header.metadata[CONFIGS])["family"] == "sdxl"
    spec = {key.removeprefix("modelspec."): value for key, value in header.metadata.items()}
    assert spec["architecture"] == "stable-diffusion-xl-v1-base"
    assert spec["prediction_type"] == "v"
    assert spec["sai_model_spec"] == "1.0.1"
    assert "tokenizers" not in json.loads(header.metadata[CONFIGS]), "CLIP's own need not be said"


def test_a_single_file_is_a_whole_model_and_named_so(written: Any, tmp_path: Path) -> None:
    parts, _ = written("sd1")
    with pytest.raises(UserError, match=r"\.safetensors file"):
        write_single_file(parts, tmp_path / "model.ckpt")
    alone = replace(parts, states={"vae": parts.states["vae"]})
    with pytest.raises(UserError, match="only vae"):
        write_single_file(alone, tmp_path / "model.safetensors")
    broken = dict(parts.states["unet"])
    broken.pop("conv_in.bias")
    with pytest.raises(UserError, match=r"conv_in\.bias"):
        write_single_file(replace(parts, states={**parts.states, "unet": broken}), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
