"""What users write, what goes together, and what every guidance promises with every sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance import CFG, GUIDANCE, Guidance, batched, bind, build, canonical, parse
from latentgen.diffusion.guidance import stack as module
from latentgen.diffusion.guidance.rules import APG
from latentgen.diffusion.guidance.stack import ALIASES, EULER_ONLY, REFUSED, RULES
from latentgen.diffusion.guidance.wrappers import Adaptive, Compose, Interval, Rescale
from latentgen.diffusion.parameterization import make
from latentgen.diffusion.samplers import SAMPLERS, find_sampler
from latentgen.diffusion.schedules import SCHEDULES

LEVELS = (14.6, 5.0, 2.0, 0.5, 0.0)
WRITTEN = {"autoguidance": "autoguidance,model=folder"}
"""Guidance that has a knob without a default."""


def ask(*texts: str, scale: float = 0.6, sampler: str = "euler", levels: Sequence[float] = LEVELS, **more) -> Guidance:
    return build(parse(texts), scale, sampler, levels, **more)


# --- words to guidance ------------------------------------------------------------------------------------------------


def test_nothing_said_is_cfg() -> None:
    assert ask(scale=4.0) == CFG(4.0)
    assert ask("cfg", scale=4.0) == CFG(4.0)


def test_the_order_of_words_does_not_matter() -> None:
    one = ask("rescale,phi=0.5", "interval,low=0.3,high=6", "apg,eta=0.2", "adaptive", scale=4.0)
    other = ask("adaptive", "apg, eta = 0.2", "Interval,low=0.3,high=6", "guidance-rescale,phi=0.5", scale=4.0)
    assert one == other == Rescale(Adaptive(Interval(APG(4.0, eta=0.2), low=0.3, high=6.0)), phi=0.5)
    assert hash(one) == hash(other)


def test_aliases_lead_to_names() -> None:
    assert set(ALIASES.values()) <= set(GUIDANCE)
    assert not set(ALIASES) & set(GUIDANCE)
    assert parse(("CFG++",))[0].name == "cfgpp"


def test_composition_gets_the_weights() -> None:
    assert ask("compose", scale=4.0, weights=(1.0, -1.0)) == Compose(CFG(4.0), weights=(1.0, -1.0))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("intervall",), "unknown --guidance 'intervall': did you mean 'interval'"),
        (("interval,hi=3",), "interval has no 'hi': .*it has low, high"),
        (("interval,inner=3",), "interval has no 'inner'"),
        (("cfgpp,levels=3",), "cfgpp has no 'levels': cfgpp has nothing to set"),
        (("cfg,scale=3",), "cfg has no 'scale'"),
        (("interval,low",), "write low=VALUE"),
        (("interval,low=1,low=2",), "write low=VALUE, once"),
        (("interval,low=deep",), "low=deep: give a number"),
        (("adaptive,threshold=nan",), "threshold=nan: give a number"),
        (("zero_init,steps=1.5",), "steps=1.5: give a whole number"),
        (("interval", "interval,low=1"), "interval: it is given twice"),
        (("apg", "cfg_zero"), "apg and cfg_zero: each decides alone how predictions combine"),
        (("rescale", "cfgpp"), "cfgpp and rescale do not go together: .*no picture"),
        (("autoguidance,model=x", "pag"), "autoguidance and pag do not go together: each has its own weak network"),
        (("compose", "interval"), "interval and compose do not go together"),
    ],
)
def test_refusals_say_what_and_why(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(texts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(EULER_ONLY))
def test_samplers_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--guidance {name} with --sampler dpmpp_2m: .*; choose euler"):
        ask(name, sampler="dpmpp_2m")
    for sampler in ("euler", "ddim", "k_euler", "ddim,eta=0", "euler,s_noise=1.1"):
        ask(name, sampler=sampler)
    for sampler in ("ddim,eta=0.5", "euler,s_churn=10", "euler_ancestral"):  # steps with noise are not Euler's
        with pytest.raises(UserError, match=f"--guidance {name} with --sampler {sampler}: .* noise.*; choose euler"):
            ask(name, sampler=sampler)


def test_guidance_that_remembers_is_refused_where_steps_are_taken_at_once() -> None:
    for text in ("adaptive", "apg"):
        with pytest.raises(
            UserError, match=f"--guidance {text} with --sampler parallel,window=4: .*one after the other"
        ):
            ask(text, sampler="parallel,window=4", scale=4.0)
    ask("apg,momentum=0", sampler="parallel", scale=4.0)


def test_one_way_to_write_it() -> None:
    assert canonical(()) == canonical(("cfg",)) == ("cfg",)
    written = canonical(("Rescale, phi=.5", "guidance-interval,high=3,low=0.28", "apg"))
    assert written == ("apg", "interval,high=3.0", "rescale,phi=0.5")
    assert parse(written) == parse(canonical(written))


def test_the_refused_pairs_are_names() -> None:
    assert {name for pair in REFUSED for name in pair} <= set(GUIDANCE)
    assert all(reason and not reason.endswith(".") for reason in REFUSED.values())


# --- what every guidance promises -------------------------------------------------------------------------------------


class World:
    """Gaussian data, another for each picture and kind, and its exact denoiser. Elementwise."""

    SPREAD: Mapping[str, float] = {"cond": 0.5, "uncond": 0.51, "weak": 0.7}

    def __init__(self, pictures: Sequence[int]) -> None:
        # The further the prompt's mean is from the others, the later predictions agree.
        self.strength = torch.tensor([0.01, 0.1, 0.5, 2.0])[list(pictures)]
        self.rows = torch.zeros(len(pictures), dtype=torch.int64)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pattern = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float32).reshape(x.shape[1:])
        out, start = [], 0
        for kind, at in rows.items():
            at = at % len(self.strength)  # samplers of many steps at once show every picture once a step
            self.rows += at.bincount(minlength=len(self.rows))
            xs, level = x[start : start + len(at)].float(), sigma[start : start + len(at)].float().reshape(-1, 1, 1, 1)
            pull = {"cond": 1.0, "cond2": -0.5, "weak": 0.2}.get(kind, 0.0) * self.strength[at].reshape(-1, 1, 1, 1)
            mean = 0.3 + pattern.flip(0) + pull * pattern.flip(1)
            variance = self.SPREAD.get(kind, 0.5) ** 2
            out.append(mean + (xs - mean) * (variance / (variance + level**2)))
            start += len(at)
        return torch.cat(out).to(x.dtype)


P = make("v")
N = 9
ALL = (0, 1, 2, 3)


def noise(pictures: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    own = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(40 + n)) for n in pictures]
    return (torch.stack(own) * P.sigma_max).to(dtype)


def sample(name: str, sampler: str, pictures: Sequence[int] = ALL, dtype=torch.float32) -> tuple[torch.Tensor, list]:
    """The drawn latents, and the evaluations that each picture cost."""
    sigmas = SCHEDULES["karras"](N, P)
    weights = (1.0, 0.5) if name == "compose" else (1.0,)
    scale = 0.6 if name == "cfgpp" else 4.0
    text = WRITTEN.get(name, name)
    guidance = ask(text, scale=scale, sampler=sampler, levels=sigmas.tolist(), weights=weights)
    return run(guidance, sampler, pictures, dtype, sigmas)


def run(guidance: Guidance, sampler: str, pictures: Sequence[int], dtype: torch.dtype, sigmas: torch.Tensor):
    world, x = World(pictures), noise(pictures, dtype)
    streams = [torch.Generator().manual_seed(7 + n) for n in pictures]

    def fresh(sigma: float, sigma_next: float) -> torch.Tensor:
        return torch.stack([torch.randn(4, 8, 8, generator=stream) for stream in streams]).to(dtype)

    out = find_sampler(sampler)(bind(guidance, batched(world)), x, sigmas, noise=fresh)
    return out, world.rows.tolist()


def fitting(name: str) -> list[str]:
    return ["ddim", "euler"] if name in EULER_ONLY else sorted(SAMPLERS)


REMEMBERING = ("adaptive", "apg")

PAIRS = [(name, sampler) for name in GUIDANCE for sampler in fitting(name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "sampler"), PAIRS)
def test_finite_with_every_sampler(name: str, sampler: str, dtype: torch.dtype) -> None:
    if sampler == "parallel" and name in REMEMBERING:
        with pytest.raises(UserError, match="one after the other"):
            sample(name, sampler, dtype=dtype)
        return
    out, rows = sample(name, sampler, dtype=dtype)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert max(rows) > 0


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("name", sorted(GUIDANCE))
def test_a_picture_does_not_depend_on_its_batch(name: str, sampler: str) -> None:
    if sampler not in fitting(name):
        sampler = "ddim"
    together, rows = sample(name, sampler)
    apart = [sample(name, sampler, (n,)) for n in ALL]
    assert torch.equal(together, torch.cat([out for out, _ in apart]))
    assert rows == [own for _, (own,) in apart], "nor does what it costs"


@pytest.mark.parametrize("name", sorted(set(GUIDANCE) - {"cfg", "threshold"}))
def test_each_does_something(name: str) -> None:
    assert not torch.equal(sample(name, "euler")[0], sample("cfg", "euler")[0])


def test_pictures_of_a_batch_stop_being_guided_at_different_steps() -> None:
    """Otherwise the test of batches above would say nothing about adaptive guidance."""
    _, rows = sample("adaptive", "euler")
    assert len(set(rows)) >= 3, rows
    assert N < min(rows) < max(rows) < 2 * N
    assert sample("cfg", "euler")[1] == [2 * N] * len(ALL)


@dataclass(frozen=True)
class DecidesTogether(Adaptive):
    """A mistake: the mean cosine of the batch decides for all."""

    @staticmethod
    def _cosine(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        own = Adaptive._cosine(a, b, x, sigma)
        return own.mean().expand_as(own)


def test_the_batch_test_catches_a_decision_made_together(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {name: DecidesTogether if name == "adaptive" else factory for name, factory in GUIDANCE.items()}
    monkeypatch.setattr(module, "GUIDANCE", broken)
    together, rows = sample("adaptive", "euler")
    apart = [sample("adaptive", "euler", (n,)) for n in ALL]
    assert not torch.equal(together, torch.cat([out for out, _ in apart]))
    assert rows != [own for _, (own,) in apart]


@dataclass(frozen=True)
class NeverForgets(APG):
    """A mistake: what it remembers lies in the guidance, not in the sampling call."""

    def combine(self, predictions, x, sigma, state):
        return super().combine(predictions, x, sigma, STALE)


STALE: dict[str, torch.Tensor] = {}


def test_the_same_guidance_draws_the_same_twice() -> None:
    sigmas = SCHEDULES["karras"](N, P)

    def twice(guidance: Guidance) -> bool:
        first, second = (run(guidance, "euler", ALL, torch.float32, sigmas)[0] for _ in range(2))
        return torch.equal(first, second)

    for guidance in (APG(4.0), Adaptive(CFG(4.0)), Adaptive(Interval(APG(4.0)))):
        assert twice(guidance)
    assert not twice(NeverForgets(4.0)), "the test above must be able to fail"


def test_every_rule_takes_the_scale() -> None:
    for name in RULES:
        assert ask(name, scale=0.3) != ask(name, scale=0.6)


def test_fewer_evaluations_are_really_made() -> None:
    levels = SCHEDULES["karras"](N, P).tolist()
    inside = sum(0.28 < level <= 5.42 for level in levels[:-1])
    assert 0 < inside < N
    assert sample("interval", "euler")[1] == [N + inside] * len(ALL)
    assert sample("zero_init", "euler")[1] == [2 * (N - 1)] * len(ALL)
    assert sample("compose", "euler")[1] == [3 * N] * len(ALL)
    assert sample("pag", "euler")[1] == [3 * N] * len(ALL)
