"""Fine-tuning from the recipe: what of the model is trained, and what is written down of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.core.files import write_folder
from latentgen.data.captions import first_captions
from latentgen.data.sources.base import Source
from latentgen.formats.adapter_folder import unet_hash, write_adapter
from latentgen.formats.model import Model
from latentgen.formats.model_folder import quiet_libraries
from latentgen.models.adapters import AdapterSpec, add_adapters
from latentgen.models.text import Tower, tokenize
from latentgen.models.tokens import LearnedTokens, grow, rows_of, settled
from latentgen.recipe import build
from latentgen.recipe.captions import tag_draws
from latentgen.recipe.conditions import control_kind, starting_model
from latentgen.recipe.schema import Recipe
from latentgen.recipe.schema_finetune import Finetune
from latentgen.tasks.adapting import adapters_of

TOGETHER = 1000
"""Examples whose captions are looked at together."""


class Training(NamedTuple):
    """What is trained of `model`: networks by name, and factors on their learning rate; and whether captions are drawn
    anew each time they are shown."""

    model: Model
    trains: tuple[str, ...]
    rates: Mapping[str, float]
    draws_words: bool = False


def prepare(recipe: Recipe, model: Model) -> Training:
    """The model with adapters in it and room for words, as the recipe asks; all that is not trained is frozen.

    Raises:
        UserError: the settings do not fit the model.
    """
    f, model = recipe.finetune, starting_model(recipe, model)
    draws = tag_draws(recipe.data) is not None
    for network in model.networks().values():
        network.requires_grad_(False)
    if f is None:
        model.unet.requires_grad_(True)
        return Training(model, ("unet",), {}, draws)
    if model.control is not None:
        model.control.requires_grad_(True)
        return Training(model, ("control",), {}, draws)
    named = model.networks()
    texts = tuple(tower.name for tower in model.towers) if f.text_encoders else ()
    trains = () if f.method == "none" else ("unet", *texts)
    if f.method == "full":
        for name in trains:
            named[name].requires_grad_(True)
    elif trains:
        build.seeded(recipe, "adapter")
        add_adapters({name: named[name] for name in trains}, _spec(f))
    rate = recipe.train.learning_rate
    rates = {} if f.text_learning_rate is None else dict.fromkeys(texts, f.text_learning_rate / rate)
    if f.tokens:
        words = {word: (token.start, token.vectors) for word, token in f.tokens.items()}
        model = replace(model, tokens=grow(model.towers, words))
        trains, rates = (*trains, "tokens"), {**rates, "tokens": f.token_learning_rate / rate}
    return Training(model, trains, rates, draws)


def _spec(f: Finetune) -> AdapterSpec:
    assert f.method in ("lora", "dora", "lokr", "loha")
    return AdapterSpec(
        kind=f.method,
        rank=f.rank,
        alpha=f.alpha,
        dropout=f.dropout,
        targets=f.targets,
        rank_pattern=f.rank_pattern,
        alpha_pattern=f.alpha_pattern,
    )


def runs_text(training: Training) -> bool:
    """Whether the text encoders run in every step, so that nothing of theirs can be cached."""
    return training.draws_words or any(name.startswith("text_encoder") or name == "tokens" for name in training.trains)


def require_words(recipe: Recipe, model: Model, source: Source, limit: int | None) -> None:
    """Raise UserError for a word to be learned that no caption has: nothing would teach it.

    Args:
        limit: at most so many captions of an example take part.
    """
    if recipe.finetune is None or not recipe.finetune.tokens:
        return
    tokenizer = model.towers[0].tokenizer
    missing = {tokenizer.convert_tokens_to_ids(word): word for word in recipe.finetune.tokens}
    for at in range(0, len(source), TOGETHER):
        numbers = range(at, min(at + TOGETHER, len(source)))
        captions = [caption for index in numbers for caption in first_captions(source, index, limit)]
        read = set(tokenize(tokenizer, captions, model.chunks).unique().tolist())
        missing = {number: word for number, word in missing.items() if number not in read}
        if not missing:
            return
    word = next(iter(missing.values()))
    raise UserError(
        f"finetune.tokens: {word} is in no caption, so nothing would teach it; say data.trigger: {word}, or write it "
        f"into the captions, such as `a photo of {word}`"
    )


def makes_adapter(recipe: Recipe) -> bool:
    """Whether the result is an adapter folder, not a model folder."""
    f = recipe.finetune
    return f is not None and f.control is None and f.method != "full"


def write_result(
    recipe: Recipe,
    training: Training,
    averaged: Mapping[str, nn.Module],
    folder: Path,
    average: Mapping[str, Any] | None = None,
) -> None:
    """The adapter folder of what was learned; `average` says which average it is, where it is not the usual one."""
    f = recipe.finetune
    assert f is not None
    assert recipe.unet.source is not None
    write_adapter(
        folder,
        recipe.name,
        training.model,
        adapters_of(averaged),
        learned_words(f, training.model, averaged),
        layouts=f.written(),
        base=recipe.unet.source,
        unet_sha256=unet_hash(Path(recipe.unet.source)),
        metadata={
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            **({} if average is None else {"average": dict(average)}),
        },
    )


def finished(recipe: Recipe, training: Training, averaged: Mapping[str, nn.Module]) -> Model:
    """The model with these networks, and with learned words as rows of its text encoders like all others."""
    model, f = training.model.with_networks(averaged), recipe.finetune
    words = {} if f is None else learned_words(f, model, averaged)
    if not words:
        return model
    towers = tuple(settled(tower, {word: own[tower.name] for word, own in words.items()}) for tower in model.towers)
    return replace(model, towers=towers, tokens=None)


def write_trained(recipe: Recipe, training: Training, averaged: Mapping[str, nn.Module], folder: Path) -> None:
    """The stage's result where whole networks were trained: the U-Net, and text encoders in folders below it; or the
    ControlNet."""
    model = finished(recipe, training, averaged)
    network = model.unet if model.control is None else model.control

    def fill(target: Path) -> None:
        # Copies, because saving changes what a network says of itself.
        copy.deepcopy(network).save_pretrained(target)
        for tower in model.towers:
            if tower.name in averaged or "tokens" in averaged:
                copy.deepcopy(tower.encoder).save_pretrained(target / tower.name)
                tower.tokenizer.save_pretrained(target / tower.tokenizer_name)

    write_folder(folder, fill)


def read_trained(recipe: Recipe, model: Model, folder: Path) -> Model:
    """`model` with the networks that `write_trained` wrote."""
    with quiet_libraries():
        if control_kind(recipe) is not None:
            control = ControlNetModel.from_pretrained(folder)
            assert isinstance(control, ControlNetModel)
            return replace(model, control=control)
        unet = UNet2DConditionModel.from_pretrained(folder)
        assert isinstance(unet, UNet2DConditionModel)
        towers = tuple(
            Tower(
                tower.name,
                type(tower.encoder).from_pretrained(folder / tower.name),
                CLIPTokenizer.from_pretrained(folder / tower.tokenizer_name),
            )
            if (folder / tower.name).is_dir()
            else tower
            for tower in model.towers
        )
    return replace(model, unet=unet, towers=towers, tokens=None)


def learned_words(f: Finetune, model: Model, averaged: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Word -> text encoder -> `[v, d]`."""
    tokens = averaged.get("tokens")
    if tokens is None:
        return {}
    assert isinstance(tokens, LearnedTokens)
    counts, rows = {word: token.vectors for word, token in f.tokens.items()}, tokens()
    each = {tower.name: rows_of(counts, rows[tower.name]) for tower in model.towers}
    return {word: {name: own[word] for name, own in each.items()} for word in f.tokens}
