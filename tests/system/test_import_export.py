"""latentgen import, export and info, as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentgen.cli.main import app
from latentgen.cli.sample import SHIPPED
from latentgen.core.errors import UserError
from latentgen.core.files import file_sha256
from latentgen.formats.families import CONFIGS
from latentgen.formats.model_folder import load_model, save_model
from latentgen.pipelines.generate import Request, generate


def latentgen(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "shapes.safetensors"
    latentgen("export", SHIPPED, path, "--title", "Shapes", "--license", "apache-2.0", "--author", "me")
    return path


def test_the_shipped_model_draws_the_same_picture_after_a_single_file(single: Path, tmp_path: Path) -> None:
    latentgen("import", single, tmp_path / "again")
    first, second = load_model(SHIPPED), load_model(tmp_path / "again")
    assert first.metadata == second.metadata
    request = Request("a red circle", seed=3, num_inference_steps=4)
    (one,), (other,) = generate(first, [request]), generate(second, [request])
    assert one.tobytes() == other.tobytes()


def test_info_says_what_a_file_is(single: Path, capsys) -> None:
    latentgen("info", single, "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["family"], told["prediction"]) == ("model", "sd1", "v")
    assert told["parts"]["unet"] == {"parameters": 4409348, "precision": ["F16"]}
    assert told["hashes"]["sha256"] == file_sha256(single)
    assert told["modelspec"]["title"] == "Shapes"
    assert told["modelspec"]["hash_sha256"] == "0x" + told["hashes"]["tensors"]
    assert told["trained"]["recipe"] == "shapes"
    latentgen("info", single)
    text = capsys.readouterr().out
    assert "Stable Diffusion 1.x, v prediction" in text
    assert "trained: steps 11000" in text


def test_info_says_what_a_folder_is(capsys) -> None:
    latentgen("info", SHIPPED, "--json", "--no-hashes")
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["family"], told["prediction"], told["in_channels"]) == ("model", "sd1", "v", 4)
    assert "hashes" not in told
    assert sum(part["parameters"] for part in told["parts"].values()) == 4409348 + 165135 + 483840


def test_info_says_what_kohya_wrote_of_a_lora(tmp_path: Path, capsys) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(8, 768), f"{name}.lora_up.weight": torch.ones(320, 8)}
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_network_dim": "8", "ss_output_name": "cat", "ss_steps": "9"})
    latentgen("info", tmp_path / "lora.safetensors", "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["layout"], told["family"], told["details"]["rank"]) == ("lora", "kohya", "sd1", 8)
    assert told["trained"] == {"name": "cat", "rank": "8", "steps": "9"}


def test_export_stores_another_precision_and_another_layout(single: Path, tmp_path: Path) -> None:
    latentgen("export", single, tmp_path / "whole", "--format", "diffusers", "--dtype", "fp32")
    weights = load_file(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    latentgen("export", tmp_path / "whole", tmp_path / "half.safetensors", "--dtype", "fp16")
    first, second = load_file(single), load_file(tmp_path / "half.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_contrastive_towers_go_with_folders_and_are_missed_in_files(
    tiny_builder, clip_builder, tmp_path: Path, capsys
) -> None:
    model = tiny_builder()
    save_model(model, tmp_path / "model", clip=clip_builder(len(model.towers[0].tokenizer)))
    latentgen("export", tmp_path / "model", tmp_path / "copy", "--format", "diffusers")
    for file in (tmp_path / "model" / "clip").iterdir():
        assert (tmp_path / "copy" / "clip" / file.name).read_bytes() == file.read_bytes()
    assert "left out" not in capsys.readouterr().err
    latentgen("export", tmp_path / "model", tmp_path / "one.safetensors", "--format", "single-file")
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert said == [
        f"warning: {tmp_path}/model/clip, the contrastive towers, is left out: only a folder has a place for it; "
        f"keep {tmp_path}/model to train on"
    ]


def test_a_file_without_its_tokenizer_says_where_to_take_one(single: Path, tmp_path: Path) -> None:
    with safe_open(single, "pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata[CONFIGS])
    del told["tokenizers"]
    save_file(load_file(single), tmp_path / "mute.safetensors", {**metadata, CONFIGS: json.dumps(told)})
    with pytest.raises(UserError, match=r"mute\.safetensors.*brings no tokenizer; name .* with --base FOLDER"):
        latentgen("import", tmp_path / "mute.safetensors", tmp_path / "folder")
    latentgen("import", tmp_path / "mute.safetensors", tmp_path / "folder", "--base", SHIPPED)
    for file in (Path(SHIPPED) / "tokenizer").iterdir():
        assert (tmp_path / "folder" / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def test_weights_that_float16_cannot_hold_are_not_stored(tiny_builder, tmp_path: Path) -> None:
    model = tiny_builder()
    with torch.no_grad():
        model.vae.decoder.conv_in.weight.mul_(1e7)
    save_model(model, tmp_path / "model")
    for target in ("half.safetensors", "half"):
        words = ["--format", "single-file" if target.endswith("s") else "diffusers", "--dtype", "fp16"]
        with pytest.raises(UserError, match=r"vae/decoder.conv_in.weight .*save with --dtype bf16 or --dtype fp32"):
            latentgen("export", tmp_path / "model", tmp_path / target, *words)
        assert not (tmp_path / target).exists()


def test_a_pickle_is_refused_with_a_command_that_works(single: Path, tmp_path: Path) -> None:
    tensors = {key: value.clone() for key, value in load_file(single).items()}
    torch.save({"state_dict": tensors}, tmp_path / "old.ckpt")
    with pytest.raises(UserError) as caught:
        latentgen("import", tmp_path / "old.ckpt", tmp_path / "folder")
    command = str(caught.value).split("with: ")[1].split()
    assert command[0] == "latentgen"
    latentgen(*command[1:])
    again = load_file(tmp_path / "old.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(value, again[key]) for key, value in tensors.items())


MISTAKES = {
    "nowhere": (["info", "absent.safetensors"], ["absent.safetensors", "there is no file"]),
    "not a model": (["import", "photo.jpg", "out"], ["photo.jpg", "no model file"]),
    "unknown type": (["export", "absent", "out", "--dtype", "fp8"], ["--dtype fp8", "fp32, fp16, bf16"]),
    "unknown family": (["import", "a.safetensors", "out", "--family", "sd9"], ["family sd9", "sdxl-refiner"]),
    "unknown prediction": (["import", "a.safetensors", "out", "--prediction", "x0"], ["prediction x0", "eps or v"]),
    "an option that does nothing": (
        ["import", "a.ckpt", "b.safetensors", "--dtype", "fp16"],
        ["--dtype", "b.safetensors"],
    ),
    "no name for a file": (["export", str(SHIPPED), "shapes.ckpt"], ["shapes.ckpt", ".safetensors"]),
    "no network": (["import", "some/repository", "out"], ["some/repository", "Hugging Face hub"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line(case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"x")
    words, said = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        latentgen(*words)
    assert "\n" not in str(caught.value)
    for piece in said:
        assert piece in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_the_commands_end_as_all_do(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "from latentgen.cli.main import run; run()", "info", str(tmp_path / "x.ckpt")]
    (tmp_path / "x.ckpt").write_bytes(b"x")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "--allow-pickle" in done.stderr
