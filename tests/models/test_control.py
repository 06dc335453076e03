"""ControlNets made of U-Nets, and U-Nets with channels for a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.formats.model import Model
from latentgen.models.context import Context
from latentgen.models.control import EMBEDDING, build_control, require_control, widen
from latentgen.models.unet import build_unet, checkpoint_activations, predict

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pooled text": {"pooled_text": True},
    "scale and shift": {"time_scale_shift": True},
    "learned variance": {"learned_variance": True},
    "three levels": {"channels": (8, 16, 24), "attention": (False, True, True), "layers_per_block": 2},
}


def unet(kind: str) -> Any:
    torch.manual_seed(0)
    usual: dict[str, Any] = {"channels": (8, 16), "attention": (False, True), "layers_per_block": 1}
    more = {**usual, **SHAPES[kind]}
    return build_unet(latent_size=8, latent_channels=4, heads=2, context_dim=16, norm_groups=4, **more).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, Context, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8), torch.rand(3) * 900, Context(torch.randn(3, 5, 16)), torch.rand(3, 3, 32, 32)


@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_a_new_one_changes_nothing_and_a_trained_one_by_its_scale(kind: str) -> None:
    network = unet(kind)
    control = build_control(network, 4, 4).eval()
    x, time, context, picture = inputs()
    networks = {"unet": network, "control": control}
    plain = predict(networks, x, time, context)
    assert torch.equal(predict(networks, x, time, context, control=picture), plain)
    for convolution in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        convolution.weight.normal_(std=0.3)
    whole = predict(networks, x, time, context, control=picture)
    assert (whole - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    scale = torch.tensor([0.0, 1.0, 0.5])
    shared = predict(networks, x, time, context, control=picture, scale=scale)
    torch.testing.assert_close(shared[:2], torch.stack([plain[0], whole[1]]))
    assert float((shared[2] - plain[2]).abs().max()) > 1e-4


@pytest.mark.parametrize(("factor", "widths"), [(1, (16,)), (2, (16, 32)), (8, EMBEDDING), (16, (*EMBEDDING, 256))])
def test_the_picture_is_brought_to_the_size_of_the_latents(factor: int, widths: tuple[int, ...]) -> None:
    control = build_control(unet("plain"), 4, factor)
    assert control.config["conditioning_embedding_out_channels"] == widths
    made = control.controlnet_cond_embedding(torch.zeros(1, 3, 16, 32))
    assert made.shape == (1, 8, 16 // factor, 32 // factor)


def test_only_the_copy_is_trained_and_every_part_of_it() -> None:
    network = unet("pooled text").requires_grad_(False)
    control = build_control(network, 4, 4)
    assert all(weight.requires_grad for weight in control.parameters())
    assert not {id(w) for w in control.parameters()} & {id(w) for w in network.parameters()}, "it shares no weight"
    x, time, context, picture = inputs()
    for _ in range(3):  # before a zero convolution there is no gradient until it has moved, and two follow each other
        predict({"unet": network, "control": control}, x, time, context, control=picture).square().mean().backward()
        with torch.no_grad():
            for weight in control.parameters():
                weight -= 0.1 * weight.grad if weight.grad is not None else 0
    still = [name for name, weight in control.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


def test_computing_activations_again_changes_no_gradient() -> None:
    network, found = unet("plain").requires_grad_(False), []
    for again in (False, True):
        torch.manual_seed(2)
        control, beside = build_control(network, 4, 4), copy.deepcopy(network)
        if again:
            for part in (control, beside):
                checkpoint_activations(part, "auto", dtype=torch.float32)
        x, time, context, picture = inputs()
        predict({"unet": beside, "control": control.train()}, x, time, context, control=picture).sum().backward()
        found.append([weight.grad for weight in control.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_no_controlnet_of_such_a_unet() -> None:
    network = unet("plain")
    network.register_to_config(mid_block_type=None)
    with pytest.raises(UserError, match=r"^no ControlNet can be made of this U-Net \(unknown mid_block_type"):
        build_control(network, 4, 4)


def test_one_that_reads_no_plain_picture() -> None:
    network = unet("plain")
    control = build_control(network, 4, 4)
    require_control(control, network, 4, 4, "here")
    control.register_to_config(global_pool_conditions=True)
    with pytest.raises(UserError, match=r"^here: a ControlNet that reads no plain picture"):
        require_control(control, network, 4, 4, "here")


@torch.no_grad()
def test_wider_by_channels_that_do_nothing_yet(tiny_builder: Callable[..., Model]) -> None:
    """To the bit, whatever they show."""
    network = tiny_builder().unet
    x, time, context, _ = inputs()
    x = x[..., :4, :4].contiguous()
    before = predict({"unet": network}, x, time, context)
    widen(network, 4)
    assert network.config["in_channels"] == 9
    for shown in (torch.zeros(3, 5, 4, 4), torch.randn(3, 5, 4, 4)):
        assert torch.equal(predict({"unet": network}, x, time, context, channels=shown), before)
    assert not network.conv_in.weight[:, 4:].any()
    assert all(weight.requires_grad for weight in network.conv_in.parameters())
