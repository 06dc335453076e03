"""The U-Net's builder: what the numbers mean, and which do not fit."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from latentgen.core.errors import UserError
from latentgen.models.unet import attention_kernel, build_unet, count_parameters


def tiny(**changes: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings: dict = {
        "latent_size": 8,
        "latent_channels": 4,
        "channels": (16, 32),
        "layers_per_block": 1,
        "attention": (False, True),
        "heads": 4,
        "context_dim": 12,
        "norm_groups": 8,
        **changes,
    }
    return build_unet(**settings)


def head_counts(unet: UNet2DConditionModel) -> dict[str, set[tuple[int, int]]]:
    """For each block, the (number, width) of heads that attention really has."""
    found: dict[str, set[tuple[int, int]]] = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            block = ".".join(name.split(".")[:2]) if not name.startswith("mid") else "mid"
            found.setdefault(block, set()).add((module.heads, module.inner_dim // module.heads))
    return found


def test_heads_is_the_number_of_heads() -> None:
    assert head_counts(tiny()) == {"down_blocks.1": {(4, 8)}, "mid": {(4, 8)}, "up_blocks.0": {(4, 8)}}


def test_heads_may_differ_per_level() -> None:
    unet = tiny(attention=(True, True), heads=(2, 8))
    counts = head_counts(unet)
    assert counts["down_blocks.0"] == counts["up_blocks.1"] == {(2, 8)}
    assert counts["down_blocks.1"] == counts["up_blocks.0"] == counts["mid"] == {(8, 4)}


def test_head_dim_is_the_width_of_a_head() -> None:
    counts = head_counts(tiny(attention=(True, True), heads=None, head_dim=8))
    assert counts["down_blocks.0"] == {(2, 8)}
    assert counts["mid"] == {(4, 8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "5 heads do not divide"),
        ({"heads": None}, "heads or head_dim"),
        ({"head_dim": 8}, "heads or head_dim"),
        ({"heads": (4,)}, "heads has 1 entries"),
        ({"heads": None, "head_dim": 12}, "head_dim 12"),
        ({"norm_groups": 12}, "norm_groups 12"),
        ({"latent_size": 7}, "latent_size 7"),
        ({"attention": (True,)}, "attention has 1 entries"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers_per_block": 0}, "layers_per_block"),
    ],
)
def test_wrong_numbers_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


def test_forward_uses_time_and_text_and_keeps_the_shape() -> None:
    unet = tiny().eval()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        out = unet(x, torch.tensor([10.0, 10.0]), context).sample
        later = unet(x, torch.tensor([10.5, 10.0]), context).sample
        other = unet(x, torch.tensor([10.0, 10.0]), context.flip(0)).sample
    assert out.shape == x.shape
    assert not torch.equal(out[0], later[0]), "fractional times must count"
    assert not torch.allclose(out, other)


def test_count_parameters_counts_shared_and_frozen_ones_rightly() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False))
    assert count_parameters(module) == 3 * 4 + 4 + 8
    module[1].requires_grad_(False)
    assert count_parameters(module, trainable_only=True) == 16
    module.append(module[0])
    assert count_parameters(module) == 24


def enabled() -> tuple[bool, bool]:
    return torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()


def test_kernels_are_chosen_inside_the_block_only() -> None:
    before = enabled()
    with attention_kernel("math"):
        assert enabled() == (True, False)
    with attention_kernel("flash"):
        assert enabled() == (False, True)
    with attention_kernel("auto", device="cpu", dtype=torch.float32, training=True):
        assert enabled() == before
    with attention_kernel("auto", device="cpu", dtype=torch.bfloat16, training=True):
        assert enabled() == (True, False)
    with attention_kernel("auto", device="cuda", dtype=torch.bfloat16, training=True):
        assert enabled() == before
    assert enabled() == before
    with pytest.raises(UserError, match="nonsense"), attention_kernel("nonsense"):
        pass


def test_kernels_agree() -> None:
    unet = tiny().eval()
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 5, 12)
    with torch.no_grad():
        with attention_kernel("math"):
            first = unet(x, t, context).sample
        with attention_kernel("flash"):
            second = unet(x, t, context).sample
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_pooled_text_reaches_a_network_without_cross_attention_on_the_way_down() -> None:
    torch.manual_seed(0)
    unet = build_unet(
        latent_size=8, latent_channels=4, channels=(16, 16), layers_per_block=1, attention=(False, False),
        context_dim=12, heads=2, norm_groups=8, pooled_text=True, time_scale_shift=True,
    )  # fmt: skip
    assert unet.config["addition_embed_type"] == "text"
    x, t = torch.randn(2, 4, 8, 8), torch.zeros(2)
    skips = []
    unet.down_blocks[0].register_forward_hook(lambda module, given, made: skips.append(made[0]))
    for seed in (1, 2):
        unet(x, t, encoder_hidden_states=torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed)))
    assert not torch.allclose(skips[0], skips[1]), "the text must reach the first level, which does not attend to it"
