"""`latentgen lora`: every verb, on a model folder and LoRA files for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentgen.formats.lora.apply import merge
from latentgen.formats.lora.file import LoraFile, read_lora, trained_lora
from latentgen.formats.lora.writing import write_lora
from latentgen.formats.model_folder import load_model
from latentgen.models.adapters import AdapterSpec, adapter_parameters, add_adapters


def networks(folder: Path) -> dict[str, torch.nn.Module]:
    opened = load_model(folder)
    return {"unet": opened.unet, "text_encoder": opened.towers[0].encoder}


@pytest.fixture(scope="session")
def lora(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the model, in kohya's layout."""
    tuned = networks(model)
    add_adapters(tuned, AdapterSpec(rank=2, alpha=1))
    generator = torch.Generator().manual_seed(0)
    for network in tuned.values():
        for value in adapter_parameters(network).values():
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    write_lora(trained_lora(tuned), path, "kohya", networks(model))
    return path


def expected(model: Path, file: LoraFile, weight: float) -> dict[str, torch.Tensor]:
    made = networks(model)
    merge(made, file, weight)
    return {f"{name} {key}": value for name, net in made.items() for key, value in net.state_dict().items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name, net in networks(folder).items() for key, value in net.state_dict().items()}


def test_info_and_convert(programs, model, lora, tmp_path):
    done = programs("lora", "info", lora, "--model", model, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "layout: kohya" in done.out
    assert "unet: lora; rank 2; scale 0.5; float32" in done.out
    assert "text_encoder: lora; rank 2; scale 0.5; float32" in done.out
    assert "ss_network_dim: 2" in done.out
    previous = lora
    for layout in ("diffusers", "comfyui", "kohya"):
        out = tmp_path / f"{layout}.safetensors"
        done = programs("lora", "convert", previous, "--out", out, "--layout", layout, "--model", model, cwd=tmp_path)
        assert done.code == 0, done.err
        assert f"rank 2, {layout} layout" in done.out
        previous = out
    theirs, ours = (read_lora(path, networks(model)) for path in (previous, lora))
    for name, own in ours.modules.items():
        for path, factors in own.items():
            other = theirs.modules[name][path].named()
            assert all(torch.equal(other[key], value) for key, value in factors.named().items())


def test_merge_then_extract(programs, model, lora, tmp_path):
    file = read_lora(lora, networks(model))
    done = programs("lora", "merge", model, f"{lora}:0.5", lora, "--out", tmp_path / "merged", cwd=tmp_path)
    assert done.code == 0, done.err
    wanted = expected(model, file, 1.5)
    for key, value in stored(tmp_path / "merged").items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)
    found = tmp_path / "found.safetensors"
    done = programs("lora", "extract", model, tmp_path / "merged", "--out", found, "--rank", 2, cwd=tmp_path)
    assert done.code == 0, done.err
    again = expected(model, read_lora(found, networks(model)), 1.0)
    for key, value in again.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-5)


def test_combine_then_resize(programs, model, lora, tmp_path):
    both, small = tmp_path / "both.safetensors", tmp_path / "small.safetensors"
    done = programs("lora", "combine", lora, f"{lora}:-0.5", "--out", both, "--model", model, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "rank 4, kohya layout" in done.out
    done = programs("lora", "resize", both, "--rank", 2, "--out", small, "--model", model, cwd=tmp_path)
    assert done.code == 0, done.err
    wanted = expected(model, read_lora(lora, networks(model)), 0.5)
    for path in (both, small):
        for key, value in expected(model, read_lora(path, networks(model)), 1.0).items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-5)


def test_mistakes(programs, model, lora, tmp_path):
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for words, said in (
        (("info", "absent.safetensors"), "there is no such file"),
        (("info", "empty.safetensors"), "not a whole safetensors file"),
        (("info", lora), "no family of models that is known; name the model"),
        (("merge", model, f"{lora}:much", "--out", "x"), '"much" is not a number'),
        (("merge", "absent", lora, "--out", "x"), "absent"),
        (("extract", model, model, "--out", "x"), "differs between the two models"),
        (("resize", lora, "--model", model, "--out", "x"), "give a rank, an energy or both"),
    ):
        done = programs("lora", *words, cwd=tmp_path)
        assert done.code == 2, (words, done.err)
        assert len(done.errors) == 1
        assert said in done.errors[-1]
        assert not (tmp_path / "x").exists()
