"""ONNX graphs of a tiny model give in onnxruntime what torch gives, at other sizes than they were traced with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.formats.folder_parts import parts_of_folder
from latentgen.formats.model_folder import load_model
from latentgen.formats.onnx import OPSET, unet_graph, write_onnx
from latentgen.formats.part_check import build_part

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "model"
    write_onnx(parts_of_folder(saved), folder)
    return folder


def run(folder: Path, name: str, **inputs: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])
    assert {entry.name for entry in session.get_inputs()} == set(inputs)
    return session.run(None, {key: value.numpy() for key, value in inputs.items()})


def close(one: np.ndarray, other: torch.Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(one), other.detach(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_network_gives_what_torch_gives(exported: Path, saved: Path) -> None:
    model = load_model(saved)
    torch.manual_seed(0)
    ids = torch.randint(0, 500, (3, 10))
    states = run(exported, "text_encoder", input_ids=ids)
    expected = model.towers[0].encoder(input_ids=ids, output_hidden_states=True)
    close(states[0], expected.last_hidden_state)
    close(states[1], expected.pooler_output)
    assert len(states) == 2 + len(expected.hidden_states)
    close(states[2], expected.hidden_states[0])
    for side in ((8, 4), (12, 16)):
        sample, texts = torch.randn(3, 4, *side), torch.randn(3, 5, 16)
        time = torch.tensor(7.0)
        (out,) = run(exported, "unet", sample=sample, timestep=time, encoder_hidden_states=texts)
        close(out, model.unet(sample, time, texts).sample)
        (pictures,) = run(exported, "vae_decoder", latent_sample=sample)
        close(pictures, model.vae.decode(sample).sample)
        picture = torch.randn(1, 3, 4 * side[0], 4 * side[1])
        (moments,) = run(exported, "vae_encoder", sample=picture)
        close(moments, model.vae.encode(picture).latent_dist.parameters)


def test_the_folder_is_laid_out_as_onnxruntime_users_expect(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    networks = {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert networks | {"tokenizer", "scheduler", "model_index.json"} <= names
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "ORTStableDiffusionPipeline"
    assert networks <= set(index)
    for name in networks:
        assert (exported / name / "config.json").is_file()
    session = onnxruntime.InferenceSession(exported / "unet" / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 4, "height", "width"]


@torch.no_grad()
def test_sdxl_gets_its_pooled_texts_and_sizes() -> None:
    """The function that would be traced, against the network; tracing it takes a minute."""
    parts = parts_of_folder(published.saved("sdxl"))
    unet: Any = build_part("unet", parts.configs["unet"]).eval()
    graph = unet_graph(unet, parts, torch.float32, 8)
    assert list(graph.inputs) == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    assert tuple(graph.inputs["time_ids"].shape) == (2, 6)
    sample, time, texts, pooled, ids = graph.inputs.values()
    expected = unet(sample, time, texts, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    assert torch.equal(graph.module(*graph.inputs.values()), expected)
    assert OPSET >= 17


def test_what_cannot_be_exported_is_refused(saved: Path, tmp_path: Path, monkeypatch) -> None:
    parts = parts_of_folder(saved)
    with pytest.raises(UserError, match="only vae"):
        write_onnx(replace(parts, states={"vae": parts.states["vae"]}), tmp_path / "a")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="left as it is"):
        write_onnx(parts, tmp_path / "photos")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'latentgen\[onnx\]'"):
        write_onnx(parts, tmp_path / "a")
