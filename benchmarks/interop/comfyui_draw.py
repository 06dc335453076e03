"""Draw what `comfyui.py` asks for, by ComfyUI's own code: run with ComfyUI's Python, imports nothing of ours.

    PYTHON comfyui_draw.py CHECKOUT JOB.json OUT.safetensors

All in fp32, on the CPU: the file's weights may be smaller, but what is computed with them is then the same everywhere.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FLAGS = ("--cpu", "--fp32-unet", "--fp32-vae", "--fp32-text-enc", "--disable-smart-memory")


def start(checkout: str) -> dict[str, Any]:
    """ComfyUI's modules by name, set up as by its command line."""
    sys.path.insert(0, checkout)
    sys.argv = ["comfyui", *FLAGS]
    importlib.import_module("comfy.options").enable_args_parsing()
    return {name: importlib.import_module(f"comfy.{name}") for name in ("sd", "sample", "utils")}


@torch.inference_mode()
def draw(comfy: dict[str, Any], job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Pictures `[h, w, 3]` from 0 to 1 and text states `[t, d]`, by the names in the job."""
    model, clip, vae, _ = comfy["sd"].load_checkpoint_guess_config(
        job["checkpoint"], embedding_directory=job["embeddings"]
    )
    print(f"recognised: {type(model.model.model_config).__name__}", flush=True)
    given = load_file(job["given"])
    found = {}
    for asked in job["pictures"]:
        own_model, own_clip = model, clip
        if asked["lora"] is not None:
            lora = comfy["utils"].load_torch_file(asked["lora"], safe_load=True)
            own_model, own_clip = comfy["sd"].load_lora_for_models(model, clip, lora, asked["weight"], asked["weight"])
        words = [
            own_clip.encode_from_tokens_scheduled(own_clip.tokenize(asked[which])) for which in ("prompt", "negative")
        ]
        latents = comfy["sample"].sample(
            own_model,
            given["noise"],
            len(given["sigmas"]) - 1,
            asked["guidance_scale"],
            asked["sampler"],
            "normal",
            *words,
            torch.zeros_like(given["noise"]),
            sigmas=given["sigmas"],
            disable_pbar=True,
            seed=0,
        )
        found[asked["name"]] = vae.decode(latents)[0].float().contiguous()
        found[f"{asked['name']} text"] = words[0][0][0][0].float().contiguous()
        print(asked["name"], flush=True)
    return found


if __name__ == "__main__":
    checkout, job, out = sys.argv[1:]
    save_file(draw(start(checkout), json.loads(Path(job).read_text())), out)
