"""Model folders in the diffusers layout, read and written as `Parts`: no network is built."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentgen.core.errors import UserError
from latentgen.core.files import write_file, write_folder, write_json, write_text
from latentgen.core.tensors import encoded
from latentgen.formats.credits import Credits
from latentgen.formats.folder_check import INDEX, networks_of_folder, read_json, stem_of, weight_files
from latentgen.formats.model_card import model_card
from latentgen.formats.model_folder import CONTRASTIVE, METADATA, SCHEDULER
from latentgen.formats.model_index import model_index
from latentgen.formats.parts import CLASSES, TOKENIZERS, Parts, State, canonical, cast, family_of
from latentgen.formats.tensor_files import read_tensors

logger = logging.getLogger("latentgen.formats")

CARD = "README.md"


def parts_of_folder(folder: Path, *, allow_pickle: bool = False) -> Parts:
    """A model folder in the diffusers layout: whole or half precision (`fp16` variants), in one piece or in shards.

    Args:
        folder: holds model_index.json.
        allow_pickle: read .bin files where there is nothing else, as `read_tensors` does.

    Raises:
        UserError: one line that says what is missing or not supported.
    """
    folder = Path(folder)
    present = networks_of_folder(folder)
    index = read_json(folder / INDEX)
    configs = {part: read_json(folder / part / "config.json") for part in present}
    texts = tuple(part for part in present if part in TOKENIZERS)
    return Parts(
        family=family_of(texts, configs["unet"]),
        configs=configs,
        states={part: _read_part(folder, part, allow_pickle) for part in present},
        scheduler=read_json(folder / SCHEDULER),
        pipeline={key: value for key, value in index.items() if not isinstance(value, list)},
        tokenizers={TOKENIZERS[part]: _texts(folder / TOKENIZERS[part]) for part in texts},
        metadata=read_json(folder / METADATA) if (folder / METADATA).is_file() else {},
        card=(folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else None,
        contrastive=folder / CONTRASTIVE if (folder / CONTRASTIVE).is_dir() else None,
    )


def _read_part(folder: Path, part: str, allow_pickle: bool) -> State:
    state: State = {}
    for path in weight_files(folder / part, stem_of(part), allow_pickle=allow_pickle).files:
        state |= read_tensors(path, allow_pickle=allow_pickle)[1]
    return canonical(part, state)


def _texts(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".txt")]
    if not {"tokenizer.json", "vocab.json"} & {path.name for path in files}:
        raise UserError(
            f"{folder.parent} is not complete: {folder.name}/tokenizer.json is missing; copy or download it again"
        )
    return {path.name: path.read_text(encoding="utf-8") for path in files}


def write_folder_from(
    parts: Parts, folder: Path, dtype: torch.dtype | None = None, credits: Credits | None = None
) -> None:
    """Write a diffusers folder, complete or not at all; an older model folder of that name is replaced.

    One network alone becomes a folder that its own class opens: config.json and the weights.

    Args:
        parts: what to write.
        folder: where; parents are made.
        dtype: of the stored weights; None stores each tensor as it is.
        credits: what a person says of the model, for a new model card; one that is there is kept as it is.

    Raises:
        UserError: `folder` holds something else, the parts are neither a model nor one network, or `dtype` cannot hold
            a number.
    """
    folder, parts = Path(folder), cast(parts, dtype)
    alone = not parts.whole
    if alone and len(parts.states) > 1:
        raise UserError(
            f"there are only {' and '.join(parts.states)}: a model folder needs a U-Net, an autoencoder and a text "
            "encoder; name a model folder that has the others with --base FOLDER"
        )
    mark = "config.json" if alone else INDEX
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file()):
        raise UserError(f"{folder} exists and is not a model folder: it is left as it is; choose another name")

    if parts.card and credits is not None and credits != Credits():
        logger.warning("the model has a %s already: it is kept, and what you say of the model is not in it", CARD)

    def fill(target: Path) -> None:
        for part, state in parts.states.items():
            place = target if alone else target / part
            place.mkdir(exist_ok=True)
            write_json(place / "config.json", _stored_config(part, parts.configs[part]))
            write_file(place / f"{stem_of(part)}.safetensors", encoded(state, {"format": "pt"}))
        for name, files in parts.tokenizers.items():
            for file, text in files.items():
                write_text((target if alone else target / name) / file, text)
        if not alone:
            write_json(target / SCHEDULER, dict(parts.scheduler))
            classes = {part: parts.configs[part].get("_class_name", CLASSES[part][0]) for part in parts.states}
            write_json(target / INDEX, model_index(classes, str(parts.scheduler["_class_name"]), parts.pipeline))
        if parts.contrastive is not None:
            shutil.copytree(parts.contrastive, target / CONTRASTIVE)
        if parts.metadata:
            write_json(target / METADATA, dict(parts.metadata))
        write_text(target / CARD, parts.card or model_card(parts, folder.name, credits))

    write_folder(folder, fill)


def _stored_config(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers opens a network in the type that its configuration names, diffusers in float32: say float32."""
    return {**config, "dtype": "float32"} if part in TOKENIZERS else dict(config)
