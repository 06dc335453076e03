"""The contrastive image and text towers (CLIP, arXiv 2103.00020): an open_clip model, its loss and its conversion.

The text tower, once trained, becomes a transformers CLIPTextModel with the same outputs; the pair of towers is kept for
scoring and filtering. Pictures go in as [-1, 1], not in the mean and standard deviation of the published CLIP models.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from latentgen.core.errors import UserError
from latentgen.core.files import write_json
from latentgen.models.batch_norm import replace_batch_norm
from latentgen.models.gathering import gather_rows
from latentgen.models.late_interaction import LateFeatures, LateInteraction, spoken

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MAX_LOGIT_SCALE = 100.0  # arXiv 2103.00020 section 2.5


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """The sizes of both towers.

    Attributes:
        image_size: side of the pictures in pixels, a multiple of `patch_size`; of 32 for a ResNet.
        vision: "vit", or "resnet", the tower of CLIP's RN models, which learns shapes far sooner.
        patch_size: side of a patch in pixels; a ResNet has none.
        vision_width, vision_layers, vision_heads: the image transformer; or the width of a ResNet's first stage, the
            blocks of each of its four stages and the heads of its pooling, which is 32 times that width.
        text_width, text_layers, text_heads: the text transformer; `text_width` is the context width of the U-Net.
        context_length: tokens of one caption.
        vocab_size: tokens of the tokenizer, `len(tokenizer)`.
        eos_token_id: the end token, whose position gives the text features.
        embed_dim: width of the features that the towers share.
    """

    image_size: int
    vision: str
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int
    vocab_size: int
    eos_token_id: int
    embed_dim: int

    @property
    def places(self) -> int:
        """Places of a picture that words are compared with: patches, or the cells of a ResNet's third stage.

        That stage is 16 times smaller than the picture: as fine as the patches of a ViT-B/16.
        """
        return (self.image_size // (16 if self.vision == "resnet" else self.patch_size)) ** 2


class Clip(CLIP):
    """open_clip's two towers, with the sizes they were built from in `shape`."""

    def __init__(self, shape: ClipShape) -> None:
        resnet, n = shape.vision == "resnet", shape.vision_layers
        super().__init__(
            embed_dim=shape.embed_dim,
            vision_cfg=CLIPVisionCfg(
                layers=(n, n, n, n) if resnet else n,
                width=shape.vision_width,
                head_width=_attention_width(shape) // shape.vision_heads,
                patch_size=shape.patch_size,
                image_size=shape.image_size,
            ),
            text_cfg=CLIPTextCfg(
                context_length=shape.context_length,
                vocab_size=shape.vocab_size,
                width=shape.text_width,
                heads=shape.text_heads,
                layers=shape.text_layers,
                # By the token's id, not by the largest id: learned tokens may be added after the end token.
                pool_type="eos",
                eos_id=shape.eos_token_id,
            ),
        )
        self.shape = shape
        if resnet:
            replace_batch_norm(self.visual)
            self.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # several times faster


def _attention_width(shape: ClipShape) -> int:
    return shape.vision_width * (32 if shape.vision == "resnet" else 1)


def build_clip(shape: ClipShape) -> Clip:
    """Build both towers with random weights.

    Raises:
        UserError: the sizes do not fit together.
    """
    for name, value in dataclasses.asdict(shape).items():
        if isinstance(value, int) and value < (0 if name == "eos_token_id" else 1):
            raise UserError(f"clip: {name} is {value}; it must be positive")
    if shape.vision not in ("vit", "resnet"):
        raise UserError(f"clip: image tower {shape.vision} is unknown; use vit or resnet")
    if shape.vision == "resnet" and shape.image_size % 32:
        raise UserError(
            f"clip: a resnet needs pictures whose side is a multiple of 32, not {shape.image_size}; "
            "use text_encoder.image.kind=vit"
        )
    if shape.vision == "vit" and shape.image_size % shape.patch_size:
        raise UserError(f"clip: patch_size {shape.patch_size} does not divide image_size {shape.image_size}")
    for tower, width, heads in (
        ("vision", _attention_width(shape), shape.vision_heads),
        ("text", shape.text_width, shape.text_heads),
    ):
        if width % heads:
            raise UserError(f"clip: {heads} {tower}_heads do not divide {tower}_width {width}")
    if shape.eos_token_id >= shape.vocab_size:
        raise UserError(
            f"clip: eos_token_id {shape.eos_token_id} is outside the vocabulary of {shape.vocab_size} tokens"
        )
    return Clip(shape)


