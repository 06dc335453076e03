"""Figures of docs/diffusion.md and the table of samplers in docs/samplers.md, from the registries.

    python benchmarks/figures.py

What is added to a registry appears here by being listed; a sampler also needs a line in `WHEN`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from plots import Line, line_chart

from latentgen.core.errors import UserError
from latentgen.core.files import write_text
from latentgen.diffusion.losses import WEIGHTS
from latentgen.diffusion.noise_levels import DENSITIES
from latentgen.diffusion.noise_tables import BETAS, NoiseTable
from latentgen.diffusion.parameterization import EDM, Flow, V
from latentgen.diffusion.samplers import ALIASES, SAMPLERS
from latentgen.diffusion.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parents[1]
IMAGES, SAMPLERS_PAGE = ROOT / "docs" / "images", ROOT / "docs" / "samplers.md"
LEVELS = torch.logspace(-2.5, 2, 200, dtype=torch.float64)

WHEN = {
    "ddpm": "many steps (100 and more), or to follow the training process exactly",
    "ddim": "the same as euler; `eta` from 0 to 1 adds noise; inversion",
    "plms": "old pictures of Stable Diffusion 1 that should come out again",
    "euler": "simple and sturdy; flow models",
    "euler_ancestral": "variety between steps; does not settle as steps grow",
    "heun": "accuracy, from 20 calls on; the reference method",
    "dpm2": "as heun; kept for old pictures",
    "dpm2_ancestral": "kept for old pictures",
    "lms": "kept for old pictures; multistep, so unsteady with few steps",
    "dpmpp_2s_ancestral": "as euler_ancestral, second order, twice the cost",
    "dpmpp_2m": "**the default**: second order at one call a step; best with a fitted schedule",
    "dpmpp_sde": "noise, with few steps of two calls",
    "dpmpp_2m_sde": "noise, at one call a step: the usual choice among those",
    "dpmpp_3m_sde": "noise, from 25 steps on",
    "deis": "few steps, deterministic",
    "ipndm": "few steps, deterministic",
    "unipc": "10 to 20 steps, deterministic; corrects each step at no cost",
    "er_sde": "noise, few steps",
    "restart": "quality when calls are plenty: goes back up and down again",
    "lcm": "models distilled to consistency, 2 to 8 steps",
    "dpm_adaptive": "a tolerance in place of a number of steps",
    "parallel": "what euler draws, sooner, where the device has room for a window of steps",
}


def noise_tables() -> None:
    """alpha-bar over time of every table, and with zero terminal SNR."""
    lines = []
    for kind in BETAS:
        if BETAS[kind] in [BETAS[line.title] for line in lines]:
            continue  # another name for the same
        lines.append(Line(kind, _table_points(NoiseTable(kind=kind))))
    lines.append(Line("scaled_linear, zero SNR", _table_points(NoiseTable(zero_terminal_snr=True))))
    title = "Noise tables (betas from 0.00085 to 0.012)"
    line_chart(IMAGES / "noise-tables.png", title, "time t / T", "log10 of sigma", lines)


def _table_points(table: NoiseTable) -> list[tuple[float, float]]:
    sigmas, n = table.sigmas, table.num_timesteps
    return [((i + 1) / n, float(sigmas[i].log10())) for i in range(0, n, 5)] + [(1.0, float(sigmas[-1].log10()))]


def schedules(n: int = 10) -> None:
    """The levels of every sigma schedule."""
    by_levels: dict[tuple[float, ...], list[str]] = {}  # with usual knobs some are the same
    for name, schedule in SCHEDULES.items():
        by_levels.setdefault(tuple(schedule(n, V()).tolist()[:-1]), []).append(name)
    lines = [Line(", ".join(names), list(enumerate(levels))) for levels, names in by_levels.items()]
    line_chart(IMAGES / "schedules.png", f"Sigma schedules of {n} steps", "step", "sigma", lines, log=True)


def densities() -> None:
    """How often training sees each level: the density of log10(sigma), from the inverse distribution."""
    u = torch.linspace(0.0005, 0.9995, 2001, dtype=torch.float64)
    lines = []
    for name, density in DENSITIES.items():
        for model, p in (("v", V()), ("flow", Flow()), ("edm", EDM())):
            if (name == "log_normal") != (model == "edm") and name != "uniform":
                continue  # the log-normal one is EDM's own; it depends on no table
            points = _density_points(lambda u, density=density, p=p: density(u, p), u)
            lines.append(Line(f"{name}, {model}", points))
    title = "Densities of noise levels in training"
    line_chart(IMAGES / "densities.png", title, "log10 of sigma", "density", lines)


def _density_points(sigma_of: Callable[[torch.Tensor], torch.Tensor], u: torch.Tensor) -> list[tuple[float, float]]:
    logs = sigma_of(u).log10()
    every = 20  # differences over a fiftieth of the draws: a table is a broken line
    width, height = logs[every:] - logs[:-every], u[every:] - u[:-every]
    middle = (logs[every:] + logs[:-every]) / 2
    inside = (width > 1e-6) & (middle.abs() < 2.5)
    return [(float(x), float(y)) for x, y in zip(middle[inside], (height / width)[inside], strict=True)][::5]


def weights() -> None:
    """The loss weights on x0_hat, for a v network, each divided by its value at sigma = 1."""
    p, by_points = V(), dict[tuple[tuple[float, float], ...], list[str]]()  # for a v network some are the same
    c_out = p.scalings(LEVELS).c_out ** 2
    for name, weight in WEIGHTS.items():
        try:
            on_x0 = weight(LEVELS, p) / c_out
        except UserError:  # it is learned, and has no formula
            continue
        at_one = on_x0[(LEVELS - 1).abs().argmin()]
        pairs = zip(LEVELS.tolist(), (on_x0 / at_one).tolist(), strict=True)
        by_points.setdefault(tuple((s, float(f"{w:.9g}")) for s, w in pairs if w > 1e-4), []).append(name)
    lines = [Line(", ".join(names), points) for points, names in by_points.items()]
    line_chart(IMAGES / "weights.png", "Loss weights on x0 (v network)", "sigma", "weight", lines, log=True, log_x=True)


def sampler_table() -> None:
    """One row for every sampler, between the markers of docs/samplers.md."""
    aliases = {name: [alias for alias, (of, _) in ALIASES.items() if of == name] for name in SAMPLERS}
    rows = ["| sampler | order | calls a step | noise | when | also called |", "|---|---|---|---|---|---|"]
    for name, method in SAMPLERS.items():
        calls = "varies" if method.calls is None else str(method.calls)
        if method.calls is not None and method.calls_to_0 != method.calls:
            calls += f" ({method.calls_to_0} to 0)"
        order, noise = str(method.order) if method.order else "-", "yes" if method.noise else ""
        also = ", ".join(f"`{alias}`" for alias in aliases[name])
        rows.append(f"| `{name}` | {order} | {calls} | {noise} | {WHEN[name]} | {also} |")
    begin, end = "<!-- samplers -->", "<!-- end samplers -->"
    text = SAMPLERS_PAGE.read_text(encoding="utf-8")
    table = "\n".join(rows)
    write_text(SAMPLERS_PAGE, f"{text.split(begin)[0]}{begin}\n{table}\n{end}{text.split(end)[1]}")


def main() -> None:
    noise_tables()
    schedules()
    densities()
    weights()
    sampler_table()


if __name__ == "__main__":
    main()
