"""The estimate of a GPU's memory: its parts are counted, its total is their sum, and it follows the settings."""

from __future__ import annotations

import pytest
import tiny as families
import torch
from torch import Tensor

from latentgen.engine.footprint import storage_bytes
from latentgen.engine.optim import build_optimizer
from latentgen.models.autoencoder import Vae, encode_moments
from latentgen.models.unet import count_parameters
from latentgen.recipe import memory
from latentgen.recipe.load import load_recipe
from latentgen.recipe.memory import (
    GIB,
    LIBRARIES,
    SPLINTERS,
    Memory,
    Setting,
    memory_of,
    optimizer_bytes,
    training_on_meta,
)
from latentgen.recipe.plan import describe
from latentgen.recipe.schema import Recipe, Train

METHODS = {
    "full": "{method: full}",
    "full + text": "{method: full, text_encoders: true}",
    "lora": "{method: lora, rank: 4}",
    "dora": "{method: dora, rank: 4}",
    "lokr": "{method: lokr, rank: 4}",
    "loha": "{method: loha, rank: 4}",
    "lora + text": "{method: lora, rank: 4, text_encoders: true}",
    "inpainting": "{method: full, inpainting: true}",
    "tokens": "{method: none, tokens: {<x>: {start: circle}}}",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random models on the disk."""
    root = tmp_path_factory.mktemp("models")
    return {family: str(families.saved(family, root / family)) for family in ("sd1", "sdxl", "sd1-inpaint", "refiner")}


def recipe_of(folder: str, *words: str) -> Recipe:
    return load_recipe(None, ["data.resolution=32", f"unet.from={folder}", "preview.prompts=[a]", *words])


def counted(folder: str, method: str) -> Memory:
    recipe = recipe_of(folder, f"finetune={METHODS[method]}")
    return memory_of(training_on_meta(recipe), Setting(32, preview=recipe.preview))[0]


@pytest.mark.parametrize(("family", "method"), [*(("sd1", method) for method in METHODS), ("sdxl", "lora + text")])
def test_every_method_is_counted(family: str, method: str, folders: dict[str, str]) -> None:
    found = counted(folders[family], method)
    training = training_on_meta(recipe_of(folders[family], f"finetune={METHODS[method]}"))
    networks = training.model.networks()
    assert set(found.weights) == set(networks)
    assert {"unet", "vae"} < set(found.weights)
    trained = [networks[name] for name in training.trains]
    count = sum(count_parameters(network, trainable_only=True) for network in trained)
    assert found.trained == 4 * count > 0
    assert found.optimizer == 8 * count
    buffers = storage_bytes(buffer for network in trained for buffer in network.buffers())
    assert found.averages == found.trained + buffers
    assert found.alone(1) < found.alone(2) < found.trained + found.further(3)
    assert found.drawing > 0


@pytest.mark.parametrize("family", ["sd1-inpaint", "refiner"])
def test_other_families_are_counted(family: str, folders: dict[str, str]) -> None:
    assert counted(folders[family], "lora").total(1) > LIBRARIES


def test_a_control_net_is_counted(folders: dict[str, str]) -> None:
    recipe = recipe_of(folders["sd1"], "finetune={method: none, control: edge}")
    training = training_on_meta(recipe)
    plain, again = memory_of(training, Setting(32, preview=recipe.preview))
    assert training.trains == ("control",)
    assert training.model.control is not None
    assert plain.trained == plain.weights["control"] == 4 * count_parameters(training.model.control)
    assert again.further(8) < plain.further(8)


def test_parts_add_up(folders: dict[str, str]) -> None:
    found = counted(folders["sd1"], "full")
    assert found.standing == sum(found.weights.values()) + found.optimizer + found.averages
    one, several = found.passing(2), found.passing(2, 3)
    assert one == max(found.alone(2), found.trained + found.update, found.trained + found.drawing)
    assert several == max(found.trained + found.further(2), found.trained + found.update, found.trained + found.drawing)
    assert found.total(2) == found.standing + one + int(SPLINTERS * one) + LIBRARIES


def test_the_largest_micro_batch_is_the_largest(folders: dict[str, str]) -> None:
    found = counted(folders["sd1"], "full")
    for capacity in (LIBRARIES + GIB // 8, 2 * GIB):
        size = found.largest(capacity)
        assert size > 0
        assert found.total(size, 2) <= capacity < found.total(size + 1, 2)
    assert found.largest(LIBRARIES) == 0


def test_what_settings_change(folders: dict[str, str]) -> None:
    recipe = recipe_of(folders["sd1"], "finetune={method: full}")
    training, setting = training_on_meta(recipe), Setting(32, preview=recipe.preview)
    plain, again = memory_of(training, setting)
    others = Train(ema_lengths=(0.05, 0.1), precision="bf16", optimizer="adamw8bit")
    other, _ = memory_of(training, Setting(64, others, recipe.preview, processes=2))
    cpu, _ = memory_of(training, Setting(32, Train(ema_device="cpu"), recipe.preview))
    assert other.averages == 3 * plain.averages
    assert cpu.averages == cpu.update == 0
    assert other.optimizer < 0.6 * plain.optimizer, "most of these weights are too small to be kept in 8 bits"
    assert (plain.buckets, other.buckets) == (0, plain.trained)
    assert again.further(8) < plain.further(8)
    assert 1.5 * plain.further(8) < other.further(8) < 4 * plain.further(8), "four times the pixels, half the width"
    assert again.weights == plain.weights


def test_pictures_that_are_encoded_in_the_step_and_their_shape_count(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_on_meta(recipe_of(folders["sd1"], "finetune={method: full}"))
    encoded: set[tuple[int, ...]] = set()

    def encode(vae: Vae, image: Tensor) -> tuple[Tensor, Tensor]:
        encoded.add(tuple(image.shape[1:]))
        return encode_moments(vae, image)

    monkeypatch.setattr(memory, "encode_moments", encode)
    plain, _ = memory._growths(training, Setting(32), checkpointing=False)
    assert not encoded
    wide, _ = memory._growths(training, Setting(32, shape=(32, 64), live=True), checkpointing=False)
    assert encoded == {(3, 32, 64)}
    assert 1.5 * plain(8) < wide(8) < 2.5 * plain(8)


def test_moments() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.LayerNorm(100))
    assert optimizer_bytes("adamw", [net]) == 8 * 10_300
    assert optimizer_bytes("adamw8bit", [net]) == 2 * 10_000 + 8 * 40 + 8 * 300
    assert optimizer_bytes("muon", [net]) == 8 * 10_300 - 4 * 10_000
    net.requires_grad_(False)
    assert optimizer_bytes("adamw", [net]) == 0


def test_moments_are_those_of_the_optimizer() -> None:
    """But for the counts of steps, a number for each parameter."""
    for kind in ("adamw", "muon"):
        net = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.LayerNorm(100))
        optimizer = build_optimizer({"net": net}, kind=kind, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
        net(torch.ones(2, 100)).sum().backward()
        optimizer.step()
        kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        assert sum(4 * v.numel() for v in kept if v.numel() > 1) == optimizer_bytes(kind, [net])


def test_the_dry_run_tells_it(folders: dict[str, str], tiny_recipe: Recipe) -> None:
    said = describe(recipe_of(folders["sdxl"], "data.resolution=64", "data.size=8", "train.micro_batch=4"))
    lines = said.splitlines()
    assert any(line.startswith("a step of 16 x 4 examples") for line in lines)
    for start in ("weights: unet", "weights: text_encoder_2", "optimizer", "averages", "total"):
        assert any(line.startswith(start) for line in lines), start
    assert [line.split()[3] for line in lines if line.startswith("largest")] == ["8", "12", "16", "24", "80"]
    assert "weights: text_encoder" in describe(tiny_recipe), "networks from nothing, too"
