"""Error against a 4,000-step reference at equal numbers of network calls: our samplers and those of diffusers.

    python benchmarks/solvers.py [--quick] [--problems mixture shapes] [--calls 5 8] [--model data/shapes-model] ...

Two problems: an analytic mixture of eight Gaussians in 64 dimensions, in float64 with the exact denoiser, and latents
of the shipped model under classifier-free guidance. Each deterministic sampler runs on each schedule, and so does each
deterministic scheduler of diffusers with its own choices of spacing and sigmas, in its own space, as its pipelines do.
All start from the same noise, and have taken their last call when they arrive at the end.

A call is one evaluation of the denoiser for each picture; guidance doubles it for all alike. n calls means the most
steps that cost at most n. The error of a picture is the root mean square distance from where the probability flow
ends; what is shown is its geometric mean over the pictures. The flow is followed to sigma_min, the lowest level that a
network knows, and from there in one step to 0, as every sampler here does. Schedulers of diffusers that stop at
sigma_min (DEIS, SA-Solver) are compared with the flow at that level, which spares them the last step.

The best of each side are then measured again on twice as many other pictures, so that what won by chance among
many is not called best, with bootstrap intervals. Schedules are fitted to OTHER noise (and other prompts) than what is
measured. Results are kept in --cache as they come, so an interrupted run goes on where it was, and runs with other
--calls can go side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from solver_problems import Counted, Problem, mixture, shapes
from solver_report import Results, best, final_table, verdict, write_docs
from solver_theirs import run, variants
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.core.files import content_key, file_sha256, write_json
from latentgen.diffusion.fitted import errors_of, fit
from latentgen.diffusion.parameterization import Parameterization
from latentgen.diffusion.samplers import (
    SAMPLERS,
    Sampler,
    deis,
    dpmpp_2m,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    lms,
    unipc,
)
from latentgen.diffusion.schedules import SCHEDULES, exponential

DEFAULT = "dpmpp_2m"
BUDGETS = (5, 8, 10, 15, 20, 30)
FITTED, FEW = {"mixture": 4, "shapes": 2}, 10
"""Samplers to fit a schedule for, at each number of calls: those that do best unfitted; with FEW calls the default
too, and from more starts."""
KNOBS: Mapping[str, Sampler] = {
    "deis, order=2": partial(deis, order=2),
    "lms, order=2": partial(lms, order=2),
    "unipc, order=2": partial(unipc, order=2),
    "dpmpp_2s_ancestral, eta=0": partial(dpmpp_2s_ancestral, eta=0.0),
    "dpmpp_3m_sde, eta=0": partial(dpmpp_3m_sde, eta=0.0),
}
"""What diffusers' schedulers are measured at, or offer: other orders, and the stochastic ones without noise."""
ROOT = Path(__file__).resolve().parents[1]
Levels = dict[str, list[float]]
"""{"sampler calls": what was fitted}."""
FINALISTS = 3
"""Methods of each side, at each number of calls, that are measured again on further pictures."""


def deterministic() -> dict[str, Sampler]:
    """Registered samplers that ask for no noise and whose number of calls follows from that of steps; KNOBS."""
    usual: dict[str, Sampler] = {name: method for name, method in SAMPLERS.items() if method.calls is not None}
    return {name: sampler for name, sampler in {**usual, **KNOBS}.items() if calls_of(sampler, 2) is not None}


def calls_of(sampler: Sampler, n: int) -> float | None:
    """Evaluations that n steps from 1 over 0.1 to 0 cost, counted on one number; None for a sampler that adds noise."""
    counted = Counted(lambda x, sigma: x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2), 1)
    try:
        sampler(counted, torch.ones(1, 1, 1, 1), torch.cat([torch.linspace(1, 0.1, n), torch.zeros(1)]))
    except UserError:
        return None
    return counted.calls


def steps_for(sampler: Sampler, budget: int) -> int:
    """The most steps that cost at most `budget` calls; 0 where even one costs more."""
    return max((n for n in range(1, budget + 1) if (calls_of(sampler, n) or budget + 1) <= budget), default=0)


def schedules_for(n: int, p: Parameterization) -> dict[str, Tensor]:
    """The levels of every schedule that serves n steps, without those that repeat another's."""
    found: dict[str, Tensor] = {}
    for name, make in SCHEDULES.items():
        try:
            sigmas = make(n, p)
        except UserError:
            continue
        if not any(torch.allclose(sigmas, other, rtol=1e-6) for other in found.values()):
            found[name] = sigmas
    return found


