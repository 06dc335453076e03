"""The judges of the autoencoder: scores, losses, their balance and the perceptual distance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from spawned import in_two_processes
from torch import distributed

from latentgen.core.errors import UserError
from latentgen.models import critics
from latentgen.models.critics import (
    PatchCritic,
    Perceptual,
    adaptive_weight,
    hinge_critic_loss,
    hinge_generator_loss,
)


def test_scores_are_local_and_independent_of_the_batch() -> None:
    torch.manual_seed(0)
    critic = PatchCritic(channels=8, layers=2, norm_groups=4)
    image = torch.randn(3, 3, 64, 64)
    scores = critic(image)
    assert scores.shape == (3, 1, 14, 14)
    torch.testing.assert_close(critic(image[:1]), scores[:1])
    convolutions = [module for module in critic.body if isinstance(module, torch.nn.Conv2d)]
    patch = 1
    for module in reversed(convolutions):
        patch = (patch - 1) * module.stride[0] + module.kernel_size[0]
    assert patch == 34, "the patch size in the docstring"


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    torch.testing.assert_close(hinge_critic_loss(real, fake), torch.tensor(0.5 * (0.5 + 1.0)))
    torch.testing.assert_close(hinge_generator_loss(fake), torch.tensor(1.0))


def test_the_critic_learns_to_tell_two_kinds_apart() -> None:
    torch.manual_seed(0)
    critic = PatchCritic(channels=8, layers=1, norm_groups=4)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    real, fake = torch.rand(4, 3, 16, 16), -torch.rand(4, 3, 16, 16)
    for _ in range(20):
        loss = hinge_critic_loss(critic(real), critic(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_adaptive_weight_balances_the_gradients() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Parameter(torch.randn(4, 4))
    x = torch.randn(4)
    first, second = (layer @ x).square().sum(), 0.01 * (layer @ x).sum()
    weight = adaptive_weight(first, second, layer)
    (a,) = torch.autograd.grad(first, layer, retain_graph=True)
    (b,) = torch.autograd.grad(weight * second, layer, retain_graph=True)
    torch.testing.assert_close(a.norm(), b.norm(), rtol=1e-2, atol=0)
    assert not weight.requires_grad
    assert adaptive_weight(first, second * 0, layer).item() == pytest.approx(1e4)
    (first + second).backward()
    assert layer.grad is not None, "both graphs are kept"


def _weight_of_two_processes(folder: str) -> None:
    torch.set_num_threads(1)
    rows = torch.arange(8.0).view(4, 2)[2 * distributed.get_rank() : 2 * distributed.get_rank() + 2]
    layer = torch.nn.Parameter(torch.ones(2))
    weight = adaptive_weight((rows @ layer).square().mean(), (rows @ layer).sin().mean(), layer)
    torch.save(weight, Path(folder, f"{distributed.get_rank()}.pt"))


def test_adaptive_weight_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    in_two_processes(_weight_of_two_processes, str(tmp_path))
    rows, layer = torch.arange(8.0).view(4, 2), torch.nn.Parameter(torch.ones(2))
    expected = adaptive_weight((rows @ layer).square().mean(), (rows @ layer).sin().mean(), layer)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under torchvision's names, with a classifier entry that must be ignored."""
    torch.manual_seed(0)
    state = {f"features.{name}": value for name, value in critics._vgg_features().state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file({**state, "classifier.0.bias": torch.zeros(2)}, path)
    return path


def test_numbering_is_that_of_torchvision() -> None:
    from torchvision.models.vgg import cfgs, make_layers

    theirs = make_layers(cfgs["D"])[:-1]
    assert [type(layer) for layer in critics._vgg_features()] == [type(layer) for layer in theirs]
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in critics._vgg_features().state_dict().items()} == shapes
    assert all(isinstance(theirs[index], torch.nn.ReLU) for index in critics.VGG_TAPS)


def test_perceptual_is_a_frozen_distance(vgg_file: Path) -> None:
    perceptual = Perceptual(vgg_file)
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(2, 3, 16, 16, generator=generator)
    near, far = perceptual(a, a + 0.01 * noise), perceptual(a, a + 0.5 * noise)
    assert near.shape == (2,)
    assert torch.equal(perceptual(a, a), torch.zeros(2))
    assert ((near > 0) & (near < far) & (far < 10)).all()
    torch.testing.assert_close(perceptual(a + 0.5 * noise, a), far)
    image = a.clone().requires_grad_()
    perceptual.train()
    perceptual(image, a + noise).sum().backward()
    assert torch.isfinite(image.grad).all()
    assert image.grad.abs().max() > 0
    assert not perceptual.training
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())


def test_unusable_weights_are_named(tmp_path: Path, vgg_file: Path) -> None:
    with pytest.raises(UserError, match="no weights at"):
        Perceptual(tmp_path / "nowhere.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(vgg_file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Perceptual(cut)
    other = tmp_path / "other.safetensors"
    save_file({"features.0.weight": torch.zeros(1)}, other)
    with pytest.raises(UserError, match=r"features\.0\.bias"):
        Perceptual(other)


def test_a_failed_download_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **settings: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="network is unreachable"):
        Perceptual("imagenet")


@pytest.mark.parametrize("settings", [{"layers": 0}, {"channels": 10, "norm_groups": 4}])
def test_wrong_numbers_are_named(settings: dict) -> None:
    with pytest.raises(UserError, match="critic"):
        PatchCritic(**settings)
