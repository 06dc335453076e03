"""Our U-Net stage against diffusers' train_text_to_image.py: the same model, pictures, batch, precision and optimizer.

    python benchmarks/train_step.py --peer CHECKOUT_OF_DIFFUSERS [--turns 8] [--pictures FOLDER] [--docs]
    python benchmarks/train_step.py --peer CHECKOUT_OF_DIFFUSERS --losses [--pictures FOLDER]
    python benchmarks/train_step.py --peer CHECKOUT_OF_DIFFUSERS --gpu      (a Stable Diffusion 1.5 U-Net, bf16)

Pictures of the shapes world are drawn into a temporary folder unless a folder is given, with a metadata.jsonl of
{"file_name", "text"} lines, as both programs read it.

The programs run side by side and take turns of some steps, so that what else the machine does meets all of them. On the
CPU the cost is processor time, user and system, which shared cores change little; on a GPU it is the clock. Start-up,
the filling of caches, checkpoints and previews are not in it. `--losses` feeds both the same order, noise and times.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from train_step_ours import SAVE

from latentgen.core.files import file_sha256, write_json, write_text
from latentgen.core.rand import Draw
from latentgen.data.order import Shuffled
from latentgen.data.sources.shapes import ShapesSource
from latentgen.formats.model_folder import load_model, save_model
from latentgen.models.text import prompt_length, states_width
from latentgen.models.unet import build_unet
from latentgen.recipe import build
from latentgen.recipe.load import load_recipe

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE = ROOT / "docs" / "training.md"
RESULTS = HERE / "results" / "train_step"
BEGIN, END = "<!-- train_step.py writes from here -->", "<!-- to here -->"
CPU_AIMS = {"ours, caches": 1.5, "ours, no caches": 1.15}
GPU_AIMS = {"peer": 2.0, "peer, compiled": 1.3}
MFU_AIM, SAVE_AIM = 0.4, 0.5
TIMES, PICTURES = 1000, 128
CASES = (("shipped", 16, "fp32"), ("shipped", 16, "bf16"), ("quickstart", 32, "fp32"), ("quickstart", 32, "bf16"))
"""On the CPU: whose U-Net, batch, precision."""

MODELS = {
    "shipped": "the model that comes with the project",
    "quickstart": "the U-Net of configs/quickstart.yaml, with random weights, beside its VAE and text encoder",
}


@dataclass(frozen=True)
class Work:
    """What all programs are given."""

    model: Path
    pictures: Path
    out: Path
    peer: Path
    batch: int
    steps: int
    turn: int
    resolution: int
    precision: str
    gpu: bool
    losses: bool

    def ours(self, *more: str) -> list[str]:
        values = {
            "model": self.model, "pictures": self.pictures, "batch": self.batch, "steps": self.steps,
            "turn": self.turn, "resolution": self.resolution, "precision": self.precision,
        }  # fmt: skip
        words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        flags = ["--gpu"] * self.gpu + ["--losses"] * self.losses
        return [sys.executable, str(HERE / "train_step_ours.py"), *words, *flags, *more]

    def theirs(self, *more: str) -> list[str]:
        values = {
            "pretrained_model_name_or_path": self.model, "train_data_dir": self.pictures,
            "resolution": self.resolution, "train_batch_size": self.batch, "max_train_steps": self.steps,
            "learning_rate": 1e-4, "adam_weight_decay": 0.0, "max_grad_norm": 1.0, "checkpointing_steps": 10**9,
            "output_dir": self.out / "peer", "image_column": "image", "caption_column": "text",
            "mixed_precision": {"fp32": "no"}.get(self.precision, self.precision),
        }  # fmt: skip
        words = [f"--{key}={value}" for key, value in values.items()]
        wrapper = ["--peer", str(self.peer), "--turn", str(self.turn), *["--wall"] * self.gpu, *more]
        return [sys.executable, str(HERE / "train_step_peer.py"), *wrapper, "--", *words, "--use_ema", "--center_crop"]


class Program:
    """A running program that takes turns."""

    def __init__(self, command: list[str], log: Path, gpu: bool) -> None:
        threads = {} if gpu else {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.log = log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(log, "w"), text=True,
            env={**os.environ, **threads, "PYTHONPATH": path},
        )  # fmt: skip
        self.parts: dict[str, float] = {}

    def turn(self) -> dict[str, Any]:
        """Wait for the report of the turn that it is doing."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            report = json.loads(line)
            if "parts" in report:
                self.parts = report["parts"]
            else:
                return report
        raise SystemExit(f"a program ended early; see {self.log}:\n{self.log.read_text()[-2000:]}")

    def go(self) -> None:
        """Let it do its next turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def race(commands: dict[str, list[str]], turns: int, out: Path, gpu: bool) -> tuple[dict[str, list[float]], Any]:
    """Seconds a step of every turn but the first, which warms up; and where our time goes in each turn."""
    programs = {name: Program(command, out / f"{number}.log", gpu) for number, (name, command) in
                enumerate(commands.items())}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    try:
        for program in programs.values():
            program.turn()
        for _ in range(turns):
            for name, program in programs.items():
                program.go()
                report = program.turn()
                seconds[name].append(report["seconds"] / report["steps"])
                parts[name].append({key: value / report["steps"] for key, value in program.parts.items()})
    finally:
        for program in programs.values():
            program.end()
    return seconds, parts


def ratios(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Median, least and greatest of what the slow one takes over what the fast one takes, turn by turn."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(each), min(each), max(each)


def write_pictures(folder: Path, count: int, resolution: int) -> None:
    """A folder of captioned pictures as both programs read it."""
    source, lines = ShapesSource(seed=0, size=count, split="train", resolution=resolution), []
    folder.mkdir(parents=True)
    for number in range(count):
        name = f"{number:05d}.png"
        Image.fromarray(source.image(number)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": source.captions(number)[0]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_draws(file: Path, work: Work, latent: tuple[int, ...], pictures: int) -> None:
    """Our draws of every step, for the other program."""
    table: dict[str, list[torch.Tensor]] = {"order": [], "noise": [], "posterior": [], "time": []}
    for step in range(work.steps):
        first, rows = step * work.batch, range(work.batch)
        indices = Shuffled(pictures).at(range(first, first + work.batch), 0, "unet")
        draw = Draw(0, "unet", step, work.batch, rows, indices)
        u = (draw.permutation("stratum") + draw.uniform("level")) / work.batch
        table["order"].append(torch.tensor(indices))
        table["noise"].append(draw.normal("noise", latent))
        table["posterior"].append(draw.normal("posterior", latent))
        table["time"].append((u * TIMES).floor().long().clamp(max=TIMES - 1))
    save_file({name: torch.stack(values) for name, values in table.items()}, file)


def write_large_model(folder: Path, start: Path) -> None:
    """Stable Diffusion 1.5's U-Net with random weights, beside the other networks of `start` with its widths."""
    model = load_model(start)
    unet = build_unet(
        latent_size=64, latent_channels=model.vae.config["latent_channels"], channels=(320, 640, 1280, 1280),
        layers_per_block=2, attention=(True, True, True, False), heads=8,
        context_dim=states_width(model.towers),
    )  # fmt: skip
    save_model(dataclasses.replace(model, unet=unet), folder)