def start(problem: Problem, sigma: float, test: bool = True) -> Tensor:
    """The same noise at any level, with the spread of unit data added: what x / sqrt(1 + sigma^2) starts from."""
    return problem.noise(test) * (1 + sigma**2) ** 0.5


class Bench:
    """One problem, its reference, and the results so far."""

    def __init__(self, problem: Problem, reference_steps: int, cache: Path, settings: dict[str, object]) -> None:
        key = content_key({**settings, "problem": problem.name, "reference": reference_steps})[:12]
        self.problem, self.steps = problem, reference_steps
        cache.mkdir(parents=True, exist_ok=True)
        self.stem = cache / f"{problem.name}-{key}"
        self.targets_file = self.stem.with_suffix(".safetensors")
        self.levels_file = cache / f"levels-{self.stem.name}.json"
        self.levels: Levels = json.loads(self.levels_file.read_text()) if self.levels_file.is_file() else {}
        self.results: Results = {}
        for path in cache.glob(f"{self.stem.name}-*.json"):  # one for each number of calls
            for label, error in json.loads(path.read_text()).items():
                self.results.setdefault(label, {})[path.stem.rpartition("-")[2]] = error

    def targets(self, test: bool = True) -> dict[str, Tensor]:
        """Where the flow is at sigma_min, and its end. The fitting set needs fewer steps: it only guides a search."""
        pictures = len(self.problem.noise(test))
        path = self.targets_file if test else self.targets_file.with_stem(f"{self.targets_file.stem}-fit-{pictures}")
        if not path.is_file():
            p, problem = self.problem.parameterization, self.problem
            steps = self.steps if test else min(self.steps, 100)
            sigmas, denoise = exponential(steps, p), problem.denoiser(test)
            at_min = dpmpp_2m(denoise, start(problem, p.sigma_max, test), sigmas[:-1])
            end = dpmpp_2m(denoise, at_min, sigmas[-2:])
            save_file({"at_min": at_min, "end": end}, path)
        return load_file(path)

    def put(self, key: str, budget: int, logs: Tensor) -> None:
        error = float(logs.mean().exp())
        self.results.setdefault(key, {})[str(budget)] = error
        these = {label: errors[str(budget)] for label, errors in self.results.items() if str(budget) in errors}
        write_json(self.stem.with_name(f"{self.stem.name}-{budget}.json"), these)
        print(f"{self.problem.name:8} {key:40} {budget:3} calls  {error:.3g}", flush=True)

    def missing(self, key: str, budgets: Iterable[int]) -> list[int]:
        return [budget for budget in budgets if str(budget) not in self.results.get(key, {})]

    def measure(self, sampler: Sampler, sigmas: Tensor, budget: int) -> Tensor:
        """Logarithm of the error of each picture [b], from one run of ours, after checking what it cost."""
        x = start(self.problem, float(sigmas[0]))
        counted = Counted(self.problem.denoiser(True), len(x))
        out = sampler(counted, x, sigmas)
        assert counted.calls <= budget, f"{counted.calls} calls where {budget} were allowed"
        return errors_of((out - self.targets()["end"]).flatten(1)).log()

    def measure_theirs(self, label: str, budget: int) -> Tensor | None:
        """The same of one of diffusers; None where it cannot be set up."""
        found = run(self.problem, label, budget, self.problem.denoiser(True))
        if found is None:
            return None
        x, sigma, calls = found
        assert calls <= budget, f"{label}: {calls} calls where {budget} were allowed"
        assert sigma == 0 or abs(sigma / self.problem.parameterization.sigma_min - 1) < 0.01, f"{label} ends at {sigma}"
        return errors_of((x - self.targets()["end" if sigma == 0 else "at_min"]).flatten(1)).log()

    def measure_key(self, key: str, budget: int, levels: Levels) -> Tensor | None:
        """What `results` has under a key, of these pictures; levels: what was fitted."""
        side, name = key.split(" | ")
        if side == "theirs":
            return self.measure_theirs(name, budget)
        samplers = deterministic()
        if side == "fitted":
            return self.measure(samplers[name], torch.tensor(levels[f"{name} {budget}"]), budget)
        name, _, schedule = name.rpartition(" ")
        sigmas = schedules_for(steps_for(samplers[name], budget), self.problem.parameterization)[schedule]
        return self.measure(samplers[name], sigmas, budget)

    def run_theirs(self, budgets: Iterable[int]) -> None:
        for label in variants():
            key = f"theirs | {label}"
            for budget in self.missing(key, budgets):
                logs = self.measure_theirs(label, budget)
                if logs is not None:
                    self.put(key, budget, logs)

    def run_ours(self, budgets: Iterable[int]) -> None:
        for name, sampler in deterministic().items():
            for budget in budgets:
                for schedule, sigmas in schedules_for(
                    steps_for(sampler, budget), self.problem.parameterization
                ).items():
                    key = f"ours | {name} {schedule}"
                    if self.missing(key, [budget]):
                        self.put(key, budget, self.measure(sampler, sigmas, budget))

    def run_fitted(self, budgets: Iterable[int], best: int) -> None:
        """Fit to the other pictures, measure on these. best: so many samplers."""
        p, samplers = self.problem.parameterization, deterministic()
        for budget in budgets:
            ranked = sorted(samplers, key=lambda name: self.best_of_sampler(name, budget))
            few = budget <= FEW  # a search takes as many runs a round as there are levels
            for name in list(dict.fromkeys([DEFAULT, *ranked]))[:best] if few else ranked[:best]:
                key, n = f"fitted | {name}", steps_for(samplers[name], budget)
                if self.missing(key, [budget]) and n > 0:
                    x, target = start(self.problem, p.sigma_max, test=False), self.targets(test=False)["end"]
                    rounds, starts = (12, 2) if few else (4, 1)
                    found = fit(
                        self.problem.denoiser(False),
                        x,
                        n,
                        p,
                        solver=samplers[name],
                        target=target,
                        rounds=rounds,
                        starts=starts,
                    )
                    self.levels[f"{name} {budget}"] = found.sigmas.tolist()
                    write_json(self.levels_file, self.levels)
                    self.put(key, budget, self.measure(samplers[name], found.sigmas, budget))

    def best_of_sampler(self, name: str, budget: int) -> float:
        keys = [f"ours | {name} {schedule}" for schedule in SCHEDULES]
        return min(self.results[key].get(str(budget), float("inf")) for key in keys if key in self.results)


