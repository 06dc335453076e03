"""The process a U-Net was trained on, to and from the scheduler file of a model folder.

A process is two plain values: what the network predicts, and a mapping of numbers:

    eps, v, x0   the fields of `NoiseTable`
    flow         {"shift": s}
    edm          {"sigma_data", "sigma_min", "sigma_max", "augmented_dim"}; augmented_dim null is plain EDM
    ve           {"sigma_min", "sigma_max"}

What diffusers can express is written as one of its schedulers, so that other tools sample with the process that was
trained. What it cannot (VE, PFGM++) names a scheduler of ours instead: those tools then refuse the folder and say why,
which is better than wrong pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from latentgen.core.errors import UserError
from latentgen.diffusion.noise_tables import TRAINED, NoiseTable
from latentgen.diffusion.parameterization import X0, Eps, Parameterization, V, make
from latentgen.diffusion.samplers.common import FAR


def parameterization(prediction: str, schedule: Mapping[str, Any]) -> Parameterization:
    """What the two values of a process mean.

    Raises:
        UserError: an unknown prediction, noise table or number.
    """
    if prediction in PREDICTION_TYPES:
        return make(prediction, _table(schedule))
    return make(prediction, **schedule)


def _table(schedule: Mapping[str, Any]) -> NoiseTable:
    try:
        return NoiseTable(**schedule)
    except TypeError as error:
        raise UserError(f"noise schedule {dict(schedule)} is not one of betas: {error}") from error


def scheduler_config(prediction: str, schedule: Mapping[str, Any], learned_variance: bool = False) -> dict[str, Any]:
    """The scheduler that other tools sample with, as the content of scheduler_config.json.

    * eps, v and x0 become EulerDiscreteScheduler with the same noise table; tables that it has no name for are written
      out as trained_betas. With a learned variance they become DDPMScheduler, the one that splits it off.
    * flow becomes DPMSolverMultistepScheduler with flow sigmas, because StableDiffusionPipeline cannot drive
      FlowMatchEulerDiscreteScheduler. It rounds the time down to a thousandth, which ours does not.
    * edm becomes EDMEulerScheduler.
    * ve, and edm with an augmented dimension, name a scheduler of `OURS`, which diffusers refuses.

    Raises:
        UserError: no such prediction or table.
    """
    if prediction == "flow":
        return _flow_config(schedule)
    if prediction in ("edm", "ve"):
        return _sigma_config(prediction, schedule)
    if prediction not in PREDICTION_TYPES:
        known = ", ".join([*PREDICTION_TYPES, "flow", "edm", "ve"])
        raise UserError(f'a model folder cannot say that the U-Net predicts "{prediction}"; it can say {known}')
    table = _table(schedule)
    name = {"cosine": "squaredcos_cap_v2"}.get(table.kind, table.kind)
    betas: dict[str, Any] = {"beta_schedule": name, "beta_start": table.beta_start, "beta_end": table.beta_end}
    if name not in BETA_SCHEDULES:
        betas = {"trained_betas": replace(table, zero_terminal_snr=False).betas.tolist()}
    config = {
        **_common(),
        "num_train_timesteps": table.num_timesteps,
        **betas,
        "rescale_betas_zero_snr": table.zero_terminal_snr,
        "prediction_type": PREDICTION_TYPES[prediction],
    }
    if learned_variance:
        return {"_class_name": "DDPMScheduler", **config, "variance_type": "learned_range", "clip_sample": False}
    if usual_schedule(make("v", table)) == "karras":  # the levels are the table's, whatever is predicted
        # These levels begin and end where the evenly spaced times do: "linspace" spans the whole table.
        config |= {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    return {"_class_name": "EulerDiscreteScheduler", **config, "interpolation_type": "linear"}


def usual_schedule(process: Parameterization) -> str:
    """The schedule to sample with where none is asked for: Karras' levels, with their steps where pictures are decided.

    Tables that run far into noise (cosine ones, zero terminal SNR) take their own times, evenly: Karras' levels would
    waste many steps on nothing but noise. The exported scheduler says the same.
    """
    return "trailing" if isinstance(process, Eps | V | X0) and process.sigma_max > FAR else "karras"


def _common() -> dict[str, Any]:
    from diffusers import __version__ as diffusers_version

    # steps_offset is not used with this spacing; the pipeline warns of any other value.
    return {"_diffusers_version": diffusers_version, "timestep_spacing": "trailing", "steps_offset": 1}


def _flow_config(schedule: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        **_common(),
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": float(schedule.get("shift", 1.0)),
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
    }


def _sigma_config(prediction: str, schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Of the processes that are a range of sigma. Every number is written out: defaults differ between tools."""
    process = asdict(parameterization(prediction, schedule))  # type: ignore[call-overload]  # they are dataclasses
    if prediction == "edm" and process["augmented_dim"] is None:
        del process["augmented_dim"]
        diffusers_version = _common()["_diffusers_version"]
        return {
            "_class_name": "EDMEulerScheduler",
            "_diffusers_version": diffusers_version,
            **process,
            "prediction_type": "epsilon",  # their word for a positive c_out
            "sigma_schedule": "karras",
            "rho": 7.0,
            "final_sigmas_type": "zero",
        }
    ours = "LatentgenVE" if prediction == "ve" else "LatentgenPFGMPP"
    return {
        "_class_name": ours,
        **process,
        "note": "no scheduler of diffusers knows this process: sample with latentgen",
    }


