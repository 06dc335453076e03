"""Anything that draws, opened: a model folder, a single file, or what fine-tuning learned together with its model."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from latentgen.core.errors import UserError
from latentgen.core.files import file_sha256
from latentgen.core.runfolder import ADAPTER_INDEX
from latentgen.formats.adapter_folder import AdapterFolder, read_adapter, unet_hash
from latentgen.formats.embeddings import Embedding, read_embedding
from latentgen.formats.lora.apply import merge
from latentgen.formats.lora.file import read_lora
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.formats.model_of_parts import model_of
from latentgen.formats.sources import open_source
from latentgen.models.quick import quicken
from latentgen.models.words import add_embedding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A model and what to write about it into pictures: its name, and the SHA-256 of its U-Net's file; of a ControlNet
    its folder and SHA-256."""

    model: Model
    name: str
    sha256: str
    controlnet: Mapping[str, str] = field(default_factory=dict)


def open_model(
    path: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    loras: Sequence[tuple[Path, float]] = (),
    embeddings: Sequence[Path] = (),
) -> Opened:
    """Open a model with LoRAs added to its weights and learned words added to its text encoders.

    Args:
        path: a model folder; a single file; "org/name" of the Hugging Face hub; or an adapter folder of fine-tuning,
            which names its model.
        loras: files of any layout, and how strong each is; 0 leaves the weights bit for bit as they are.
        embeddings: files of learned words.

    Raises:
        UserError: something is missing, is broken, or does not fit the model.
    """
    path = Path(path)
    adapter = read_adapter(path) if (path / ADAPTER_INDEX).is_file() else None
    folder = path if adapter is None else _base(adapter, path)
    if folder.is_dir() or not _elsewhere(folder):
        model = load_model(folder, device, dtype)
        sha256 = unet_hash(folder)
    else:
        model = model_of(open_source(str(folder)), str(folder), device, dtype)
        sha256 = file_sha256(folder) if folder.is_file() else weights_hash(model)
    words = [read_embedding(file) for file in embeddings]
    if adapter is not None:
        if sha256 != adapter.unet_sha256:
            logger.warning("%s was learned with another U-Net than %s has now: expect other pictures", path, folder)
        model = replace(model, chunks=adapter.chunks)
        loras = [*([] if adapter.lora is None else [(adapter.lora, 1.0)]), *loras]
        words = [*(read_embedding(file, word) for word, file in adapter.embeddings.items()), *words]
    for word in words:
        _add_word(model, word)
    networks = {name: network for name, network in model.networks().items() if name != "vae"}
    for file, weight in loras:
        merge(networks, read_lora(file, networks), weight)
    if torch.device(device).type == "cpu" and dtype == torch.float32:
        quicken(model.unet)
    resolved = path.resolve()
    name = (
        resolved.parent.name
        if resolved.name in ("model", "adapter")
        else resolved.stem
        if path.is_file()
        else resolved.name
    )
    return Opened(model, name, sha256)


def _elsewhere(source: Path) -> bool:
    """Whether it is a file, or can be a repository of the hub."""
    return source.is_file() or (len(source.parts) == 2 and not source.is_absolute() and not source.parent.is_dir())


def weights_hash(model: Model) -> str:
    """SHA-256 of the U-Net's tensors, where there is no one file of them."""
    digest = hashlib.sha256()
    for name, value in sorted(model.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _add_word(model: Model, word: Embedding) -> None:
    names = [tower.name for tower in model.towers]
    if sorted(word.vectors) != sorted(names):
        made, has = " and ".join(word.vectors), " and ".join(names)
        raise UserError(f"the word {word.token} was learned for {made}, the model has {has}; it is for another family")
    for tower in model.towers:
        add_embedding(tower.tokenizer, tower.encoder, word.token, word.vectors[tower.name])


def _base(adapter: AdapterFolder, path: Path) -> Path:
    base = Path(adapter.base)
    if not base.is_dir():
        files = [f"--lora {file}" for file in ([] if adapter.lora is None else [adapter.lora])]
        files += [f"--embedding {file}" for file in adapter.embeddings.values()]
        raise UserError(
            f"{path} belongs to the model {adapter.base}, which is not there; name it: --model FOLDER {' '.join(files)}"
        )
    return base
