"""Merging at a λ, and `to_lora` at a λ, give what the forward gives at that λ; layers of 8 and 4 bits do so too.

Those of bitsandbytes follow the formula on the dequantised weight. On a CPU the packed 4-bit weight dequantises wrongly
once it has run, so that W0 is read before, and the base output comes from a stock twin.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nara_diffusion import noise_level, set_noise_source, to_lora
from tests.acceptance._by_hand import CORES, LEVELS, SMALL, ByHand, Kinds, assert_near, core_by_hand, leaves, tensors_of
from tests.acceptance._lives import add_nara, frozen_sd, predict
from tests.helpers.adapted import OneLayer, adapted, disturb, nara_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
    pytest.mark.filterwarnings("ignore:Merge lora module to . ?-bit linear"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
]
LEVEL = 0.35
CASES = [
    ("hypernetwork", "layer", False),
    ("hypernetwork", "global", True),
    ("constant", "global", False),
    ("identity", "layer", True),
    ("knots", "module_type", True),
    ("bins", "layer", True),
    ("custom", "module_type", False),
]


def make(core: str, sharing: str, use_dora: bool, dtype: torch.dtype = torch.float32) -> tuple[Kinds, PeftModel]:
    """The model before it was adapted, and the adapted one."""
    kinds = [kind for kind in SMALL[use_dora] if kind != "grouped"]  # which PEFT doesn't merge
    base = Kinds(kinds).to(dtype)
    options = {"target_modules": kinds, "core_sharing": sharing, "use_dora": use_dora, **CORES[core]}
    if core == "knots":
        options |= {"use_rslora": True, "rank_pattern": {"one.linear": 2}, "alpha_pattern": {"two.conv2d": 3}}
    return copy.deepcopy(base), adapted(base, **options)


def run(model: nn.Module, inputs: dict[str, Tensor], level: float | None = None) -> dict[str, Tensor]:
    with torch.no_grad(), nullcontext() if level is None else noise_level(model, level):
        return model(inputs)


def assert_all_near(actual: dict[str, Tensor], expected: dict[str, Tensor], **options: Any) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_near(actual[name], tensor, name, **options)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


@pytest.mark.parametrize(("core", "sharing", "use_dora"), CASES, ids=str)
def test_merging_and_to_lora_match_the_forward(tmp_path, core, sharing, use_dora):
    clean, model = make(core, sharing, use_dora)
    inputs, original = clean.inputs(), base_weights(model)
    expected, other = run(model, inputs, LEVEL), run(model, inputs, 0.8)
    to_lora(model, LEVEL).save_pretrained(tmp_path)
    assert_all_near(run(PeftModel.from_pretrained(clean, tmp_path).eval(), inputs), expected)
    model.merge_adapter(noise_level=LEVEL)
    assert_all_near(run(model, inputs), expected)
    model.unmerge_adapter()
    assert_all_near(base_weights(model), original)
    assert_all_near(run(model, inputs, 0.8), other)
    if core not in ("constant", "identity"):
        assert all((other[name] - expected[name]).abs().max() > 1e-3 for name in other)


@pytest.mark.parametrize(
    ("use_dora", "safe_merge", "dtype"),
    [(True, False, torch.float32), (True, True, torch.float32), (False, False, torch.bfloat16)],
    ids=str,
)
def test_merging_in_context_and_unloading_gives_formula_weights(use_dora, safe_merge, dtype):
    """In half precision they are rounded once."""
    clean, model = make("hypernetwork", "global", use_dora, dtype)
    by_hand, config, tensors = ByHand(clean), model.peft_config["default"], leaves(tensors_of(model))
    with noise_level(model, LEVEL):
        merged = model.merge_and_unload(safe_merge=safe_merge)
    assert merged.state_dict().keys() == clean.state_dict().keys()
    for name in by_hand.layers:
        expected = by_hand.weights(name, config, tensors, torch.tensor([LEVEL]))[0]
        layer, rounded = merged.get_submodule(name), torch.finfo(dtype).eps / 2 * expected.abs()
        assert type(layer) is type(clean.get_submodule(name))
        assert layer.weight.dtype == dtype
        assert ((layer.weight - expected).abs() - rounded).max() <= 2e-5 * expected.abs().max(), name


def test_merging_without_one_level_is_refused_unless_disabled():
    clean, model = make("hypernetwork", "global", False)
    inputs, original = clean.inputs(), base_weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"only be merged at one λ.*noise_level"):
            merge()
    for attempt in (model.merge_adapter, lambda noise_level: to_lora(model, noise_level)):
        with pytest.raises(ValueError, match=r"noise_level is \[0\.25, 0\.75\]: pass a single value"):
            attempt(noise_level=[0.25, 0.75])
    assert all(torch.equal(weight, original[name]) for name, weight in base_weights(model).items())
    model.merge_adapter(noise_level=LEVEL)
    for part in (model, model.base_model.model.one["linear"]):
        x = inputs if part is model else inputs["linear"]
        with noise_level(model, 0.36), pytest.raises(ValueError, match=r"merged at noise_level 0\.35"):
            part(x)
    with model.disable_adapter():
        assert_all_near(run(model, inputs, 0.9), run(clean, inputs))


def test_source_with_another_level_than_merge_warns_once():
    base, level = Kinds(["linear"]), [None]
    model, inputs = adapted(base, target_modules=["linear"]), base.inputs()
    expected = run(model, inputs, LEVEL)
    set_noise_source(model, lambda *_: level[0])
    for _ in range(2):
        with noise_level(model, LEVEL):
            model.merge_adapter()
        for level[0] in (None, [LEVEL] * 3):  # a source that can't tell stops no merged model
            assert_all_near(run(model, inputs), expected)  # without a warning, which would be an error
        level[0] = [0.3, 0.7, 0.3]
        with pytest.warns(UserWarning, match=r"merged at noise_level 0\.35.* source gives \[0\.3, 0\.7.*unmerge_ad"):
            assert_all_near(run(model, inputs), expected)
        run(model, inputs)  # said once
        model.unmerge_adapter()


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_fusing_has_said_so_and_says_no_more(caplog):
    pipe = add_nara(frozen_sd())
    with noise_level(pipe.unet, 0.3):
        pipe.fuse_lora(components=["unet"])
    assert "is fused at noise_level 0.3: until unfuse_lora() every step" in caplog.text
    predict(pipe)
    with noise_level(pipe.unet, 0.4), pytest.raises(ValueError, match=r"merged at noise_level 0\.3.*asks for \[0\.4"):
        predict(pipe)


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
def test_merging_one_adapter_leaves_the_other_mergeable(use_dora):
    clean, model = make("hypernetwork", "layer", use_dora)
    targets, inputs = model.peft_config["default"].target_modules, clean.inputs()
    model.add_adapter("knots", nara_config(target_modules=targets, r=2, use_dora=use_dora, **CORES["knots"]))
    disturb(model, "knots", seed=5)
    model.base_model.set_adapter(["default", "knots"])
    expected = run(model, inputs, LEVEL)
    for name in ("default", "knots") if use_dora else ("knots", "default"):  # gains multiply what comes before
        model.merge_adapter(adapter_names=[name], noise_level=LEVEL)
        with pytest.raises(ValueError, match=r"merged at noise_level 0\.35, not 0\.6: call unmerge_adapter"):
            model.merge_adapter(noise_level=0.6)
    assert_all_near(run(model, inputs), expected)
    model.unmerge_adapter()
    model.set_adapter("knots")
    expected = run(model, inputs, LEVEL)
    model.base_model.set_adapter(["default", "knots"])
    assert_all_near(run(model.merge_and_unload(adapter_names=["knots"], noise_level=LEVEL), inputs), expected)


def test_static_adapter_merged_after_another_runs_anywhere():
    base = Kinds(["linear", "conv2d"])
    model, inputs = adapted(base, target_modules=["two.conv2d"]), base.inputs()
    model.add_adapter("constant", nara_config(target_modules=["one.linear"], **CORES["constant"]))
    disturb(model, "constant", seed=5)
    model.base_model.set_adapter(["default", "constant"])
    expected = run(model, inputs, 0.8)
    model.merge_adapter(adapter_names=["default"], noise_level=LEVEL)
    model.merge_adapter(adapter_names=["constant"])
    model.get_submodule("base_model.model.two.conv2d").unmerge()
    assert_all_near(run(model, inputs, 0.8), expected)


@pytest.mark.parametrize(
    ("why", "merge", "options", "message"),
    [
        ("grouped", "merge_adapter", {}, "groups > 1"),
        ("conv1d", "merge_adapter", {"safe_merge": True}, "NaNs detected"),
        ("bare", "merge_and_unload", {}, "which is quantised or has no bias"),
    ],
    ids=["a layer of PEFT's", "not a number", "a bias of B without a place to go"],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_a_merge_that_one_layer_refuses_touches_none(why, merge, options, message):
    base = Kinds(["linear", why])
    model, inputs = adapted(base, target_modules=["linear", why], lora_bias=why == "bare"), base.inputs()
    expected, original = run(model, inputs, LEVEL), base_weights(model)
    weight = model.base_model.model.two[why].lora_B["default"].weight
    copy_of_weight = weight.detach().clone()
    if "NaN" in message:
        weight.data[0, 0] = torch.nan
    with pytest.raises((ValueError, NotImplementedError), match=message):
        getattr(model, merge)(noise_level=LEVEL, **options)
    assert_all_near(base_weights(model), original)
    with pytest.raises(ValueError, match="λ is not known"):  # nothing counts as merged
        model(inputs)
    weight.data.copy_(copy_of_weight)
    assert_all_near(run(model, inputs, LEVEL), expected)


# ---------------------------------------------------------------- quantised layers


bnb = pytest.importorskip("bitsandbytes")


def quantized(bits: int) -> OneLayer:
    """One layer (…, 128) → (…, 64), quantised and marked as Transformers marks a model."""
    torch.manual_seed(3)
    if bits == 4:
        model = OneLayer(bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32))
    else:
        model = OneLayer(bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    return model.to("cpu")  # which quantises


def dequantised(layer: Any) -> Tensor:
    """W0 (d_out, d_in) in float64 of a layer that has not run."""
    weight = layer.weight
    if type(weight).__name__ == "Int8Params":
        return weight.CB.double() * weight.SCB.double()[:, None] / 127
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()


def update_and_scale(model: PeftModel, W0: Tensor, tensors: dict[str, Tensor], levels: Tensor) -> tuple[Tensor, Any]:
    """s B C(λ) A (b, d_out, d_in), and m / ‖W0 + s B C A‖ (b, 1, d_out), or 1 without DoRA."""
    config = model.peft_config["default"]
    core_tensors = {n.removeprefix("nara_core.shared."): t for n, t in tensors.items() if "nara_core" in n}
    A, B, C = tensors["layer.lora_A.weight"], tensors["layer.lora_B.weight"], core_by_hand(config, core_tensors, levels)
    update = config.lora_alpha / config.r * torch.einsum("or,brq,qk->bok", B, C, A)
    if not config.use_dora:
        return update, 1.0
    return update, (tensors["layer.lora_magnitude_vector"] / (W0 + update).detach().norm(dim=2))[:, None]


@pytest.mark.parametrize(
    ("bits", "use_dora", "core"),
    [(4, False, "hypernetwork"), (4, True, "bins"), (8, False, "constant"), (8, True, "knots")],
)
def test_quantised_layer_follows_the_formula_forward_and_backward(bits, use_dora, core):
    twin, base = quantized(bits).eval(), quantized(bits)
    W0, x = dequantised(base.layer), torch.randn(3, 5, 128)
    model = adapted(base, target_modules=["layer"], use_dora=use_dora, **CORES[core])
    assert type(model.base_model.model.layer.get_base_layer()) is type(twin.layer)
    tensors, bias = leaves(tensors_of(model)), twin.layer.bias.detach().double()
    update, scale = update_and_scale(model, W0, tensors, LEVELS)
    base_output = twin(x).detach().double() - bias  # 8-bit layers round their input too
    expected = scale * (base_output + torch.einsum("bok,blk->blo", update, x.double())) + bias
    weighting = torch.randn(expected.shape)
    with noise_level(model, LEVELS):
        model(x)
        output = model(x)
    (output * weighting).sum().backward()
    (expected * weighting).sum().backward()
    # of a weight that has run, bitsandbytes gives the norm in bfloat16
    bound = {"terms": 1, "sums": 1, "dtype": torch.bfloat16} if use_dora and bits == 4 else {"sums": 20}
    assert_near(output, expected, "output", **bound)
    gradients = tensors_of(model, gradients=True)
    assert gradients.keys() == {n for n, t in tensors.items() if t.grad is not None and "freq" not in n}
    for name, gradient in gradients.items():
        assert_near(gradient, tensors[name].grad, f"gradient of {name}", **bound)


@pytest.mark.parametrize("bits", [4, 8])
def test_merging_a_quantised_layer_quantises_the_merged_weight(bits):
    base = quantized(bits)
    W0 = dequantised(base.layer)
    model = adapted(base, target_modules=["layer"])
    update = update_and_scale(model, W0, leaves(tensors_of(model)), torch.tensor([0.35]))[0].detach()
    model.merge_adapter(noise_level=0.35)
    merged = dequantised(model.base_model.model.layer.get_base_layer())
    error = float((merged - (W0 + update[0])).abs().max() / (W0 + update[0]).abs().max())
    assert error < (0.2 if bits == 4 else 0.01)  # steps of 16 and of 255 values
    assert float(update.abs().max()) > float(W0.abs().max())