def read_schedule(config: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """What the U-Net predicts and the noise schedule, from a scheduler's configuration, ours or diffusers'.

    Absent entries mean what they mean to diffusers: eps, 1000 linear betas from 0.0001 to 0.02.

    Args:
        config: the content of scheduler_config.json.
        where: its path, for messages.

    Raises:
        UserError: it describes no process that we know.
    """
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return "flow", {"shift": float(config.get("flow_shift", config.get("shift", 1.0)))}
    if name in OURS or name.startswith("EDM"):
        return _read_sigmas(config, name, where)
    betas = config.get("trained_betas")
    kind = TRAINED if betas is not None else config.get("beta_schedule", "linear")
    if kind not in (*BETA_SCHEDULES, "sigmoid", TRAINED):
        known = ", ".join((*BETA_SCHEDULES, "sigmoid"))
        raise UserError(f'{where}: beta_schedule "{kind}" is not supported; {known} and trained_betas are')
    predicted = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in predicted:
        raise UserError(f'{where}: prediction_type "{prediction_type}" is not one of {", ".join(predicted)}')
    table = NoiseTable(
        kind="cosine" if kind == "squaredcos_cap_v2" else kind,
        num_timesteps=int(config.get("num_train_timesteps", 1000)) if betas is None else len(betas),
        beta_start=float(config.get("beta_start", 0.0001)),
        beta_end=float(config.get("beta_end", 0.02)),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        trained_betas=None if betas is None else tuple(float(beta) for beta in betas),
    )
    return predicted[prediction_type], asdict(table)


def _read_sigmas(config: Mapping[str, Any], name: str, where: str) -> tuple[str, dict[str, Any]]:
    """The processes that are a range of sigma; what is absent has diffusers' default."""
    defaults = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    numbers = {key: float(config.get(key, value)) for key, value in defaults.items()}
    if name == "LatentgenVE":
        return "ve", {key: numbers[key] for key in ("sigma_min", "sigma_max")}
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise UserError(f"{where}: {name} with prediction_type {config['prediction_type']} is not supported")
    dim = config.get("augmented_dim")
    return "edm", {**numbers, "augmented_dim": None if dim is None else float(dim)}


def library_of(scheduler: str) -> str:
    """The library that model_index.json names for a scheduler class."""
    return "latentgen" if scheduler in OURS else "diffusers"


PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Tables that every scheduler of diffusers knows by these names; `sigmoid` only DDPMScheduler does."""
OURS = ("LatentgenVE", "LatentgenPFGMPP")