class ClipFeatures(NamedTuple):
    """`image` [b, embed_dim] and `text` [n, embed_dim] of length 1, and scalar `logit_scale` (not its logarithm).

    `late` is None without late interaction.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    late: LateFeatures | None = None


class ClipForTraining(nn.Module):
    """Both towers behind one `forward`, because data-parallel wrappers see only that.

    Args:
        clip: the towers.
        late: also compare words with places (`models.late_interaction`).
    """

    def __init__(self, clip: Clip, late: bool = False) -> None:
        super().__init__()
        self.clip, shape = clip, clip.shape
        resnet = shape.vision == "resnet"
        self._places = "layer3" if resnet else "transformer"
        width = shape.vision_width * (16 if resnet else 1)
        self.late = LateInteraction(shape.places, width, shape.text_width, shape.embed_dim) if late else None

    def forward(self, image: Tensor, tokens: Tensor) -> ClipFeatures:
        """Features of pictures [b, 3, image_size, image_size] in [-1, 1] and of token ids [n, context_length].

        The learned scales are first put back below 100 where an optimizer step took them above.
        """
        clip, late = self.clip, self.late
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        seen: dict[str, Tensor] = {}
        with (
            _watching(clip.visual.get_submodule(self._places), "places", seen),
            _watching(clip.get_submodule("ln_final"), "words", seen),
        ):
            features = ClipFeatures(
                clip.encode_image(image, normalize=True),
                clip.encode_text(tokens, normalize=True),
                clip.logit_scale.exp(),
            )
        if late is None:
            return features
        with torch.no_grad():
            late.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        places = seen["places"]
        # A transformer's first token is the picture's, not a place's.
        places = places.flatten(2).transpose(1, 2) if places.ndim == 4 else places[:, 1:]
        places, words = late(places, seen["words"])
        mask = spoken(tokens, clip.shape.eos_token_id)
        return features._replace(late=LateFeatures(places, words, mask, late.logit_scale.exp()))


@contextmanager
def _watching(module: nn.Module, name: str, seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep what `module` gives inside the block in `seen[name]`: the towers return their last features only."""

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen[name] = output

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, false_features: Tensor | None = None
) -> Tensor:
    """Symmetric cross entropy of all pairs of the batch (arXiv 2103.00020 figure 3), over all processes.

    Every process computes the loss of the whole batch. With gradients averaged over processes, as DDP does, the result
    is the gradient of one process that holds the whole batch: the gathering's backward sums over the processes, which
    makes up for the average.

    Args:
        image_features: [b, d] of length 1; b equal on all processes.
        text_features: [b, d] of length 1; row i belongs to picture i.
        logit_scale: scalar.
        false_features: [b, k, d] of length 1, captions that are false of their own picture: k more columns of the
            softmax over the captions of a picture (arXiv 2210.01936, section 4). Without them, captions that use the
            same words in another order are never told apart.

    Returns:
        A scalar in nats, the same on all processes.
    """
    image_features, text_features = gather_rows(image_features), gather_rows(text_features)
    false_features = None if false_features is None else gather_rows(false_features)
    loss = ClipLoss()(image_features, text_features, logit_scale)
    assert isinstance(loss, Tensor)
    if false_features is None:
        return loss
    others = torch.logsumexp(logit_scale * image_features @ text_features.T, dim=1)
    false = torch.logsumexp(logit_scale * (false_features @ image_features[:, :, None]).squeeze(2), dim=1)
    return loss + 0.5 * functional.softplus(false - others).mean()  # what more columns add to one of the two halves


def similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosine in [-1, 1] of each picture [b, d] with its own caption [b, d]: [b]."""
    return functional.cosine_similarity(image_features, text_features, dim=-1)


def to_transformers(clip: Clip, *, bos_token_id: int, pad_token_id: int) -> CLIPTextModel:
    """The text tower as a transformers CLIPTextModel: the same hidden states and the same pooled state.

    The projection to the shared features stays behind: diffusion reads the hidden states.

    Args:
        clip: trained towers; copied, not changed.
        bos_token_id: the tokenizer's start token.
        pad_token_id: the tokenizer's padding token; both are only recorded in the configuration.

    Raises:
        UserError: the end token has id 2, which transformers takes for an old model with another pooling.
    """
    shape = clip.shape
    if shape.eos_token_id == 2:
        raise UserError("clip: an end token with id 2 cannot be converted exactly; put the special tokens last")
    config = CLIPTextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.text_width,
        intermediate_size=4 * shape.text_width,
        projection_dim=shape.embed_dim,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        max_position_embeddings=shape.context_length,
        hidden_act="gelu",
        bos_token_id=bos_token_id,
        eos_token_id=shape.eos_token_id,
        pad_token_id=pad_token_id,
    )
    model: Any = CLIPTextModel(config)  # the library's decorators hide nn.Module's methods from type checkers
    model.load_state_dict(_text_weights(clip))
    model.to(dtype=clip.logit_scale.dtype)
    return model.eval()


def _text_weights(clip: Clip) -> dict[str, Tensor]:
    """The text tower's weights under the names of transformers' CLIPTextModel; query, key and value are split."""
    source = clip.state_dict()
    weights = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    for layer in range(clip.shape.text_layers):
        old, new = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = source[f"{old}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                weights[f"{new}.self_attn.{name}.{kind}"] = part
            for theirs, ours in TEXT_LAYER_NAMES.items():
                weights[f"{new}.{theirs}.{kind}"] = source[f"{old}.{ours}.{kind}"]
    return weights


TEXT_LAYER_NAMES = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def save_clip(clip: Clip, folder: Path) -> None:
    """Write both towers: `model.safetensors` and `config.json` with the sizes.

    The folder is made if absent; whoever needs it complete or absent writes it within `core.files.write_folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in clip.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, dataclasses.asdict(clip.shape))


def load_clip(folder: Path) -> Clip:
    """Both towers as `save_clip` wrote them, on the CPU, in evaluation mode.

    Raises:
        UserError: the folder lacks the two files, or they do not fit together.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no folder of CLIP towers: {' and '.join(missing)} missing")
    try:
        shape = ClipShape(**json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG_FILE} does not describe CLIP towers: {error}") from error
    clip = build_clip(shape)
    try:
        clip.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except Exception as error:  # safetensors has its own error class, load_state_dict raises RuntimeError
        first = str(error).splitlines()[0]
        raise UserError(f"{folder / WEIGHTS_FILE} does not hold the weights of its config.json: {first}") from error
    return clip.eval()
