"""Perturbed attention is the identity as an attention map, done by hand; and the counter counts what really ran."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from latentgen.core.errors import UserError
from latentgen.models.unet import build_unet, counted_rows, perturbed_attention, self_attentions


def tiny() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = build_unet(
        latent_size=8, latent_channels=4, channels=(16, 32), layers_per_block=1, attention=(True, True), heads=4,
        context_dim=12, norm_groups=8,
    )  # fmt: skip
    return unet.eval()


class IdentityMap(nn.Module):
    """Multi-head attention whose map is the identity matrix, written out head by head."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **others: object) -> torch.Tensor:
        b, n, d = hidden_states.shape
        heads = self.layer.heads
        value = self.layer.to_v(hidden_states).reshape(b, n, heads, d // heads)
        attention = torch.eye(n).expand(b, heads, n, n)
        mixed = torch.einsum("bhij,bjhd->bihd", attention, value).reshape(b, n, d)
        return self.layer.to_out[0](mixed)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(4, 4, 8, 8, generator=generator),
        torch.tensor([3.0, 500.0, 3.0, 900.0]),
        torch.randn(4, 5, 12, generator=generator),
    )


@torch.no_grad()
def run(unet: UNet2DConditionModel) -> torch.Tensor:
    x, t, context = inputs()
    return unet(x, t, encoder_hidden_states=context).sample


@pytest.mark.parametrize("layers", ["mid", "up", "down+mid", "up_blocks.1.attentions.0"])
def test_rows_get_the_identity_map_and_others_are_left_alone(layers: str) -> None:
    unet = tiny()
    plain = run(unet)
    with perturbed_attention(self_attentions(unet, layers), slice(1, 3)):
        mixed = run(unet)
    by_hand = copy.deepcopy(unet)
    for layer in self_attentions(by_hand, layers):
        for block in by_hand.modules():
            if getattr(block, "attn1", None) is layer:
                block.attn1 = IdentityMap(layer)  # type: ignore[assignment]
    perturbed = run(by_hand)
    torch.testing.assert_close(mixed[1:3], perturbed[1:3], atol=1e-6, rtol=1e-5)
    assert torch.equal(mixed[[0, 3]], plain[[0, 3]])
    assert not torch.allclose(mixed[1:3], plain[1:3], atol=1e-4)
    assert torch.equal(run(unet), plain), "nothing stays behind"


def test_cross_attention_is_never_chosen() -> None:
    unet = tiny()
    every = self_attentions(unet, "down+mid+up")
    blocks = [m for m in unet.modules() if getattr(m, "attn1", None) is not None]
    assert {id(layer) for layer in every} == {id(block.attn1) for block in blocks}
    assert all(layer.to_k.in_features != 12 for layer in every)
    assert len(self_attentions(unet, "mid+mid_block")) == 1, "a layer is perturbed once"


@pytest.mark.parametrize("layers", ["middle", "", "up_blocks.7", "mid+x"])
def test_layers_that_are_not_there_are_named(layers: str) -> None:
    with pytest.raises(UserError, match="no self-attention there; choose mid, down, up or one of down_blocks"):
        self_attentions(tiny(), layers)


def test_rows_are_counted_at_every_unet() -> None:
    one, other = tiny(), tiny()
    x, t, context = inputs()
    with counted_rows() as rows, torch.no_grad():
        run(one)
        other(x[:3], t[:3], encoder_hidden_states=context[:3])
        one.mid_block  # noqa: B018  looking is free
        assert rows.count == 7
    run(one)
    assert rows.count == 7, "outside the block nothing is counted"
