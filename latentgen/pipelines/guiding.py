"""How a request is guided: from its words to a denoiser.

The predictions of one network run in one forward pass, each with its own prompt; a weaker network has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance import Part, batched, bind, build, parse
from latentgen.diffusion.parameterization import Denoiser, denoiser
from latentgen.diffusion.variational import LogVariances, interpolated_log_variance
from latentgen.formats.folder_check import check_folder
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.context import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE, Context, join, sizes_of
from latentgen.models.unet import perturbed_attention, predict, self_attentions
from latentgen.pipelines.control import Control

AND = " AND "


@dataclass(frozen=True)
class Wish:
    """How pictures of one batch are to be guided.

    Args:
        guidance: `NAME[,key=value]...` each, as `diffusion.guidance.parse` reads them.
        scale: of the rule.
        sampler: `NAME[,key=value]...`, as `diffusion.samplers.find_sampler` reads it.
        levels: the noise levels it visits.
        weights: of the prompts of a composition; (1.0,) where there is none.
        size: height and width of the pictures, in pixels; some U-Nets are told.
        chunks: pieces that every text is read in; None: as many as in training.
        emphasis: brackets in prompts say how much words count.
    """

    guidance: tuple[str, ...]
    scale: float
    sampler: str
    levels: tuple[float, ...]
    weights: tuple[float, ...] = (1.0,)
    size: tuple[int, int] = (0, 0)
    chunks: int | None = None
    emphasis: bool = True


def split_prompt(prompt: str, guidance: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The prompts of a composition and their weights: "a red circle AND a blue star:0.5".

    Where `guidance` does not say compose, the prompt is one, whatever its words.

    Raises:
        UserError: an empty prompt in a composition.
    """
    if all(part.name != "compose" for part in parse(guidance)):
        return (prompt,), (1.0,)
    pairs = [_weighted(piece) for piece in prompt.split(AND)]
    if len(pairs) > 1 and not all(text for text, _ in pairs):
        raise UserError(f'--guidance compose: "{prompt}" has an empty prompt; write "one{AND}other:0.5"')
    return tuple(text for text, _ in pairs), tuple(weight for _, weight in pairs)


def _weighted(piece: str) -> tuple[str, float]:
    text, colon, number = piece.rpartition(":")
    try:
        return (text.strip(), float(number)) if colon else (piece.strip(), 1.0)
    except ValueError:
        return piece.strip(), 1.0  # a colon of the prompt's own


def check_guidance(wish: Wish, model: Model) -> None:
    """Raise `UserError` for guidance that the model or the sampler cannot follow."""
    parts = parse(wish.guidance)
    build(parts, wish.scale, wish.sampler, wish.levels, wish.weights)
    layers = _knob(parts, "pag", "layers")
    if layers is not None:
        self_attentions(model.unet, layers)
    folder = _knob(parts, "autoguidance", "model")
    if folder is not None:
        check_folder(Path(folder))


def check_negative_prompt(guidance: Sequence[str], negative_prompt: str) -> None:
    """Raise `UserError` for a negative prompt that nothing would look at."""
    if negative_prompt and _knob(parse(guidance), "autoguidance", "model") is not None:
        raise UserError(
            "--negative-prompt with --guidance autoguidance: the worse model takes its place; leave one of them out"
        )


def weak_model(guidance: Sequence[str], model: Model) -> Model | None:
    """The worse model that autoguidance names, opened beside `model`; None where nothing asks for one.

    Raises:
        UserError: there is none in that folder, or its latents mean something else.
    """
    folder = _knob(parse(guidance), "autoguidance", "model")
    if folder is None:
        return None
    weak = load_model(Path(folder), model.unet.device, model.unet.dtype)
    mine, theirs = model.vae.state_dict(), weak.vae.state_dict()
    alike = mine.keys() == theirs.keys() and all(
        value.shape == theirs[name].shape and torch.allclose(value.float(), theirs[name].float(), rtol=0.01, atol=0.001)
        for name, value in mine.items()
    )
    if not alike:
        raise UserError(
            f"--guidance autoguidance,model={folder}: its autoencoder is another one, so its latents differ"
        )
    return weak


