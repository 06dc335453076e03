"""`latentgen fit-schedule`, and drawing with what it found."""

from __future__ import annotations

import json
import shutil

SHORT = ("--num", 2, "--reference-steps", 3, "--rounds", 1, "--device", "cpu")


def test_fit_then_draw(programs, model, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(model, own)
    done = programs("fit-schedule", "--model", own, "--steps", 2, *SHORT, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "--sampler dpmpp_2m --steps 2 --schedule fitted" in done.out
    (entry,) = json.loads((own / "latentgen.json").read_text())["metadata"]["fitted_schedules"]
    assert (entry["sampler"], entry["steps"], entry["guidance_scale"]) == ("dpmpp_2m", 2, 4.0)
    assert "fitted with" not in done.err
    assert entry["error"] <= entry["start_error"]
    drawing = ("sample", "a red circle", "--model", own, "--num", 1, "--device", "cpu", "--schedule", "fitted")
    drawn = programs(*drawing, "--steps", 2, cwd=tmp_path)
    assert drawn.code == 0, drawn.err
    assert (tmp_path / drawn.out.strip()).is_file()
    refused = programs(*drawing, "--steps", 3, cwd=tmp_path)
    assert refused.code == 2
    assert len(refused.errors) <= 2
    assert "fitted: dpmpp_2m with 2 steps" in refused.errors[-1]
    other = programs(*drawing, "--steps", 2, "--guidance-scale", 3, cwd=tmp_path)
    assert other.code == 0, other.err
    assert "fitted with cfg of scale 4, not with cfg of scale 3" in other.err
    done = programs("fit-schedule", "--model", own, "--steps", 2, *SHORT, "--guidance", "interval", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].endswith("--schedule fitted --guidance interval")
    entries = json.loads((own / "latentgen.json").read_text())["metadata"]["fitted_schedules"]
    assert [entry["guidance"] for entry in entries] == [["cfg"], ["cfg", "interval"]]


def test_mistakes(programs, model, tmp_path):
    for words, said in (
        (("--sampler", "euler_a"), "without noise"),
        (("--sampler", "DPM++ 2M Karras"), "'karras'"),
        (("--sampler", "heun,s_churn=5"), "without noise"),
        (("--guidance", "adaptive"), "remembers earlier steps"),
        (("--num", 0), "--num 0"),
        (("--steps", 0), "--steps 0"),
        (("--sampler", "eular"), "did you mean"),
    ):
        done = programs("fit-schedule", "--model", model, *SHORT, *words, cwd=tmp_path)
        assert done.code == 2, (words, done.err)
        assert said in done.errors[-1]
