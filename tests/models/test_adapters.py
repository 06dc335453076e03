from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from latentgen.core.errors import UserError
from latentgen.models.adapters import (
    GROUPS,
    KINDS,
    AdapterSpec,
    adaptable,
    adapter_factors,
    adapter_parameters,
    adapter_state,
    add_adapters,
    load_adapter_state,
    targets_of,
)
from latentgen.models.deltas import delta
from latentgen.models.unet import checkpoint_activations

EVERYWHERE = ("attention", "feed_forward", "convolution")


def loss_of(networks: dict[str, Any], name: str) -> torch.Tensor:
    network = networks[name]
    if name == "unet":
        x, context = torch.ones(2, 4, 8, 8), torch.ones(2, 10, network.config["cross_attention_dim"])
        dtype, added = network.dtype, tiny.added_to_time(network)
        made = network(x.to(dtype), torch.tensor([7, 400]), context.to(dtype), added_cond_kwargs=added).sample
    else:
        made = network(input_ids=torch.arange(20).reshape(2, 10)).last_hidden_state
    return made.float().square().mean()


def train(networks: dict[str, Any], name: str, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(adapter_parameters(networks[name]).values(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(networks, name).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.BASES)
def test_a_new_adapter_changes_nothing_and_only_it_learns(family: str, kind: Any) -> None:
    networks: Any = tiny.networks(family)
    before = tiny.outputs(networks)
    frozen = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    for name, network in networks.items():
        add_adapters({"unet": network}, AdapterSpec(kind=kind, rank=2, alpha=1, targets=EVERYWHERE))
        trainable = {n for n, p in network.named_parameters() if p.requires_grad}
        assert trainable == set(adapter_parameters(network))
        assert trainable
        assert torch.equal(tiny.outputs(networks)[name], before[name])
        train(networks, name)
        for path, module in adaptable(network).items():
            own = frozen[name].get(f"{path}.weight", frozen[name].get(f"text_model.{path}.weight"))
            assert torch.equal(module.weight, own)
    after = tiny.outputs(networks)
    assert all(not torch.equal(after[name], before[name]) for name in networks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_adapter_is_float32_whatever_the_network_is(kind: Any, dtype: torch.dtype) -> None:
    networks: Any = {"unet": tiny.networks("sd1")["unet"].to(dtype)}
    add_adapters({"unet": networks["unet"]}, AdapterSpec(kind=kind, rank=2, targets=EVERYWHERE))
    assert {p.dtype for p in adapter_parameters(networks["unet"]).values()} == {torch.float32}
    assert {m.weight.dtype for m in adaptable(networks["unet"]).values()} == {dtype}
    loss_of(networks, "unet").backward()
    gradients = [p.grad for p in adapter_parameters(networks["unet"]).values()]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_first_weights(kind: Any) -> None:
    states = []
    for seed in (1, 1, 2):
        network = tiny.networks("sd1")["text_encoder"]
        torch.manual_seed(seed)
        add_adapters({"unet": network}, AdapterSpec(kind=kind, rank=2))
        states.append(adapter_state(network))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_goes_to_another_network_and_copies_are_apart(kind: Any) -> None:
    spec = AdapterSpec(kind=kind, rank=2, targets=EVERYWHERE)
    one: Any = tiny.networks("sd1")
    add_adapters({"unet": one["unet"]}, spec)
    train(one, "unet")
    state = {key: value.clone() for key, value in adapter_state(one["unet"]).items()}
    assert not any("default" in key for key in state)
    other: Any = tiny.networks("sd1")
    add_adapters({"unet": other["unet"]}, spec)
    load_adapter_state(other["unet"], state)
    expected = tiny.outputs({"unet": one["unet"]})["unet"]
    assert torch.equal(tiny.outputs({"unet": other["unet"]})["unet"], expected)

    average = copy.deepcopy(one["unet"])
    assert torch.equal(tiny.outputs({"unet": average})["unet"], expected)
    train(one, "unet")
    assert torch.equal(tiny.outputs({"unet": average})["unet"], expected)
    assert not torch.equal(tiny.outputs({"unet": one["unet"]})["unet"], expected)


def test_a_state_that_is_not_the_adapters_changes_nothing() -> None:
    network = tiny.networks("sd1")["text_encoder"]
    add_adapters({"unet": network}, AdapterSpec(rank=2))
    state = {key: value + 1 for key, value in adapter_state(network).items()}
    before = {key: value.clone() for key, value in adapter_state(network).items()}
    key = next(iter(state))
    for broken in (
        {k: v for k, v in state.items() if k != key},
        {**state, "more": state[key]},
        {**state, key: state[key][:1]},
    ):
        with pytest.raises(UserError, match="adapter state"):
            load_adapter_state(network, broken)
        assert all(torch.equal(value, before[k]) for k, value in adapter_state(network).items())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_activations_give_the_same_gradients(kind: Any) -> None:
    gradients = []
    for checkpointed in (False, True):
        networks: Any = tiny.networks("sd1")
        torch.manual_seed(0)
        add_adapters({"unet": networks["unet"]}, AdapterSpec(kind=kind, rank=2, targets=EVERYWHERE))
        networks["unet"].train()
        if checkpointed:
            checkpoint_activations(networks["unet"], "auto", dtype=torch.float32)
        loss_of(networks, "unet").backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(networks["unet"]).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_groups_take_what_their_names_say() -> None:
    network = {"unet": tiny.networks("sdxl")["unet"]}
    chosen = {group: set(targets_of(network, AdapterSpec(targets=(group,)))["unet"]) for group in GROUPS}
    assert chosen["all"] == set(adaptable(network["unet"]))
    assert {path.split(".")[-1] for path in chosen["attention"]} == {"to_q", "to_k", "to_v", "0"}
    assert {path.split(".")[-1] for path in chosen["feed_forward"]} == {"proj", "2", "proj_in", "proj_out"}
    assert {path.split(".")[-1] for path in chosen["convolution"]} == {"conv1", "conv2", "conv_shortcut", "conv"}
    outside = {path.split(".")[-1] for path in chosen["all"] - set().union(*(chosen[g] for g in EVERYWHERE))}
    assert outside == {"conv_in", "conv_out", "linear_1", "linear_2", "time_emb_proj"}
    text = {"text_encoder_2": tiny.networks("sdxl")["text_encoder_2"]}
    assert len(targets_of(text, AdapterSpec(targets=EVERYWHERE))["text_encoder_2"]) == 3 * 6
    assert "text_projection" in targets_of(text, AdapterSpec(targets=("all",)))["text_encoder_2"]


def test_patterns_give_modules_their_own_rank_and_alpha() -> None:
    network = tiny.networks("sd1")["unet"]
    spec = AdapterSpec(
        rank=3,
        alpha=6,
        targets=("attention", r"^conv_in$"),
        rank_pattern={r"mid_block.*to_q$": 5, "to_q$": 2, "^conv_in": 1},
        alpha_pattern={"to_v$": 1.5},
    )
    add_adapters({"unet": network}, spec)
    factors = adapter_factors(network)
    for path, own in factors.items():
        rank = 1 if path == "conv_in" else (5 if "mid_block" in path else 2) if path.endswith("to_q") else 3
        assert own.rank == rank, path
        assert own.alpha is not None
        assert own.alpha.item() == (1.5 if path.endswith("to_v") else 6), path


def test_without_alpha_the_scale_is_one_and_rslora_divides_by_the_root() -> None:
    for use_rslora, scale in ((False, 1.0), (True, 2.0)):
        network = tiny.networks("sd1")["text_encoder"]
        add_adapters({"unet": network}, AdapterSpec(rank=4, use_rslora=use_rslora))
        assert {own.scale for own in adapter_factors(network).values()} == {scale}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 64])
def test_the_factors_are_what_the_adapter_computes(kind: Any, rank: int) -> None:
    """A rank that is larger than the layers makes LoKr keep whole factors."""
    network: Any = tiny.networks("sd1")["unet"]
    add_adapters({"unet": network}, AdapterSpec(kind=kind, rank=rank, alpha=rank / 2, targets=EVERYWHERE))
    train({"unet": network}, "unet")
    plain: Any = tiny.networks("sd1")["unet"]
    modules = adaptable(plain)
    with torch.no_grad():
        for path, own in adapter_factors(network).items():
            modules[path].weight += delta(own, modules[path].weight)
    one, other = (tiny.outputs({"unet": n})["unet"] for n in (network, plain))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "oft"}, 'kind "oft" is unknown; use lora, dora, lokr, loha'),
        ({"rank": 0}, "rank 0 must be 1 or more"),
        ({"rank_pattern": {"to_q": 0}}, "rank 0 must be"),
        ({"alpha": 0.0}, "alpha 0.0 must be above 0"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
        ({"targets": ()}, "no targets"),
        ({"targets": ("to_(q",)}, "not a regular expression"),
        ({"init": "pissa"}, 'init "pissa" is unknown for lora; use default, gaussian'),
        ({"kind": "loha", "init": "gaussian"}, "unknown for loha"),
        ({"kind": "lokr", "use_rslora": True}, "use_rslora is for lora and dora"),
        ({"factor": 4}, "factor 4 must be 1 or more, and is for lokr only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdapterSpec(**settings)


def test_a_target_that_is_nowhere_names_what_was_meant() -> None:
    network = tiny.networks("sd1")["unet"]
    with pytest.raises(UserError, match=r'target "to_qq" is in no module.*to_q'):
        add_adapters({"unet": network}, AdapterSpec(targets=("attention", "to_qq")))
    with pytest.raises(UserError, match='pattern "fc1" is in none of the targets'):
        add_adapters({"unet": network}, AdapterSpec(rank_pattern={"fc1": 2}))
    with pytest.raises(UserError, match="text_encoder has no modules in convolution"):
        add_adapters({"text_encoder": tiny.networks("sd1")["text_encoder"]}, AdapterSpec(targets=("convolution",)))


def test_a_pattern_need_only_be_in_one_of_the_networks() -> None:
    networks = tiny.networks("sdxl")
    spec = AdapterSpec(rank=3, targets=("attention", "conv_in", "fc1"), rank_pattern={"fc1": 2, "to_q": 1})
    add_adapters(networks, spec)
    ranks = {name: {path: f.rank for path, f in adapter_factors(net).items()} for name, net in networks.items()}
    assert {rank for path, rank in ranks["unet"].items() if path.endswith("to_q")} == {1}
    assert {rank for path, rank in ranks["text_encoder_2"].items() if path.endswith("fc1")} == {2}
    assert "conv_in" in ranks["unet"]


def test_one_adapter_at_a_time() -> None:
    network = tiny.networks("sd1")["text_encoder"]
    with pytest.raises(UserError, match="has no adapter"):
        adapter_state(network)
    add_adapters({"unet": network}, AdapterSpec(rank=2))
    with pytest.raises(UserError, match="has one already"):
        add_adapters({"unet": network}, AdapterSpec(rank=2))


def test_a_grouped_convolution_takes_lora_only() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resnets = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3, groups=2)})])

    with pytest.raises(UserError, match="grouped convolution"):
        add_adapters({"unet": Grouped()}, AdapterSpec(kind="loha", rank=2, targets=("conv1",)))
