"""What is kept is taught as the model predicted it before it was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentgen.core.rand import Draw
from latentgen.diffusion.losses import unit
from latentgen.diffusion.noise_levels import uniform
from latentgen.formats.model import Model
from latentgen.models.adapters import AdapterSpec, adapter_parameters, add_adapters
from latentgen.tasks.diffusion import DiffusionTask, Objective
from tests.tasks.test_diffusion import cached

DrawOf = Callable[..., Draw]
WAYS = ("full", "lora", "dora", "lokr", "loha")


def trained(model: Model, way: str, *, keeps: bool = True) -> DiffusionTask:
    """A task that trains a copy of the model's U-Net in this way, from the model as it is."""
    model = copy.deepcopy(model)
    for network in model.networks().values():
        network.requires_grad_(False)
    unet = model.unet
    if way == "full":
        unet.requires_grad_(True)
    else:
        torch.manual_seed(0)
        add_adapters({"unet": unet}, AdapterSpec(kind=way, rank=2))
    objective = Objective(model.parameterization(), uniform, unit)
    return DiffusionTask(model, objective, [], columns=1, keeps=keeps)


def changed(task: DiffusionTask) -> None:
    """As training might have changed what it trains."""
    unet = task.model.unet
    parameters = list(adapter_parameters(unet).values()) or list(unet.parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def marked(d: Draw, *kept: int) -> dict[str, Tensor]:
    batch = cached()(d)
    return {**batch, "kept": torch.tensor([row in kept for row in range(len(batch["mean"]))])}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_to_learn_of_them_before_training(tiny: Model, draw: DrawOf, way: str) -> None:
    d = draw(step=1)
    task = trained(tiny, way)
    everything = task.losses("unet", marked(d, *range(8)), d)
    assert everything["loss"] == 0.0
    everything["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in task.model.unet.parameters())
    assert trained(tiny, way, keeps=False).losses("unet", cached()(d), d)["loss"] > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_what_is_learned_is_the_distance_from_before(tiny: Model, draw: DrawOf, way: str) -> None:
    """For some examples, and the noise for the others; wherever training has led by then."""
    d = draw(step=1)
    task = trained(tiny, way)
    before = trained(tiny, way, keeps=False)
    changed(task)
    with torch.no_grad():
        drawn = task.draws(marked(d), d)
        then, now = (t._predict(t._networks(), drawn) for t in (before, task))
    target = task.objective.parameterization.target(drawn.x0, drawn.noise, drawn.sigma)
    target[[1, 2]] = then[[1, 2]]
    expected = (now - target).square().mean(dim=(1, 2, 3))
    loss = task.losses("unet", marked(d, 1, 2), d)["loss"]
    torch.testing.assert_close(loss, expected.mean())
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in task.model.unet.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_without_any_in_a_batch_it_is_as_without_all_this(tiny: Model, draw: DrawOf, way: str) -> None:
    d = draw(step=1)
    one, other = trained(tiny, way), trained(tiny, way, keeps=False)
    changed(one)
    changed(other)
    assert torch.equal(one.losses("unet", marked(d), d)["loss"], other.losses("unet", cached()(d), d)["loss"])


def test_only_what_is_trained_whole_is_copied(tiny: Model) -> None:
    for way in WAYS:
        original = trained(tiny, way).original
        assert original is not None
        assert len(original.copies()) == (way == "full")