@torch.no_grad()
def guided(
    model: Model,
    weak: Model | None,
    wish: Wish,
    prompts: Sequence[Sequence[str]],
    negative: Sequence[str],
    channels: Tensor | None = None,
    control: Control | None = None,
) -> tuple[Denoiser, LogVariances | None]:
    """A denoiser for one sampling call, and the variance that the network learned for its reverse steps, if it did.

    The second answers for the prompt's own prediction, and for the x and sigma that the denoiser saw last.

    Args:
        weak: from `weak_model`.
        prompts: for every picture, as many as `wish.weights`.
        negative: for every picture what to stay away from.
        channels: `[b, k, h, w]`, shown to the U-Net beside the noisy latents, from `pipelines.editing`.
        control: the picture that all predictions of `model` follow, from `pipelines.control`; those of `weak` do not.
    """
    parts = parse(wish.guidance)
    texts = {"cond" if n == 0 else f"cond{n + 1}": [own[n] for own in prompts] for n in range(len(wish.weights))}
    texts["uncond"] = list(negative)
    layers = _knob(parts, "pag", "layers")
    if layers is not None:
        texts["weak"] = texts["cond"]
    strong = _Network(model, texts, layers, wish, channels, control)
    second = None
    if weak is not None:
        second = _Network(weak, {"weak": texts["cond"]}, None, wish, channels if weak.inpaints else None)

    def each(rows: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        if second is None:
            return batched(strong.denoise_rows)(rows, x, sigma)
        mine = {kind: at for kind, at in rows.items() if kind != "weak"}
        made = batched(strong.denoise_rows)(mine, x, sigma)
        if "weak" in rows:
            made |= batched(second.denoise_rows)({"weak": rows["weak"]}, x, sigma)
        return made

    denoise = bind(build(parts, wish.scale, wish.sampler, wish.levels, wish.weights), each)
    return denoise, strong.log_variance if strong.learned_variance else None


class _Network:
    """A U-Net with what it reads of a batch's texts, by kind; the kind `weak` has perturbed attention."""

    def __init__(
        self,
        model: Model,
        texts: Mapping[str, list[str]],
        perturbed: str | None,
        wish: Wish,
        channels: Tensor | None = None,
        control: Control | None = None,
    ) -> None:
        self.channels, self.control, self.networks = channels, control, model.networks()
        self.unet, self.parameterization = model.unet, model.parameterization()
        self.contexts = {kind: _context(model, own, wish, kind) for kind, own in texts.items()}
        self.perturbed = self_attentions(model.unet, perturbed) if perturbed is not None else []
        self.learned_variance = model.learned_variance
        self.head: Tensor | None = None

    def denoise_rows(self, x: Tensor, sigma: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """x0_hat [k, c, h, w], one block a kind."""
        dtype = self.unet.dtype
        # Samplers that take many steps at once show every picture once a step, one step after the other.
        context = join([self._rows(kind, at) for kind, at in rows.items()])
        pictures = torch.cat(list(rows.values()))
        shown = None if self.channels is None else self.channels[pictures % len(self.channels)].to(dtype)
        followed, scale = None, None
        if self.control is not None and (scale := self.control.scales(sigma)).any():
            followed = self.control.picture[pictures % len(self.control.picture)]
        weak = slice(0, 0)
        if self.perturbed and "weak" in rows:
            before = [len(at) for kind, at in rows.items()][: list(rows).index("weak")]
            weak = slice(sum(before), sum(before) + len(rows["weak"]))

        def network(x_in: Tensor, c_noise: Tensor) -> Tensor:
            with perturbed_attention(self.perturbed if weak.stop else [], weak):
                out = predict(
                    self.networks, x_in.to(dtype), c_noise, context, channels=shown, control=followed, scale=scale
                )
            if self.learned_variance and "cond" in rows:
                self.head = out[: len(rows["cond"]), x_in.shape[1] :]  # `cond` is always the first block
            return out[:, : x_in.shape[1]]

        return denoiser(self.parameterization, network)(x, sigma)

    def _rows(self, kind: str, at: Tensor) -> Context:
        return self.contexts[kind].each(lambda part: part[at % len(part)].to(self.unet.dtype))

    def log_variance(self, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """What the head said in the last evaluation, [b, c, h, w] (arXiv 2102.09672, eq. 15)."""
        assert self.head is not None, "asked before the first prediction"
        assert len(self.head) == len(x), "asked before every picture had its prediction"
        return interpolated_log_variance(self.head.to(x.dtype), sigma, sigma_next)


def _context(model: Model, texts: Sequence[str], wish: Wish, kind: str) -> Context:
    context, size = model.encode(texts, wish.chunks, emphasis=wish.emphasis), wish.size
    if model.sizes == 0:
        return context
    score = NEGATIVE_AESTHETIC_SCORE if kind == "uncond" else AESTHETIC_SCORE
    row = sizes_of(model.sizes, original=size, corner=(0, 0), target=size, score=score)
    return context._replace(sizes=torch.tensor([row] * len(texts), device=context.states.device))


def _knob(parts: Sequence[Part], name: str, key: str) -> str | None:
    """A text that a guidance was given, or None where it is not asked for."""
    return next((part.knob(key) for part in parts if part.name == name), None)