def compare_losses(work: Work, pictures: int) -> None:
    """Print both programs' losses on the same draws; fail where they part by more than 1e-5."""
    model = load_model(work.model)
    side = work.resolution // 2 ** (len(model.vae.config["block_out_channels"]) - 1)
    write_draws(work.out / "draws.safetensors", work, (model.vae.config["latent_channels"], side, side), pictures)
    commands = (work.ours("--out", str(work.out / "ours")), work.theirs("--draws", str(work.out / "draws.safetensors")))
    found: list[list[float]] = []
    for number, command in enumerate(commands):
        program = Program(command, work.out / f"losses-{number}.log", gpu=False)
        found.append(program.turn()["losses"])
        program.end()
    worst = max(abs(a - b) / abs(b) for a, b in zip(*found, strict=True))
    for step, (a, b) in enumerate(zip(*found, strict=True)):
        print(f"{step:>4} {a:.7f} {b:.7f}")
    print(f"greatest relative difference of {len(found[0])} losses: {worst:.1e} (aim 1e-5)")
    if worst > 1e-5:
        raise SystemExit(1)


def write_model(kind: str, folder: Path, start: Path) -> None:
    """The model that all programs begin with, in float32."""
    model = load_model(start)
    if kind == "quickstart":
        recipe = load_recipe(ROOT / "configs" / "quickstart.yaml", ())
        torch.manual_seed(0)
        unet = build.new_model(recipe, model.vae, model.towers).unet
        model = dataclasses.replace(model, unet=unet)
    save_model(model, folder, torch.float32)


