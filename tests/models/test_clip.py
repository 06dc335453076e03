"""The contrastive towers: their loss over one and over two processes, and their files."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from spawned import in_two_processes
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from latentgen.core.errors import UserError
from latentgen.models.clip import (
    Clip,
    ClipForTraining,
    ClipShape,
    build_clip,
    contrastive_loss,
    load_clip,
    save_clip,
    similarity,
)

SHAPE = ClipShape(
    image_size=8,
    vision="vit",
    patch_size=4,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    text_width=8,
    text_layers=1,
    text_heads=2,
    context_length=6,
    vocab_size=20,
    eos_token_id=19,
    embed_dim=8,
)
SHAPES = {
    "vit": SHAPE,
    "resnet": dataclasses.replace(SHAPE, vision="resnet", image_size=32, vision_width=4, vision_layers=1),
}
every_tower = pytest.mark.parametrize("vision", sorted(SHAPES))


def towers(vision: str = "vit") -> Clip:
    torch.manual_seed(0)
    clip = build_clip(SHAPES[vision])
    for name, parameter in clip.named_parameters():
        if name.endswith("bn3.weight"):  # zero at first, which would hide the branch before it
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return clip


def batch(vision: str = "vit") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 18, (8, 6), generator=generator)
    ids[:, 4:] = 19
    side = SHAPES[vision].image_size
    return torch.rand(8, 3, side, side, generator=generator) * 2 - 1, ids


def test_features_have_length_one_and_the_scale_is_bounded() -> None:
    model = ClipForTraining(towers())
    out = model(*batch())
    torch.testing.assert_close(out.image.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(out.text.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(out.logit_scale, torch.tensor(1 / 0.07))
    with torch.no_grad():
        model.clip.logit_scale.fill_(9.0)
    assert model(*batch()).logit_scale.item() == pytest.approx(100.0, rel=1e-5)
    assert model.clip.logit_scale.item() == pytest.approx(math.log(100.0))


def test_loss_is_the_cross_entropy_of_matching_pairs() -> None:
    image = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    text = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    logits = 7.0 * image @ text.T
    diagonal = -(logits.log_softmax(dim=0).diagonal() + logits.log_softmax(dim=1).diagonal()).mean() / 2
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(7.0)), diagonal)
    torch.testing.assert_close(similarity(image, text), (image @ text.T).diagonal())


def with_false_captions(model: torch.nn.Module, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The loss where each picture is told from one false caption more: its own, the words moved on by two."""
    features = model(image, torch.cat([ids, torch.cat([ids[:, :1], ids[:, 1:].roll(2, dims=1)], dim=1)]))
    text, false = features.text.chunk(2)
    return contrastive_loss(features.image, text, features.logit_scale, false[:, None])


def _gradients_of_two_processes(folder: str, vision: str) -> None:
    torch.set_num_threads(1)
    image, ids = batch(vision)
    mine = slice(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4)
    model = DistributedDataParallel(ClipForTraining(towers(vision)))
    loss = with_false_captions(model, image[mine], ids[mine])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    statistics = dict(model.module.named_buffers())
    torch.save({"loss": loss.detach(), **gradients, **statistics}, Path(folder, f"{distributed.get_rank()}.pt"))


@every_tower
def test_two_processes_give_the_gradients_of_one(vision: str, tmp_path: Path) -> None:
    in_two_processes(_gradients_of_two_processes, str(tmp_path), vision)
    model = ClipForTraining(towers(vision))
    loss = with_false_captions(model, *batch(vision))
    loss.backward()
    assert loss > contrastive_loss(*ClipForTraining(towers(vision))(*batch(vision))[:3]) + 0.01, "false captions count"
    for rank in range(2):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(theirs.pop("loss"), loss.detach())
        ours = {name: parameter.grad for name, parameter in model.named_parameters()}
        buffers = dict(model.named_buffers())
        assert theirs.keys() == ours.keys() | buffers.keys()
        for name, gradient in ours.items():
            assert gradient is not None, name
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(theirs[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
        for name, value in buffers.items():
            torch.testing.assert_close(theirs[name], value, msg=name)


@every_tower
def test_late_interaction_sees_places_and_words(vision: str) -> None:
    model, (image, ids) = ClipForTraining(towers(vision), late=True), batch(vision)
    found, plain = model(image, ids), ClipForTraining(towers(vision))(image, ids)
    torch.testing.assert_close(found.image, plain.image)
    torch.testing.assert_close(found.text, plain.text)
    assert plain.late is None
    assert found.late.places.shape == (len(image), model.clip.shape.places, model.clip.shape.embed_dim)
    assert found.late.words.shape == (*ids.shape, model.clip.shape.embed_dim)
    torch.testing.assert_close(found.late.words.norm(dim=-1), torch.ones(ids.shape))
    assert not model.clip.ln_final._forward_hooks, "nothing is left watching"
    again = copy.deepcopy(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(again(image, ids).late.places, model(image, ids).late.places)


@every_tower
def test_training_learns_the_pairs_of_a_batch(vision: str) -> None:
    model = ClipForTraining(towers(vision))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = contrastive_loss(*model(*batch(vision))[:3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_tower
def test_a_folder_gives_the_same_towers_back(vision: str, tmp_path: Path) -> None:
    clip = towers(vision)
    clip.encode_image(batch(vision)[0])  # running statistics of its own, where it has them
    clip.eval()
    save_clip(clip, tmp_path / "clip")
    again = load_clip(tmp_path / "clip")
    image, ids = batch(vision)
    assert again.shape == SHAPES[vision]
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again.encode_image(image), clip.encode_image(image))
        assert torch.equal(again.encode_text(ids), clip.encode_text(ids))
    assert torch.equal(again.logit_scale, clip.logit_scale)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json and model.safetensors missing"):
        load_clip(tmp_path)
    save_clip(towers(), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_layers": 2}))
    with pytest.raises(UserError, match="does not hold") as caught:
        load_clip(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size 3"),
        ({"vision": "resnet"}, "multiple of 32, not 8"),
        ({"vision": "cnn"}, "cnn is unknown"),
        ({"vision_heads": 3}, "vision_heads"),
        ({"text_heads": 3}, "text_heads"),
        ({"eos_token_id": 20}, "eos_token_id 20"),
        ({"embed_dim": 0}, "embed_dim is 0"),
    ],
)
def test_wrong_sizes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_clip(dataclasses.replace(SHAPE, **changes))
