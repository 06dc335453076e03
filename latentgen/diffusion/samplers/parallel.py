"""Parallel sampling: many steps at once, iterated until they agree (ParaDiGMS, arXiv 2305.16317).

A step needs the result of the one before it, so sampling is slow however much the hardware could do at a time. Picard
iteration guesses the whole path, evaluates the network at a window of its points in ONE call, redraws the path from
these estimates, and moves the window over the points that no longer change. It makes more evaluations than the
sequential sampler, in fewer rounds: worth it where a batch of `window` pictures takes about the time of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Denoiser, per_example
from latentgen.diffusion.samplers.common import NoiseSource, OnStep, levels_of


def parallel(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    window: int = 16,
    tolerance: float = 1e-3,
) -> Tensor:
    """What `euler` and `ddim` draw, found by Picard iteration over a sliding window (arXiv 2305.16317, algorithm 1).

    denoise is called with the window's points one after another, each a whole batch: x [w * b, c, h, w] and
    sigma [w * b], w <= window; row r belongs to picture r % b. It must know its conditioning for such a batch.

    A point has converged when an iteration changes it by at most `tolerance` (root mean square, in units of
    sqrt(1 + sigma^2), the spread of white data at that level). With tolerance 0 the result is that of `euler`: every
    iteration settles at least the window's first step, exactly. Each picture has its own window, and converges by
    itself, so it does not depend on its batch. Keeps all n + 1 points of the path in memory.

    on_step(i, x, x0_hat) is called in order, when step i has converged for the whole batch.

    Raises UserError for a window below 1, a negative tolerance, or levels that neither descend nor ascend.
    """
    del noise
    if window < 1:
        raise UserError(f"window {window}: parallel sampling needs at least 1 step at a time.")
    if not tolerance >= 0:
        raise UserError(f"tolerance {tolerance}: it must not be negative (0 is the sequential result).")
    b, n = len(x), len(sigmas) - 1
    levels = torch.tensor(levels_of(sigmas, "parallel"), dtype=torch.float64, device=x.device)
    if n == 0:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    path = torch.stack([x * ratio.to(wide) for ratio in levels / levels[0]]).to(x.dtype)  # the guess of x0_hat = 0
    path[0] = x
    estimates = torch.zeros_like(path[:n]) if on_step is not None else None
    rows = torch.arange(b, device=x.device)
    start = torch.zeros_like(rows)  # each picture's last settled point
    reported = 0
    while reported < n:
        w = min(window, n - reported)
        own = (n - start).clamp(max=window)  # steps in each picture's window
        at = (start + torch.arange(w, device=x.device)[:, None]).clamp(max=n - 1)  # [w, b]
        points = path[at, rows]
        x0_hats = denoise(points.flatten(0, 1), levels[at].flatten().to(wide)).reshape(points.shape)
        path, x_end, changed = _redraw(path, points[0], x0_hats, levels, at, own)
        if estimates is not None:
            estimates[at, rows] = x0_hats
        path = _guess_beyond(path, x_end, x0_hats[own.clamp(min=1) - 1, rows], levels, start + own)
        settled = (changed <= tolerance).long().cumprod(dim=0).sum(dim=0)
        start = start + torch.minimum(settled + 1, own)  # the point after a settled one was drawn from settled ones
        settled_by_all = int(start.min())
        if on_step is not None and estimates is not None:
            for i in range(reported, settled_by_all):
                on_step(i, path[i + 1], estimates[i])
        reported = settled_by_all
    return path[n]


def _redraw(
    path: Tensor, x: Tensor, x0_hats: Tensor, levels: Tensor, at: Tensor, own: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Euler steps through the window from its first point x, with the estimates at hand.

    Returns the new path, the last point of each picture's window, and how far each point moved [w, b]. The paper adds
    up the slopes of the former path. Here the part of a step that is linear in x uses the new path: the
    fixed point is the same, it is met in fewer rounds, and the window's first step is the sequential one to the bit.
    """
    path, rows, changes = path.clone(), torch.arange(len(x), device=x.device), []
    wide = torch.promote_types(x.dtype, torch.float32)
    for j, (i, x0_hat) in enumerate(zip(at, x0_hats, strict=True)):
        inside, before = per_example(j < own, x), path[i + 1, rows]
        ratio = per_example((levels[i + 1] / levels[i]).to(wide), x)
        x = torch.where(inside, (x0_hat + ratio * (x - x0_hat)).to(x.dtype), x)
        path[i + 1, rows] = torch.where(inside, x, before)
        moved = torch.where(inside, x - before, 0).to(wide).flatten(1).square().mean(dim=1).sqrt()
        changes.append(moved.detach() / (1 + levels[i + 1] ** 2).sqrt())
    return path, x, torch.stack(changes)


def _guess_beyond(path: Tensor, x_end: Tensor, x0_hat: Tensor, levels: Tensor, end: Tensor) -> Tensor:
    """The path with the points after `end` [b] on the line from the window's last point to its last estimate."""
    ratio = levels[:, None] / levels[end].clamp(min=1e-30)
    ratio = ratio.reshape(*ratio.shape, *[1] * (x_end.ndim - 1)).to(torch.promote_types(path.dtype, torch.float32))
    beyond = torch.arange(len(path), device=path.device)[:, None] > end
    beyond = beyond.reshape(*beyond.shape, *[1] * (x_end.ndim - 1))
    return torch.where(beyond, (x0_hat + ratio * (x_end - x0_hat)).to(path.dtype), path)