def race_cpu(work: Work, turns: int) -> dict[str, Any]:
    """The three programs in turns; seconds of a step, and where ours go."""
    commands = {
        "peer": work.theirs(),
        "ours, caches": work.ours("--out", str(work.out / "a"), "--caches", str(work.out / "caches"), "--parts"),
        "ours, no caches": work.ours("--out", str(work.out / "b")),
    }
    seconds, parts = race(commands, turns, work.out, gpu=False)
    mine = parts["ours, caches"]
    shares = {name: statistics.median(part.get(name, 0.0) for part in mine) for name in mine[0]}
    rest = [t - sum(part.values()) for t, part in zip(seconds["ours, caches"], mine, strict=True)]
    shares["the loop itself, and all the rest"] = statistics.median(rest)
    return {"seconds": seconds, "parts": shares}


def report_cpu(found: dict[str, Any]) -> str:
    """The tables of all cases."""
    lines = [
        "| U-Net | batch | precision | program | samples per CPU second | times the peer's (turns) | aim |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        for name, values in case["seconds"].items():
            middle, least, greatest = ratios(case["seconds"]["peer"], values)
            times = f"{middle:.2f} ({least:.2f}, {greatest:.2f}) | {CPU_AIMS[name]}" if name in CPU_AIMS else "|"
            rate = case["batch"] / statistics.median(values)
            lines.append(f"| {case['model']} | {case['batch']} | {case['precision']} | {name} | {rate:.1f} | {times} |")
    heads = [f"{case['model']}, {case['precision']}" for case in found["cases"]]
    lines += ["", f"| part of our step, ms and share | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    wholes = [statistics.median(case["seconds"]["ours, caches"]) for case in found["cases"]]
    names = list(found["cases"][0]["parts"])
    for name in sorted(names, key=lambda name: -found["cases"][0]["parts"][name]):
        cells = [
            f"{1e3 * case['parts'].get(name, 0.0):.2f} ({case['parts'].get(name, 0.0) / whole:.1%})"
            for case, whole in zip(found["cases"], wholes, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("| whole | " + " | ".join(f"{1e3 * whole:.2f}" for whole in wholes) + " |")
    return "\n".join(lines)


def write_down(found: dict[str, Any], text: str, docs: bool) -> None:
    """Numbers and tables beside this script, and into the docs where asked."""
    head = (
        f"{found['turns']} turns of {found['turn']} steps of each program, one thread of {found['cpu']}, "
        f"{found['pictures']}, {found['resolution']} px, torch {found['torch']}, diffusers {found['diffusers']}; "
        f"the peer's script has the SHA-256 {found['script'][:12]}. "
        + "; ".join(f"{name}: {what}" for name, what in MODELS.items())
        + "."
    )
    write_json(RESULTS.with_suffix(".json"), found)
    write_text(RESULTS.with_suffix(".md"), f"# What a step costs\n\n{head}\n\n{text}\n")
    if docs:
        page = PAGE.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        write_text(PAGE, f"{before}{BEGIN}\n\n{head}\n\n{text}\n\n{END}{after}")


def cpu_name() -> str:
    """What the system calls its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    words = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = words.get("model name", platform.processor() or "a CPU")
    family = f" (family {words['cpu family']})" if "cpu family" in words else ""
    return f"{name}{family}, {torch.backends.cpu.get_cpu_capability()}"


def flops_an_image(model: Path, resolution: int) -> float:
    """FLOPs of a forward and a backward pass of the U-Net for one picture, counted, not timed."""
    found = load_model(model)
    unet, side = found.unet.train().requires_grad_(True), resolution // 8
    unet.to(device="meta")  # type: ignore[call-arg]
    x = torch.empty(1, unet.config["in_channels"], side, side, device="meta")
    context = torch.empty(1, prompt_length(found.towers, found.chunks), states_width(found.towers), device="meta")
    with FlopCounterMode(display=False) as counter:
        out = unet(x, torch.zeros(1, device="meta"), encoder_hidden_states=context, return_dict=False)[0]
        out.sum().backward()
    return float(counter.get_total_flops())


def report_gpu(work: Work, turns: int, peak: float) -> None:
    """Images per second at the size of Stable Diffusion 1.5, share of peak, and how long a save stops training,
    against the peer eager and compiled."""
    save = work.turn * (turns + 1) - work.turn // 2  # in the last turn
    caches = ("--caches", str(work.out / "caches"))
    commands = {
        "peer": work.theirs(),
        "peer, compiled": work.theirs("--compile"),
        "ours, caches": work.ours("--out", str(work.out / "a"), *caches),
    }
    saving = {"ours": work.ours("--out", str(work.out / "b"), *caches, "--parts", "--save-every", str(save))}
    seconds: dict[str, list[float]] = {}
    for name, command in commands.items():  # one at a time: together they would share the memory
        seconds |= race({name: command}, turns, work.out, gpu=True)[0]
    _, parts = race(saving, turns, work.out, gpu=True)
    needed = flops_an_image(work.model, work.resolution)
    for name, values in seconds.items():
        rate = work.batch / statistics.median(values)
        print(f"{work.resolution} px, {name}: {rate:.1f} images/s, {rate * needed / peak:.1%} of peak")
    print(f"aim {MFU_AIM:.0%} of peak")
    for name, aim in GPU_AIMS.items():
        middle, least, greatest = ratios(seconds[name], seconds["ours, caches"])
        print(f"times {name}: {middle:.2f} ({least:.2f}, {greatest:.2f}), aim {aim}")
    waited = max(part.get(SAVE, 0.0) * work.turn for part in parts["ours"])
    print(f"a save stops training for {waited:.2f} s, with what was still computing (aim {SAVE_AIM})")


def folder_of_pictures(given: Path | None, out: Path, resolution: int) -> tuple[Path, int, str]:
    """The folder, how many pictures it has, and what they are."""
    if given is None:
        write_pictures(out / "pictures", PICTURES, resolution)
        return out / "pictures", PICTURES, f"{PICTURES} pictures of the shapes world"
    count = len((given / "metadata.jsonl").read_text().splitlines())
    return given, count, f"{count} pictures of a folder"


def main() -> None:
    """Make model and pictures, race, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of github.com/huggingface/diffusers")
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "shapes-model")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn", type=int, default=10, help="steps")
    parser.add_argument("--batch", type=int, help="in the place of each case's own")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="only the cases of this one")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--losses", action="store_true", help="compare 20 losses instead")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of the GPU in bf16, dense (H100, H200)")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/training.md")
    o = parser.parse_args()
    script = o.peer / "examples" / "text_to_image" / "train_text_to_image.py"
    found: dict[str, Any] = {"script": file_sha256(script), "turns": o.turns, "turn": o.turn, "cpu": cpu_name()}
    found |= {"torch": torch.__version__, "diffusers": version("diffusers"), "cases": []}
    if o.gpu:
        runs = [("large", o.batch or 16, "bf16", resolution) for resolution in (256, 512)]
    else:
        chosen = CASES[:1] if o.losses else CASES
        runs = [(kind, o.batch or batch, precision, 64) for kind, batch, precision in chosen
                if o.precision in (None, precision)]  # fmt: skip
    for kind, batch, precision, resolution in runs:
        with tempfile.TemporaryDirectory() as name:
            out = Path(name)
            pictures, count, found["pictures"] = folder_of_pictures(o.pictures, out, resolution)
            found["resolution"] = resolution
            if o.gpu:
                write_large_model(out / "model", o.model)
            else:
                write_model(kind, out / "model", o.model)
            turn = 20 if o.losses else o.turn
            steps = 20 if o.losses else turn * (o.turns + 2)
            work = Work(
                out / "model", pictures, out, o.peer, batch, steps, turn, resolution, precision, o.gpu, o.losses
            )
            if o.losses:
                compare_losses(work, count)
            elif o.gpu:
                report_gpu(work, o.turns, o.peak)
            else:
                case = {"model": kind, "batch": batch, "precision": precision, **race_cpu(work, o.turns)}
                found["cases"].append(case)
                print(report_cpu({**found, "cases": [case]}), flush=True)
    if found["cases"]:
        write_down(found, report_cpu(found), o.docs)


if __name__ == "__main__":
    main()
