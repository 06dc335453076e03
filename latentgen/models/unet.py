"""The denoising U-Net: a diffusers UNet2DConditionModel in the layout of Stable Diffusion (arXiv 2112.10752)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

from latentgen.core.errors import UserError
from latentgen.models.context import Context


def build_unet(
    *,
    latent_size: int,
    latent_channels: int,
    channels: tuple[int, ...],
    layers_per_block: int,
    attention: tuple[bool, ...],
    context_dim: int,
    heads: int | tuple[int, ...] | None = None,
    head_dim: int | None = None,
    transformer_layers: int = 1,
    norm_groups: int = 32,
    dropout: float = 0.0,
    pooled_text: bool = False,
    time_scale_shift: bool = False,
    learned_variance: bool = False,
) -> UNet2DConditionModel:
    """Build a text-conditioned U-Net with random weights.

    Its forward takes the noisy latents [b, c, h, w], the time [b] and the text context [b, t, context_dim], and
    gives [b, c, h, w]. The middle block always attends, with the head count of the last level.

    Args:
        latent_size: side of the training latents; other sizes work too.
        latent_channels: channels c of the latents.
        channels: width of each level, finest first; every level but the last halves the side.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        attention: for each level, whether its blocks attend to themselves and to the text.
        context_dim: width of the text encoder's hidden states.
        heads: number of attention heads, one for all levels or one per level.
        head_dim: width of one head; the number of heads is then `channels / head_dim`. Give this or `heads`.
        transformer_layers: transformer layers in each attention block.
        norm_groups: groups of each group normalisation; must divide every width.
        dropout: probability in [0, 1), in residual and transformer blocks.
        pooled_text: also pool the text by attention and add it to the time embedding, which reaches every residual
            block; a network that is not given years to learn follows its prompt much sooner.
        time_scale_shift: the time embedding scales and shifts normalised activations (arXiv 2105.05233 section 3),
            instead of being added to them.
        learned_variance: give [b, 2c, h, w]; the second half speaks of the variance (arXiv 2102.09672, eq. 15).

    Raises:
        UserError: the numbers do not fit together.
    """
    channels, attention = tuple(channels), tuple(attention)
    if not channels or len(attention) != len(channels):
        raise UserError(
            f"unet: attention has {len(attention)} entries for {len(channels)} levels; give one true or false per level"
        )
    if layers_per_block < 1 or transformer_layers < 1:
        raise UserError(
            f"unet: layers_per_block {layers_per_block} and transformer_layers {transformer_layers} must be 1 or more"
        )
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"unet: dropout {dropout} is outside [0, 1)")
    indivisible = [width for width in channels if norm_groups < 1 or width % norm_groups]
    if indivisible:
        raise UserError(f"unet: norm_groups {norm_groups} does not divide the channels {indivisible}")
    halvings = 2 ** (len(channels) - 1)
    if latent_size < halvings or latent_size % halvings:
        raise UserError(
            f"unet: latent_size {latent_size} is not a multiple of {halvings}, the halvings of {len(channels)} levels"
        )
    head_counts: Any = _heads_per_level(channels, heads, head_dim)  # the library's annotation admits one level only
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=2 * latent_channels if learned_variance else latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attention)),
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        cross_attention_dim=context_dim,
        # The name is historical: this field holds the number of heads, not their width.
        attention_head_dim=head_counts,
        transformer_layers_per_block=transformer_layers,
        norm_num_groups=norm_groups,
        dropout=dropout,
        addition_embed_type="text" if pooled_text else None,
        addition_embed_type_num_heads=math.gcd(context_dim, 4),
        resnet_time_scale_shift="scale_shift" if time_scale_shift else "default",
    )


def _heads_per_level(
    channels: tuple[int, ...], heads: int | tuple[int, ...] | None, head_dim: int | None
) -> tuple[int, ...]:
    if (heads is None) == (head_dim is None):
        raise UserError(f"unet: give heads or head_dim, not both and not neither (heads {heads}, head_dim {head_dim})")
    if head_dim is not None:
        wrong = [width for width in channels if head_dim < 1 or width % head_dim]
        if wrong:
            raise UserError(f"unet: head_dim {head_dim} does not divide the channels {wrong}")
        return tuple(width // head_dim for width in channels)
    assert heads is not None
    counts = (heads,) * len(channels) if isinstance(heads, int) else tuple(heads)
    if len(counts) != len(channels):
        raise UserError(
            f"unet: heads has {len(counts)} entries for {len(channels)} levels; give one number or one each"
        )
    wrong = [(width, count) for width, count in zip(channels, counts, strict=True) if count < 1 or width % count]
    if wrong:
        raise UserError("unet: " + "; ".join(f"{count} heads do not divide {width} channels" for width, count in wrong))
    return counts


def count_parameters(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters; shared ones count once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def predict(
    networks: Mapping[str, Any],
    x_in: Tensor,
    time: Tensor,
    context: Context,
    *,
    channels: Tensor | None = None,
    control: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """What the network `unet` predicts, `[b, c, h, w]`.

    Args:
        networks: `unet`, and where there is a picture to follow `control`, a ControlNetModel.
        x_in: `[b, c, h, w]`, scaled noisy latents.
        time: `[b]`.
        channels: `[b, k, h, w]`, more channels of the U-Net's input.
        control: `[b, 3, H, W]` in [0, 1], the picture to follow, in pixels.
        scale: `[b]`, how much of what the ControlNet says is added; None is 1.
    """
    seen = x_in if channels is None else torch.cat([x_in, channels], dim=1)
    inputs = context.inputs()
    if control is not None:
        share = 1.0 if scale is None else scale.to(x_in.dtype).view(-1, 1, 1, 1)
        down, mid = networks["control"](
            x_in, time, controlnet_cond=control, conditioning_scale=share, return_dict=False, **inputs
        )
        inputs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    return networks["unet"](seen, time, **inputs, return_dict=False)[0]


@contextmanager
def attention_kernel(
    kind: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    training: bool = False,
) -> Iterator[None]:
    """Choose the kernel of scaled dot-product attention inside the block.

    Args:
        kind: "auto", "math", "flash", "efficient" or "cudnn". A named kernel is used or the forward fails.
        device: where the network runs; read by "auto" only.
        dtype: what attention computes in (under autocast, autocast's dtype); read by "auto" only.
        training: whether a backward pass follows; read by "auto" only.

    Raises:
        UserError: no kernel of that name.
    """
    # Measured on one Zen 4 core with U-Nets of 7 to 9 M parameters at 16x16, batch 16, forward and backward, math:flash
    # in ms: float32 530:450, 266:260, 900:771; bfloat16 autocast 367:382, 166:208, 440:497. The CPU flash backward has
    # a high fixed cost in bfloat16 (14 against 4 ms at 64 queries, 32 keys). Elsewhere PyTorch's own choice stands.
    if kind == "auto":
        if not (training and torch.device(device).type == "cpu" and dtype == torch.bfloat16):
            yield
            return
        kind = "math"
    if kind not in KERNELS:
        raise UserError(f'attention kernel "{kind}" is unknown; use auto, {", ".join(KERNELS)}')
    with sdpa_kernel(KERNELS[kind]):
        yield


def checkpoint_activations(unet: UNet2DConditionModel | ControlNetModel, kind: str, *, dtype: torch.dtype) -> None:
    """Keep only the inputs of the network's blocks in training, and compute the rest again in the backward pass.

    Args:
        kind, dtype: as `attention_kernel` was given them: the second time must take the same kernel as the first.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), attention_kernel(kind, device=unet.device, dtype=dtype, training=True)

    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=contexts))


