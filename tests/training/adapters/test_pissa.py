"""PiSSA as a LoRA of twice the rank: PEFT's own conversion gives the same, and the base model's is the sum."""

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from nara_diffusion.training.adapters.build import base_model, build_adapter
from nara_diffusion.training.adapters.pissa import as_lora, changes_base
from nara_diffusion.training.formats import write_adapter


@pytest.fixture(params=[{}, {"use_rslora": True}, {"use_dora": True}], ids=lambda options: next(iter(options), "plain"))
def trained(request, tiny_llama, small_args):
    """(the untouched model's weights, the adapted model), after some training; layers differ in rank."""
    start = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    ranks = [] if "use_rslora" in request.param else ["rank_pattern={up_proj: 2}"]  # PEFT warns of both together
    options = {"core_hidden_dims": [256, 512], "adapter_options": ranks, "target_modules": ["q_proj", "up_proj"]}
    return start, build_adapter(tiny_llama, small_args(adapter="pissa", lora_dropout=0.0, **options, **request.param))


def train(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def fresh(model: PeftModel, start: dict[str, torch.Tensor]) -> torch.nn.Module:
    base = type(model.get_base_model())(model.get_base_model().config)
    base.load_state_dict(start)
    return base


def test_what_is_written_gives_the_trained_model_on_the_base_that_everybody_has(trained, tmp_path) -> None:
    start, model = trained
    ids = torch.randint(1, 49, (2, 7))
    before = fresh(model, start).eval()(ids).logits
    torch.testing.assert_close(model.eval()(ids).logits, before, rtol=1e-3, atol=1e-4)  # it starts as the base
    train(model)
    expected = model(ids).logits
    assert (expected - before).abs().max() > 0.05
    write_adapter(model, tmp_path / "adapter", model.state_dict())
    loaded = PeftModel.from_pretrained(fresh(model, start), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-3, atol=1e-4)
    config = loaded.peft_config["default"]
    assert (config.r, config.init_lora_weights) == (6, True)
    assert config.rank_pattern in ({}, {"up_proj": 4})


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_it_is_peft_s_own_conversion(tiny_llama, small_args, tmp_path) -> None:
    args = small_args(adapter="pissa", core_hidden_dims=[256, 512])
    model = build_adapter(tiny_llama, args)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, for the copy that it subtracts
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model)
    tensors = get_peft_model_state_dict(model)
    config, wider = as_lora(model, model.peft_config["default"], tensors)
    model.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    expected = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert wider.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(wider[name], value, rtol=0, atol=0)
    assert config.lora_alpha / config.r == pytest.approx(5 / 3)


def test_the_base_is_loaded_anew_where_training_has_changed_it(trained, tiny_llama, small_args) -> None:
    start, model = trained
    assert changes_base(model)
    with base_model(model, lambda: fresh(model, start)) as base:
        assert base.state_dict().keys() == start.keys()
        assert all(value.equal(start[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize(("adapter", "changed"), [("lora", False), ("nara", False), ("hira", False), ("full", True)])
def test_which_methods_change_the_base(tiny_llama, small_args, adapter: str, changed: bool) -> None:
    core = {} if adapter == "nara" else {"core_hidden_dims": [256, 512]}
    model = build_adapter(tiny_llama, small_args(adapter=adapter, lora_alpha=None, **core))
    assert changes_base(model) is changed
    if not changed:
        with base_model(model, lambda: pytest.fail("nothing has to be loaded")) as base:
            assert base is model
