"""Tables, plots and claims of `solvers.py`, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from plots import Line, line_chart
from solver_problems import Problem
from solver_theirs import METHODS, SIGMAS, SPACINGS

from latentgen.core.files import write_text
from latentgen.diffusion.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parents[1]
DOCS, PLOT = ROOT / "docs" / "samplers.md", ROOT / "docs" / "images" / "solvers-{}.png"
SAME = 1e-3
"""Errors are called equal that differ by less: the same method, in other spaces and other precision."""
Results = dict[str, dict[str, float]]
"""{"ours | sampler schedule" or "fitted | sampler" or "theirs | label": {calls: error}}."""
Finals = Mapping[str, Mapping[str, Sequence[float]]]
"""{the same: {calls: logarithm of the error of each picture}}, of the best ones, on further pictures."""


def best_of(results: Results, prefix: str, budget: int) -> tuple[float, str]:
    """The least error at a number of calls among the keys with a prefix, and whose it is. (inf, "-") if none."""
    found = [(errors[str(budget)], key) for key, errors in results.items() if key.startswith(prefix)
             and str(budget) in errors]  # fmt: skip
    return min(found, default=(float("inf"), "- | -"))


def budgets_of(results: Results) -> list[int]:
    return sorted({int(budget) for errors in results.values() for budget in errors})


def tables(results: Results, samplers: Sequence[str]) -> str:
    """Markdown: the best of each side, then every method with its best schedule."""
    budgets = budgets_of(results)
    head = "| | " + " | ".join(f"{budget} calls" for budget in budgets) + " |\n|---"
    lines = [head + "|---" * len(budgets) + "|"]
    for title, prefix in (("best of diffusers", "theirs"), ("best of ours", "ours"), ("ours, fitted", "fitted")):
        cells = [best_of(results, f"{prefix} |", budget) for budget in budgets]
        lines.append(
            f"| {title} | "
            + " | ".join(f"{e:.2g} ({key.split(' | ')[1]})" if e < 1e9 else "" for e, key in cells)
            + " |"
        )
    rows = [(f"ours: {name}", [f"ours | {name} {word}" for word in SCHEDULES], name) for name in samplers]
    choices = ("", *(f" {word}" for word in (*SPACINGS, *SIGMAS, "lu")))
    rows += [(f"diffusers: {name}", [f"theirs | {name}{word}" for word in choices], "") for name in METHODS]
    lines += ["", head.replace("| |", "| method, best schedule |", 1) + "|---" * len(budgets) + "|"]
    for title, keys, fitted in rows:
        cells = []
        for budget in budgets:
            error = best_of({key: results[key] for key in keys if key in results}, "", budget)[0]
            with_fit = results.get(f"fitted | {fitted}", {}).get(str(budget))
            cells.append((f"{error:.2g}" if error < 1e9 else "") + (f" / **{with_fit:.2g}**" if with_fit else ""))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(results: Results) -> list[str]:
    """What the benchmark claims, number of calls by number of calls."""
    said = []
    for budget in budgets_of(results):
        theirs, ours, fitted = (best_of(results, f"{side} |", budget) for side in ("theirs", "ours", "fitted"))
        best = min(ours, fitted)
        holds = "yes" if best[0] <= (1 + SAME) * theirs[0] else "NO"
        said.append(
            f"{budget:3} calls: ours {best[0]:.3g} ({best[1]}), diffusers {theirs[0]:.3g} ({theirs[1]}): {holds}"
        )
        better = "yes" if fitted[0] < ours[0] else "NO"
        said.append(f"    fitted {fitted[0]:.3g}, unfitted {ours[0]:.3g} ({ours[1]}): {better}")
    return said


def plot(problem: Problem, results: Results, path: Path) -> None:
    """Error over calls: the best of each side, and a few well-known pairs."""
    budgets = budgets_of(results)

    def line(title: str, prefix: str, strong: bool = False) -> Line:
        points = [(budget, best_of(results, prefix, budget)[0]) for budget in budgets]
        return Line(title, [(x, y) for x, y in points if y < 1e9], strong)

    lines = [
        line("best of diffusers", "theirs |", True),
        line("best of ours", "ours |", True),
        line("ours, fitted to the model", "fitted |", True),
        line("ours: dpmpp_2m karras", "ours | dpmpp_2m karras"),
        line("ours: dpmpp_2m trailing", "ours | dpmpp_2m trailing"),
        line("ours: heun karras", "ours | heun karras"),
        line("diffusers: UniPC, any sigmas", "theirs | UniPC "),
    ]
    line_chart(path, problem.title, "network calls", "error", [line for line in lines if line.points], log=True)


def best(results: Results, side: str, budget: int, n: int) -> list[str]:
    """Keys of the n least errors of a side at a number of calls."""
    found = {key: errors[str(budget)] for key, errors in results.items() if str(budget) in errors}
    return sorted((key for key in found if key.startswith(f"{side} |")), key=found.__getitem__)[:n]


def final_table(finals: Finals, pictures: int) -> str:
    """Markdown: of each side the best of those measured again, and how they compare: ratio and 95% interval."""
    lines = [
        f"The best of each side, measured again on {pictures} other pictures. Ratios of errors with 95% intervals "
        "(bootstrap over pictures); below 1 the first is nearer to the flow.",
        "",
        "| calls | diffusers | ours | ours, fitted | the better of ours / diffusers | fitted / ours |",
        "|---|---|---|---|---|---|",
    ]
    for budget in sorted({int(budget) for errors in finals.values() for budget in errors}):
        sides: dict[str, tuple[str, np.ndarray]] = {}
        for side in ("theirs", "ours", "fitted"):
            logs = {key.split(" | ")[1]: np.array(found[str(budget)]) for key, found in finals.items()
                    if key.startswith(f"{side} |") and str(budget) in found}  # fmt: skip
            if logs:
                sides[side] = min(logs.items(), key=lambda item: item[1].mean())
        cells = [f"{np.exp(sides[s][1].mean()):.2g} ({sides[s][0]})" if s in sides else "" for s in
                 ("theirs", "ours", "fitted")]  # fmt: skip
        mine = min((sides[s] for s in ("ours", "fitted") if s in sides), key=lambda item: item[1].mean())
        ratios = [_ratio(mine[1] - sides["theirs"][1])]
        ratios += [_ratio(sides["fitted"][1] - sides["ours"][1]) if "fitted" in sides else ""]
        lines.append(f"| {budget} | " + " | ".join([*cells, *ratios]) + " |")
    return "\n".join(lines)


def _ratio(differences: np.ndarray) -> str:
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, len(differences), (10_000, len(differences)))].mean(axis=1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return f"{np.exp(differences.mean()):.2f} ({low:.2f} to {high:.2f})"


def write_docs(problem: Problem, results: Results, finals: Finals, pictures: int, samplers: Sequence[str]) -> None:
    """Put the tables between the problem's markers in docs/samplers.md."""
    name, title = problem.name, problem.title
    text = DOCS.read_text(encoding="utf-8")
    begin, end = f"<!-- solvers {name} -->", f"<!-- end solvers {name} -->"
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    plot(problem, results, Path(str(PLOT).format(name)))
    image = f"![Error over network calls: {title}](images/{Path(str(PLOT).format(name)).name})"
    write_text(
        DOCS,
        f"{before}{begin}\n{image}\n\n{final_table(finals, pictures)}\n\n{tables(results, samplers)}\n{end}{after}",
    )