class Rows:
    """How many rows of batches went through U-Nets: the number of network evaluations."""

    def __init__(self) -> None:
        self.count = 0


@contextmanager
def counted_rows() -> Iterator[Rows]:
    """Count what goes through any U-Net inside the block, at the network's own door.

    A row that was skipped does not count, however it was skipped; one that went through a second network does.
    """
    rows = Rows()

    def count(module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            rows.count += len(given[0])

    hook = register_module_forward_pre_hook(count)
    try:
        yield rows
    finally:
        hook.remove()


def self_attentions(unet: UNet2DConditionModel, layers: str = "mid") -> list[Attention]:
    """The self-attention of the chosen layers.

    Args:
        layers: "mid", "down", "up" or beginnings of module names such as "up_blocks.0.attentions.1", joined by "+".

    Raises:
        UserError: a name under which there is no self-attention.
    """
    every = {name: module for name, module in unet.named_modules() if name.endswith("attn1")}
    chosen: dict[str, Attention] = {}
    for layer in (piece.strip() for piece in layers.split("+")):
        start = {"mid": "mid_block", "down": "down_blocks", "up": "up_blocks"}.get(layer, layer)
        found = {name: module for name, module in every.items() if name == start or name.startswith(f"{start}.")}
        if not found:
            known = ", ".join(sorted({name.split(".transformer_blocks")[0] for name in every})) or "no self-attention"
            raise UserError(f"layers={layer}: no self-attention there; choose mid, down, up or one of {known}")
        for name, module in found.items():
            assert isinstance(module, Attention)
            chosen[name] = module
    return list(chosen.values())


@contextmanager
def perturbed_attention(layers: list[Attention], rows: slice) -> Iterator[None]:
    """Self-attention with the identity as its map in the given rows of the batch, inside the block (arXiv 2403.17377).

    Every position then attends to itself alone: attention becomes its value and output projections.
    """

    def perturb(layer: Any, given: tuple[Any, ...], named: dict[str, Any], out: Tensor) -> Tensor:
        values = layer.to_v((given[0] if given else named["hidden_states"])[rows])
        for project in layer.to_out:
            values = project(values)
        out = out.clone()
        out[rows] = values
        return out

    hooks = [layer.register_forward_hook(perturb, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