def finals(bench: Bench, again: Bench, budgets: Iterable[int]) -> dict[str, dict[str, list[float]]]:
    """The finalists of each side on the pictures of `again`: logarithm of each picture's error."""
    path = again.stem.with_name(f"finals-{again.stem.name}.json")
    found: dict[str, dict[str, list[float]]] = json.loads(path.read_text()) if path.is_file() else {}
    for budget in budgets:
        for key in [
            key for side in ("theirs", "ours", "fitted") for key in best(bench.results, side, budget, FINALISTS)
        ]:
            if str(budget) not in found.get(key, {}):
                logs = again.measure_key(key, budget, bench.levels)
                assert logs is not None
                found.setdefault(key, {})[str(budget)] = logs.tolist()
                write_json(path, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures, 5 and 10 calls, a reference of 400 steps")
    parser.add_argument("--problems", nargs="+", choices=("mixture", "shapes"), default=["mixture", "shapes"])
    parser.add_argument("--calls", type=int, nargs="+", default=None, help=f"default: {BUDGETS}")
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "shapes-model")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--pictures", type=int, help="default: 64 of the mixture, 16 of the model")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / ".cache" / "solvers")
    parser.add_argument("--no-docs", action="store_true", help="print only")
    options = parser.parse_args()
    budgets, reference_steps = ((5, 10), 400) if options.quick else (BUDGETS, 4000)
    budgets = tuple(options.calls or budgets)
    usual = {"mixture": 16, "shapes": 4} if options.quick else {"mixture": 64, "shapes": 16}
    with torch.no_grad():
        for name in options.problems:
            pictures = options.pictures or usual[name]
            benches = []
            for first, number in ((0, pictures), (pictures, 2 * pictures)):
                settings: dict[str, object] = {"pictures": number}
                if first:
                    settings["first"] = first
                if name == "mixture":
                    problem = mixture(number, first)
                else:
                    problem = shapes(options.model, number, options.guidance_scale, first)
                    weights = sorted((options.model / "unet").glob("*.safetensors"))
                    hashes = [file_sha256(path) for path in weights]
                    settings.update(model=hashes, guidance_scale=options.guidance_scale)
                benches.append(Bench(problem, reference_steps, options.cache, settings))
            bench, again = benches
            bench.run_theirs(budgets)
            bench.run_ours(budgets)
            bench.run_fitted([b for b in budgets if b <= FEW or name == "mixture"], best=FITTED[name])
            print("\n".join(verdict(bench.results)))
            last = finals(bench, again, budgets)
            print("\n" + final_table(last, 2 * pictures))
            if not options.no_docs and not options.quick:
                write_docs(bench.problem, bench.results, last, 2 * pictures, list(deterministic()))


if __name__ == "__main__":
    main()
