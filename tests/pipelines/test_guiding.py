"""Guidance as a request asks for it: what the U-Net is given, what it costs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.core.errors import UserError
from latentgen.diffusion.guidance import GUIDANCE
from latentgen.diffusion.guidance.stack import EULER_ONLY
from latentgen.formats.model import Model
from latentgen.formats.model_folder import save_model
from latentgen.models.text import encode_text
from latentgen.models.unet import counted_rows
from latentgen.pipelines.generate import Request, check, generate, parameters_line
from latentgen.pipelines.guiding import split_prompt

STEPS = 4


def ask(prompt: str = "a red circle", *guidance: str, **changes: Any) -> Request:
    settings = {"num_inference_steps": STEPS, "height": 16, "width": 16, "sampler": "euler", **changes}
    return Request(prompt, guidance=guidance, **settings)


def cost(model: Model, request: Request) -> int:
    with counted_rows() as rows:
        list(generate(model, [request]))
    return rows.count


def apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.fixture
def weak(tiny_builder: Callable[..., Model], tmp_path: Path) -> str:
    """The folder of another U-Net with the same autoencoder."""
    first, second = tiny_builder(), tiny_builder(seed=5)
    second.vae.load_state_dict(first.vae.state_dict())
    save_model(second, tmp_path / "weak")
    return f"autoguidance,model={tmp_path / 'weak'}"


def test_every_guidance_draws(tiny: Model, weak: str) -> None:
    for name in GUIDANCE:
        sampler = "euler" if name in EULER_ONLY else "dpmpp_2m"
        request = ask("a red circle", weak if name == "autoguidance" else name, guidance_scale=0.7, sampler=sampler)
        assert np.asarray(next(generate(tiny, [request]))).std() > 0, name


def test_what_guidance_costs(tiny: Model, weak: str) -> None:
    # four steps of this model are at the levels 14.6, 3.2, 0.45 and 0.03
    assert cost(tiny, ask()) == 2 * STEPS
    assert cost(tiny, ask("x", guidance_scale=1.0)) == STEPS
    assert cost(tiny, ask("x", "interval,low=0.1,high=5")) == STEPS + 2
    assert cost(tiny, ask("x", "interval,low=0,high=99")) == 2 * STEPS
    assert cost(tiny, ask("x", "adaptive,threshold=-1")) == STEPS + 1, "everything agrees at once"
    assert cost(tiny, ask("x", "adaptive,threshold=1")) == 2 * STEPS
    assert cost(tiny, ask("x", "pag")) == 3 * STEPS
    assert cost(tiny, ask("x", "zero_init")) == 2 * (STEPS - 1)
    assert cost(tiny, ask("x AND y AND z", "compose")) == 4 * STEPS
    assert cost(tiny, ask("x AND y AND z")) == 2 * STEPS, "AND is a word like others"
    assert cost(tiny, ask("x", weak)) == 2 * STEPS, "the second network counts too"
    assert cost(tiny, ask("x", weak, "interval,low=0.1,high=5")) == STEPS + 2


def test_pictures_do_not_depend_on_their_batch(tiny: Model, weak: str) -> None:
    for guidance in (("adaptive,threshold=0.9", "apg"), ("interval", "pag"), ("compose",), (weak,)):
        prompts = ["a red circle AND a star:0.5", "a blue star AND x:0.5", "x AND y:0.5"]
        requests = [ask(text, *guidance, seed=n) for n, text in enumerate(prompts)]
        together = list(generate(tiny, requests, batch_size=3))
        alone = list(generate(tiny, requests, batch_size=1))
        assert max(apart(a, b) for a, b in zip(together, alone, strict=True)) <= 1, guidance


def test_autoguidance_asks_the_weak_network_with_the_same_prompt(tiny: Model, weak: str) -> None:
    plain = next(generate(tiny, [ask()]))
    guided = next(generate(tiny, [ask("a red circle", weak)]))
    assert apart(plain, guided) > 1
    with pytest.raises(UserError, match="takes its place"):
        next(generate(tiny, [ask("a red circle", weak, negative_prompt="a blue star")]))


def test_a_network_does_not_guide_away_from_itself(tiny: Model, tmp_path: Path) -> None:
    save_model(tiny, tmp_path / "same")
    own = next(generate(tiny, [ask("a red circle", f"autoguidance,model={tmp_path / 'same'}", guidance_scale=9.0)]))
    assert apart(own, next(generate(tiny, [ask(guidance_scale=1.0)]))) <= 1


def test_composed_prompts_and_their_weights() -> None:
    compose = ("compose",)
    assert split_prompt("a AND b", ()) == (("a AND b",), (1.0,))
    assert split_prompt("a", compose) == (("a",), (1.0,))
    assert split_prompt("a red circle AND a star:0.5 AND x:-1", compose) == (
        ("a red circle", "a star", "x"),
        (1, 0.5, -1),
    )
    assert split_prompt("at 3:x AND b", compose) == (("at 3:x", "b"), (1.0, 1.0))
    with pytest.raises(UserError, match="empty prompt"):
        split_prompt("a AND :2", compose)


def test_composition_reaches_the_network(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = []
    forward = tiny.unet.forward

    def spy(sample: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor, **rest: Any) -> Any:
        contexts.append(encoder_hidden_states)
        return forward(sample, time, encoder_hidden_states=encoder_hidden_states, **rest)

    monkeypatch.setattr(tiny.unet, "forward", spy)
    requests = [ask("a AND b", "compose", negative_prompt="n"), ask("c AND d", "compose"), ask("e AND f:2", "compose")]
    list(generate(tiny, requests))
    assert [len(context) for context in contexts] == [6] * STEPS + [3] * STEPS, "other weights are another batch"
    with torch.no_grad():
        expected = encode_text(tiny.towers, ["a", "c", "b", "d", "n", ""]).states
    torch.testing.assert_close(contexts[0], expected)


@pytest.mark.parametrize(
    ("guidance", "changes", "message"),
    [
        (("nonsense",), {}, "unknown --guidance 'nonsense'"),
        (("interval,low=3,high=1",), {}, "interval: low=3 high=1"),
        (("cfgpp",), {}, "--guidance-scale 4: CFG\\+\\+ takes 0 to 1"),
        (("cfgpp",), {"sampler": "dpmpp_2m", "guidance_scale": 0.5}, "cfgpp with --sampler dpmpp_2m"),
        (("pag,layers=head",), {}, "layers=head: no self-attention there"),
        (("autoguidance",), {}, "autoguidance,model=FOLDER"),
        (("autoguidance,model=/nowhere",), {}, "no model folder at /nowhere"),
        (("compose", "adaptive"), {}, "do not go together"),
        (("zero_init,steps=9",), {}, "zero_init: steps=9"),
    ],
)
def test_check_refuses(guidance: tuple[str, ...], changes: dict, message: str, tiny: Model) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check(ask("x", *guidance, **changes), tiny)
    assert "\n" not in str(caught.value)


def test_a_weak_network_with_other_latents_is_refused(
    tiny: Model, tiny_builder: Callable[..., Model], tmp_path: Path
) -> None:
    save_model(tiny_builder(seed=9), tmp_path / "other")
    with counted_rows() as rows, pytest.raises(UserError, match="its autoencoder is another"):
        list(generate(tiny, [ask(), ask("x", f"autoguidance,model={tmp_path / 'other'}")]))
    assert rows.count == 0, "nothing is drawn before all requests are checked"


def test_guidance_is_written_down() -> None:
    line = parameters_line(ask("x", "interval,low=1,high=5", "rescale"), "run", "0" * 10)
    assert 'Size: 16x16, Guidance: "interval,low=1,high=5; rescale", Model hash' in line
    assert hash(ask("x", "rescale")) != hash(ask("x"))
