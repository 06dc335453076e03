"""ControlNet: a trained copy of the U-Net's first half that is shown a picture to follow (arXiv 2302.05543).

What it makes of the picture is added to what the U-Net's second half reads; the U-Net itself stays as it is.
"""

from __future__ import annotations

import inspect

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from latentgen.core.errors import UserError

EMBEDDING = (16, 32, 96, 256)
"""Widths of the layers that bring the picture to the size of the latents, each but the first halving its sides."""


def build_control(unet: UNet2DConditionModel, latent_channels: int, factor: int) -> ControlNetModel:
    """A ControlNet that begins as a copy of the U-Net's first half and, by its zero convolutions, changes nothing.

    It takes the noisy latents alone, also where the U-Net is shown more (inpainting), as other tools expect of one.

    Args:
        unet: is not changed.
        latent_channels: c of the noisy latents `[b, c, h, w]`.
        factor: pixels of the picture per pixel of the latents, a power of two.

    Raises:
        UserError: the U-Net is of a kind that has no ControlNet.
    """
    halvings = factor.bit_length() - 1
    widths = (*EMBEDDING, *EMBEDDING[-1:] * halvings)[: halvings + 1]
    known = inspect.signature(ControlNetModel.__init__).parameters.keys()
    config = {name: value for name, value in unet.config.items() if name in known}
    config |= {"in_channels": latent_channels, "conditioning_embedding_out_channels": widths}
    try:
        control = ControlNetModel(**config)
        copied = {**unet.state_dict()}
        copied["conv_in.weight"] = copied["conv_in.weight"][:, :latent_channels]
        own = control.state_dict()
        control.load_state_dict({name: copied.get(name, value) for name, value in own.items()})
    except (TypeError, ValueError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"no ControlNet can be made of this U-Net ({first}); choose another unet.from") from error
    return control


def require_control(
    control: ControlNetModel, unet: UNet2DConditionModel, latent_channels: int, factor: int, where: str
) -> None:
    """Raise `UserError` unless the ControlNet was made for U-Nets of this shape and latents of this size."""
    own, its = control.config, unet.config
    facts = (
        ("text states of width", own["cross_attention_dim"], its["cross_attention_dim"]),
        ("latent channels:", own["in_channels"], latent_channels),
        ("levels of widths", tuple(own["block_out_channels"]), tuple(its["block_out_channels"])),
        ("layers in each level:", own["layers_per_block"], its["layers_per_block"]),
        ("pooled text:", own["addition_embed_type"], its["addition_embed_type"]),
        ("added values:", own["projection_class_embeddings_input_dim"], its["projection_class_embeddings_input_dim"]),
        ("pixels for each latent:", 2 ** (len(own["conditioning_embedding_out_channels"]) - 1), factor),
    )
    for what, there, here in facts:
        if there != here:
            raise UserError(
                f"{where}: a ControlNet of another family than the model: {what} {there}, not {here}; "
                "take one that was trained for this model"
            )
    if own["conditioning_channels"] != 3 or own["global_pool_conditions"]:
        raise UserError(f"{where}: a ControlNet that reads no plain picture; those that read edges, depth, poses can")


@torch.no_grad()
def widen(unet: UNet2DConditionModel, latent_channels: int) -> None:
    """Make a U-Net that takes noisy latents take mask and surroundings too, for inpainting, in place.

    Its first convolution gets 1 + c more input channels, with zero weights: what it predicts stays the same to the bit.
    The order is Stable Diffusion's: noisy latents, mask, latents of the picture outside of the mask.
    """
    old = unet.conv_in
    assert old.in_channels == latent_channels, "widened already"
    more = 1 + latent_channels
    weight = torch.cat([old.weight, old.weight.new_zeros(len(old.weight), more, *old.weight.shape[2:])], dim=1)
    kernel, padding = old.kernel_size[0], old.padding[0]
    new = torch.nn.Conv2d(latent_channels + more, old.out_channels, kernel, padding=padding, device="meta")
    new.weight, new.bias = torch.nn.Parameter(weight), old.bias
    unet.conv_in = new
    unet.register_to_config(in_channels=latent_channels + more)
