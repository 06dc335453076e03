"""`latentgen ema`: model folders with averages of other lengths, from a run's snapshots."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

STEP = "latentgen.engine.step:Stepper.__call__"
LENGTHS = ("train.ema_lengths=[0.05, 0.2]", "train.ema_snapshots=2", "train.ema_precision=fp32")


@pytest.fixture(scope="module")
def run(programs, mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    done = programs("train", "--config", mini(folder), *LENGTHS, cwd=folder)
    assert done.code == 0, done.err
    return folder / "runs" / "mini"


def network(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_snapshots_are_in_the_run_folder_and_weights_are_those_of_a_run_without(run, trained, weights):
    for stage in ("vae", "clip", "unet"):
        assert sorted(path.name for path in (run / "ema" / stage).iterdir()) == ["00000002", "00000004", "00000006"]
    assert weights(run) == weights(trained / "runs/mini")


def test_a_tracked_length_comes_out_as_it_was_tracked(programs, run, tmp_path):
    done = programs("ema", run, "--length", 0.05, "--out", tmp_path / "model", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "0% of the profile is not met" in done.out
    found, tracked = (
        network(tmp_path / "model/unet"),
        load_file(run / "checkpoints/unet/00000006/ema-unet-0.05.safetensors"),
    )
    plain = network(run / "model/unet")
    assert found.keys() == tracked.keys()
    for name, value in tracked.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    assert any(not torch.allclose(value, plain[name], atol=1e-4) for name, value in tracked.items())
    about = json.loads((tmp_path / "model/latentgen.json").read_text())["metadata"]["average"]
    assert (about["stage"], about["length"], about["step"]) == ("unet", 0.05, 6)
    drawn = programs("sample", "a red circle", "--model", tmp_path / "model", "--num", 1, "--steps", 1, cwd=tmp_path)
    assert drawn.code == 0, drawn.err


def test_the_newest_run_and_a_folder_in_it_unless_it_is_said(programs, run, tmp_path):
    folder = run.parents[1]
    done = programs("ema", "--length", "0.10", cwd=folder)
    assert done.code == 0, done.err
    assert (run / "model-unet-0.1" / "model_index.json").is_file()
    nothing = programs("ema", "--length", "0.10", cwd=tmp_path)
    assert nothing.code == 2
    assert nothing.errors == [
        "error: runs: no run has averages of unet; name one, or train with train.ema_lengths=[0.05,0.10]"
    ]


def test_a_length_between_and_an_earlier_step(programs, run, tmp_path):
    done = programs("ema", run, "--length", 0.1, "--step", 4, "--out", tmp_path / "model", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "up to step 4" in done.out
    found = network(tmp_path / "model/unet")
    earlier = [load_file(run / f"ema/unet/00000004/unet-{length}.safetensors") for length in (0.05, 0.2)]
    name = max(found, key=lambda key: float((earlier[0][key] - earlier[1][key]).abs().max()))
    apart = float((earlier[0][name] - earlier[1][name]).norm())
    assert all(float((found[name] - one[name]).norm()) < apart for one in earlier), "it lies between the two"


def test_the_autoencoder_keeps_the_runs_latents(programs, run, tmp_path):
    """A whitened network with other weights: unfolding the run's own statistics gives the average back."""
    done = programs("ema", run, "--stage", "vae", "--length", 0.05, "--out", tmp_path / "model", cwd=tmp_path)
    assert done.code == 0, done.err
    found, tracked = (
        network(tmp_path / "model/vae"),
        load_file(run / "checkpoints/vae/00000006/ema-vae-0.05.safetensors"),
    )
    torch.testing.assert_close(found["decoder.conv_in.weight"], tracked["vae.decoder.conv_in.weight"])
    statistics = json.loads((run / "stages/vae/latent_statistics.json").read_text())
    std = torch.tensor(statistics["std"])
    post = found["post_quant_conv.weight"] / std[None, :, None, None]
    torch.testing.assert_close(post, tracked["vae.post_quant_conv.weight"], rtol=1e-4, atol=1e-5)
    for part in ("unet", "text_encoder"):
        assert network(tmp_path / "model" / part).keys() == network(run / "model" / part).keys()


def test_the_text_encoder(programs, run, tmp_path):
    done = programs("ema", run, "--stage", "clip", "--length", 0.2, "--out", tmp_path / "model", cwd=tmp_path)
    assert done.code == 0, done.err
    tracked = load_file(run / "checkpoints/clip/00000006/ema-clip-0.2.safetensors")
    found = network(tmp_path / "model/text_encoder")
    (name,) = (key for key in found if key.endswith("final_layer_norm.weight"))
    torch.testing.assert_close(found[name], tracked["clip.ln_final.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--length", 0.5), "--length 0.5"),
        (("--length", 0.1, "--stage", "critic"), "--stage critic"),
        (("--length", 0.1, "--step", 3), "no snapshot of step 3"),
    ],
)
def test_mistakes_are_one_line(words, said, programs, run, tmp_path):
    done = programs("ema", run, *words, "--out", tmp_path / "model", cwd=tmp_path)
    assert done.code == 2
    assert len(done.errors) == 1, done.err
    assert said in done.errors[0]
    assert not (tmp_path / "model").exists()


def test_a_run_without_snapshots_says_what_to_do(programs, trained, tmp_path):
    done = programs("ema", trained / "runs/mini", "--length", 0.1, "--out", tmp_path / "model", cwd=tmp_path)
    assert done.code == 2
    assert "train.ema_lengths" in done.errors[-1]
    done = programs("ema", tmp_path, "--length", 0.1, "--out", tmp_path / "model", cwd=tmp_path)
    assert done.code == 2
    assert "no run is there" in done.errors[-1]


def test_a_run_whose_unet_goes_on(programs, mini, run, tmp_path):
    killed = programs(
        "train",
        "--config",
        mini(tmp_path),
        *LENGTHS,
        cwd=tmp_path,
        kill=["latentgen.engine.step:Stepper.__call__", 17, 9],
    )
    assert killed.code == -9
    here = tmp_path / "runs/mini"
    done = programs("ema", here, "--length", 0.05, "--out", tmp_path / "model", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "up to step 4" in done.out
    snapshot = load_file(run / "ema/unet/00000004/unet-0.05.safetensors")
    found = network(tmp_path / "model/unet")
    assert all(torch.allclose(value, snapshot[name], rtol=0, atol=1e-6) for name, value in found.items())
    lost = programs("ema", here, "--stage", "critic", "--length", 0.05, "--out", tmp_path / "model", cwd=tmp_path)
    assert lost.code == 2
