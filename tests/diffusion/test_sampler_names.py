"""The names samplers and schedules go by."""

from __future__ import annotations

import pytest

from latentgen.core.errors import UserError
from latentgen.diffusion.samplers import ALIASES, SAMPLERS, find_sampler, resolve
from latentgen.diffusion.schedules import SCHEDULE_ALIASES, SCHEDULES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpmpp_2m", ("dpmpp_2m", None)),
        ("DPM++ 2M", ("dpmpp_2m", None)),
        (" dpm++2m ", ("dpmpp_2m", None)),
        ("dpm-solver++", ("dpmpp_2m", None)),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m_karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2S a Karras", ("dpmpp_2s_ancestral", "karras")),
        ("DPM2 a", ("dpm2_ancestral", None)),
        ("sample_dpm_2_ancestral", ("dpm2_ancestral", None)),
        ("Euler a", ("euler_ancestral", None)),
        ("k_euler_a", ("euler_ancestral", None)),
        ("LMS Karras", ("lms", "karras")),
        ("k_lms", ("lms", None)),
        ("UniPC", ("unipc", None)),
        ("uni_pc_sgm_uniform", ("unipc", "sgm_uniform")),
        ("DPM adaptive", ("dpm_adaptive", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_ancestral", None)),
        ("FlowMatchEulerDiscreteScheduler", ("euler", "flow")),
    ],
)
def test_names_of_other_tools(name: str, expected: tuple[str, str | None]) -> None:
    assert resolve(name) == expected
    assert find_sampler(name) is SAMPLERS[expected[0]]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_takes_every_schedules_name(name: str) -> None:
    for schedule in SCHEDULES:
        assert resolve(f"{name}_{schedule}") == (name, schedule)
        assert resolve(f"k_{name.upper()} {schedule}") == (name, schedule)
        assert resolve(name, schedule.upper()) == (name, schedule)


def test_the_tables_are_sound() -> None:
    assert not set(ALIASES) & set(SAMPLERS)
    for alias, (sampler, schedule) in ALIASES.items():
        assert sampler in SAMPLERS
        assert schedule is None or schedule in SCHEDULES
        assert resolve(alias) == (sampler, schedule), "reachable as it is spelt"
    assert not set(SCHEDULE_ALIASES) & set(SCHEDULES)
    assert set(SCHEDULE_ALIASES.values()) <= set(SCHEDULES)


def test_a_name_and_a_schedule_may_not_disagree() -> None:
    assert resolve("DPM++ 2M Karras", "karras") == ("dpmpp_2m", "karras")
    with pytest.raises(UserError, match="means the schedule 'karras': leave out --schedule beta"):
        resolve("DPM++ 2M Karras", "beta")
    with pytest.raises(UserError, match="unknown sampler"):
        resolve("FlowMatchEulerDiscreteScheduler Karras Beta")


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="did you mean 'euler'"):
        find_sampler("eular")
    with pytest.raises(UserError, match="did you mean 'karras'"):
        resolve("euler", "karas")
    assert resolve("euler", "normal") == ("euler", "linspace")
