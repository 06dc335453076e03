"""A model for onnxruntime: one folder with model.onnx for each network, as optimum lays them out.

* text_encoder/, text_encoder_2/: input_ids [b, t] to last_hidden_state or hidden_states, and pooled states
* unet/: sample [b, c, h, w], timestep [], encoder_hidden_states [b, t, d] (SDXL: text_embeds, time_ids) to out_sample
* vae_encoder/: sample [b, 3, h, w] to latent_parameters [b, 2c, h/f, w/f]
* vae_decoder/: latent_sample [b, c, h, w] to sample

Batch and size are free. Tokenizers, the scheduler and the configurations lie beside them as in the diffusers folder.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentgen.core.errors import UserError
from latentgen.core.files import write_folder, write_json, write_text
from latentgen.formats.folder_check import INDEX
from latentgen.formats.model_folder import METADATA, SCHEDULER, quiet_libraries
from latentgen.formats.part_check import build_part
from latentgen.formats.parts import TOKENIZERS, Parts, cast

OPSET = 18


class Graph(NamedTuple):
    """One network as a function of tensors.

    Attributes:
        folder: its name.
        module: the function.
        inputs: an example of each, by name.
        free: for each input the names of its dimensions that may change.
        outputs: their names.
    """

    folder: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    free: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]


def write_onnx(parts: Parts, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write all networks of a model as ONNX graphs, complete or not at all.

    Args:
        parts: a whole model.
        folder: where; an older export of that name is replaced.
        dtype: of the graphs' weights; None is float32, which every processor computes in.

    Raises:
        UserError: the extra `onnx` is not installed, `folder` holds something else, or the model is not whole.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX export needs {' and '.join(missing)}; install them with: pip install 'latentgen[onnx]'")
    if not parts.whole:
        raise UserError(f"an ONNX export holds a whole model; there is only {' and '.join(parts.states)}")
    folder, dtype = Path(folder), dtype or torch.float32
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file()):
        raise UserError(f"{folder} exists and is not a model folder: it is left as it is; choose another name")
    parts = cast(parts, dtype)

    def fill(target: Path) -> None:
        for graph in _graphs(parts, dtype):
            place = target / graph.folder
            place.mkdir()
            _export(graph, place / "model.onnx")
            source = {"vae_encoder": "vae", "vae_decoder": "vae"}.get(graph.folder, graph.folder)
            write_json(place / "config.json", dict(parts.configs[source]))
        for name, files in parts.tokenizers.items():
            for file, text in files.items():
                write_text(target / name / file, text)
        write_json(target / SCHEDULER, dict(parts.scheduler))
        if parts.metadata:
            write_json(target / METADATA, dict(parts.metadata))
        write_json(target / INDEX, _index(parts))

    write_folder(folder, fill)


def _export(graph: Graph, path: Path) -> None:
    names = list(graph.inputs)
    shapes = tuple(dict(graph.free.get(name, {})) or None for name in names)
    loud = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loud]
    try:
        for logger in loud:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad(), quiet_libraries():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph.module.eval(),
                tuple(graph.inputs.values()),
                path,
                input_names=names,
                output_names=list(graph.outputs),
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                external_data=sum(value.nbytes for value in graph.module.state_dict().values()) > LARGEST,
                verbose=False,
            )
    finally:
        for logger, level in zip(loud, before, strict=True):
            logger.setLevel(level)


LARGEST = 2**31 - 2**20
"""Bytes of weights that fit into one ONNX file (protobuf's limit is 2 GiB); larger ones lie beside it."""


def _graphs(parts: Parts, dtype: torch.dtype) -> list[Graph]:
    """Each network with an example of its inputs: two of everything, because an example of one is taken for a law."""
    networks: dict[str, Any] = {}
    for part, config in parts.configs.items():
        network = build_part(part, config)
        names = set(network.state_dict())
        state = parts.states[part]
        if part in TOKENIZERS and not names & set(state):
            state = {name.removeprefix("text_model."): value for name, value in state.items()}
        network.load_state_dict(state)
        if dtype != torch.float32:
            with quiet_libraries():
                network = network.to(dtype)
        networks[part] = network
    graphs = [_text_graph(part, networks[part]) for part in TOKENIZERS if part in networks]
    unet, vae = networks["unet"], networks["vae"]
    side = 2 * 2 ** len(unet.config["block_out_channels"])
    pixels = torch.randn(2, vae.config["in_channels"], 2 * side, 2 * side + 16, dtype=dtype)
    latent = torch.randn(2, vae.config["latent_channels"], side, side + 8, dtype=dtype)
    tiny = parts.configs["vae"].get("_class_name") == "AutoencoderTiny"
    return [
        *graphs,
        unet_graph(unet, parts, dtype, side),
        Graph("vae_encoder", _Encoder(vae, tiny), {"sample": pixels}, {"sample": IMAGE}, ("latent_parameters",)),
        Graph("vae_decoder", _Decoder(vae), {"latent_sample": latent}, {"latent_sample": IMAGE}, ("sample",)),
    ]


IMAGE: Mapping[int, str] = {0: "batch", 2: "height", 3: "width"}


def _text_graph(part: str, network: Any) -> Graph:
    length = network.config.max_position_embeddings
    ids = torch.zeros(2, length, dtype=torch.int64)
    ids[:, -1] = network.config.eos_token_id
    outputs = (
        ("text_embeds", "last_hidden_state") if part == "text_encoder_2" else ("last_hidden_state", "pooler_output")
    )
    layers = tuple(f"hidden_states.{i}" for i in range(network.config.num_hidden_layers + 1))
    return Graph(part, _Text(network, outputs), {"input_ids": ids}, {"input_ids": {0: "batch"}}, (*outputs, *layers))


def unet_graph(unet: Any, parts: Parts, dtype: torch.dtype, side: int) -> Graph:
    """A U-Net as a function of tensors, with what SDXL's is told besides the text; the example is `side` wide."""
    config = unet.config
    texts = [parts.configs[part] for part in TOKENIZERS if part in parts.configs]
    inputs = {
        "sample": torch.randn(2, config["in_channels"], side, side + 8, dtype=dtype),
        "timestep": torch.tensor(1.0, dtype=dtype),
        "encoder_hidden_states": torch.randn(
            2, texts[0].get("max_position_embeddings", 77), config["cross_attention_dim"], dtype=dtype
        ),
    }
    free: dict[str, Mapping[int, str]] = {"sample": IMAGE, "encoder_hidden_states": {0: "batch", 1: "tokens"}}
    if config["addition_embed_type"] == "text_time":
        width = parts.configs["text_encoder_2"].get("projection_dim", 1280)
        ids = (config["projection_class_embeddings_input_dim"] - width) // config["addition_time_embed_dim"]
        inputs |= {"text_embeds": torch.randn(2, width, dtype=dtype), "time_ids": torch.ones(2, ids, dtype=dtype)}
        free |= {"text_embeds": {0: "batch"}, "time_ids": {0: "batch"}}
    return Graph("unet", _Unet(unet), inputs, free, ("out_sample",))


class _Text(nn.Module):
    def __init__(self, network: Any, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.network(input_ids=input_ids, output_hidden_states=True)
        return (*(out[name] for name in self.outputs), *out.hidden_states)


class _Unet(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.network(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


class _Encoder(nn.Module):
    """Means and log variances of the latents, before the scaling factor; AutoencoderTiny has the means only."""

    def __init__(self, network: Any, tiny: bool) -> None:
        super().__init__()
        self.network, self.tiny = network, tiny

    def forward(self, sample: Tensor) -> Tensor:
        if self.tiny:
            return self.network.encode(sample, return_dict=False)[0]
        moments = self.network.encoder(sample)
        return moments if self.network.quant_conv is None else self.network.quant_conv(moments)


class _Decoder(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.network.decode(latent_sample, return_dict=False)[0]


def _index(parts: Parts) -> dict[str, Any]:
    kind = str(parts.pipeline.get("_class_name", "StableDiffusionPipeline"))
    entries: dict[str, Any] = {"_class_name": f"ORT{kind}"}
    entries |= {key: value for key, value in parts.pipeline.items() if key != "_class_name"}
    entries["scheduler"] = ["diffusers", parts.scheduler["_class_name"]]
    for part in (*(part for part in TOKENIZERS if part in parts.configs), "unet", "vae_encoder", "vae_decoder"):
        entries[part] = ["optimum.onnxruntime.modeling_diffusion", "ORTModel"]
    for part, name in TOKENIZERS.items():
        if part in parts.configs:
            entries[name] = ["transformers", "CLIPTokenizer"]
    return entries
