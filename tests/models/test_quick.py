"""A quickened network computes the same from the same parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from latentgen.models.quick import QuickLinear, quicken
from latentgen.models.unet import build_unet


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_unet(
        latent_size=8, latent_channels=4, channels=(8, 16), layers_per_block=1, attention=(False, True), context_dim=12,
        heads=2, norm_groups=4,
    ).train()  # fmt: skip


def step(unet: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x, context = torch.randn(3, 4, 8, 8, generator=draw), torch.randn(3, 5, 12, generator=draw)
    out = unet(x, torch.tensor([0, 3, 900]), encoder_hidden_states=context, return_dict=False)[0]
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


def test_output_and_gradients_are_those_of_the_network_itself(unet: UNet2DConditionModel) -> None:
    quick = copy.deepcopy(unet)
    quicken(quick)
    out, gradients = step(unet)
    quick_out, quick_gradients = step(quick)
    torch.testing.assert_close(quick_out, out, rtol=1e-5, atol=1e-5)
    assert quick_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(quick_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_parameters_stay_the_same_objects_with_their_names(unet: UNet2DConditionModel) -> None:
    before, weights = dict(unet.named_parameters()), {k: v.clone() for k, v in unet.state_dict().items()}
    quicken(unet)
    assert all(before[name] is p for name, p in unet.named_parameters())
    assert list(unet.state_dict()) == list(weights)
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in weights.items())


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="layers stay as they are here")
def test_layers_of_tokens_are_taken_and_survive_a_copy(unet: UNet2DConditionModel) -> None:
    quicken(unet)
    linear = [type(layer) for layer in copy.deepcopy(unet).modules() if isinstance(layer, nn.Linear)]
    assert linear
    assert set(linear) == {QuickLinear}


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="layers stay as they are here")
@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 1, 5), (6, 5), (5,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_is_a_linear_layer_with_its_derivatives(shape: tuple[int, ...], bias: bool, turned: bool) -> None:
    torch.manual_seed(0)
    layer, found = QuickLinear(5, 3, bias), []
    x = torch.randn(shape, requires_grad=True)
    for compute in (layer, lambda x: nn.functional.linear(x, layer.weight, layer.bias)):
        out = compute(x.flip(0).transpose(0, -1).transpose(0, -1) if turned else x)
        out = out * torch.arange(out.numel()).view(out.shape)
        found.append((out, *torch.autograd.grad(out.sum(), (x, *layer.parameters()))))
    for quick, plain in zip(*found, strict=True):
        torch.testing.assert_close(quick, plain)


def test_under_autocast_and_in_other_types_it_is_the_layer_of_pytorch() -> None:
    layer, x = QuickLinear(4, 4), torch.randn(2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
