"""Adapters on DiffusionGemma's encoder and decoder, which share their weights."""

import copy
import io
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import DynamicCache

import nara_command
from nara_diffusion import NaraConfig, noise_level, to_lora
from nara_diffusion.dllm.canvas_loss import canvas_loss, corrupt_canvases
from nara_diffusion.dllm.models.model_classes import CACHE
from nara_diffusion.tuner.holder import holder_of
from tests.helpers.adapted import relative_error
from tests.helpers.rounding import assert_far, assert_near
from tests.helpers.tiny_gemma import CANVAS, VOCABULARY, tiny_gemma

BOTH = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|o_proj|down_proj)"
DECODER = r".*decoder\.layers\..*(q_proj|o_proj|down_proj)"


def adapted(targets: str = BOTH, disturbed: bool = True, **fields):
    torch.manual_seed(5)
    config = NaraConfig(r=3, lora_alpha=7, target_modules=targets, core_scale=1.0, **fields)
    model = get_peft_model(tiny_gemma(), config).eval()
    if disturbed:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and "freq" not in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs() -> dict:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (3, 8), generator=generator)
    canvas = torch.randint(0, VOCABULARY, (3, CANVAS), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": canvas}


def batch_of(**options):
    ids = torch.randint(0, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    key = {"seed": 3, "sample_indices": range(3), "canvas_length": CANVAS, "vocab_size": VOCABULARY}
    return corrupt_canvases(ids, [4, 9, 5], **key, **options)


def test_encoder_runs_at_zero_and_decoder_at_canvas():
    model = adapted()
    base, batch, levels = model.get_base_model(), inputs(), torch.tensor([0.9, 0.2, 0.6])
    with torch.no_grad():
        with noise_level(model, levels):
            logits = model(**batch).logits
        holder = holder_of(base)
        for row in range(3):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            expected = _with_matrices(base, holder, one, float(levels[row]))
            assert_near(logits[row : row + 1], expected, base)
        with noise_level(model, levels.flip(0)):
            assert_far(model(**batch).logits[[0, 2]], logits[[0, 2]])


def _with_matrices(base, holder, given, level):
    """Logits with W0 + s B C A as weights: C(0) in the encoder, C(λ) in the decoder."""
    plain = tiny_gemma()
    plain.model.encoder = copy.deepcopy(plain.model.encoder)  # no longer tied
    for name, layer in zip(_names(base), holder.layers["default"], strict=True):
        group = layer.lora_variant["default"].key[1]
        present = torch.tensor([0.0 if ".encoder." in name else level])
        C = holder.cores_of("default").matrix(group, present)[0]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = layer.get_base_layer().weight + 7 / 3 * B @ C @ A
        plain.get_submodule(name).weight = torch.nn.Parameter(weight)
    return plain(**given).logits


def test_lambda_of_parts_is_canvas_or_zero():
    model = adapted()
    base, levels = model.get_base_model(), torch.tensor([[0.9, 0.2, 0.6], [0.1, 0.7, 0.4], [0.3, 0.8, 0.5]])
    plain = tiny_gemma()
    plain.model.encoder = copy.deepcopy(plain.model.encoder)
    for name, layer in zip(_names(base), holder_of(base).layers["default"], strict=True):
        plain.get_submodule(name).register_forward_hook(_update_of_parts(base, layer, levels, ".encoder." in name))
    with torch.no_grad(), noise_level(model, levels):
        assert_near(model(**inputs()).logits, plain(**inputs()).logits, base, 3)
    with pytest.raises(ValueError, match="3 samples of 6 positions"), noise_level(model, levels[:, :1].expand(-1, 4)):
        model(**inputs())


def _update_of_parts(base, layer, levels, is_encoder):
    """A hook that adds s B C A x to a layer's output: C(0), or C(λ) of each third of the canvas."""
    cores, group = holder_of(base).cores_of("default"), layer.lora_variant["default"].key[1]
    C, zero = cores.matrix(group, levels.flatten()), cores.matrix(group, torch.zeros(1))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def hook(module, args, output):
        inner = args[0] @ A.T
        cores = zero.expand(*inner.shape[:2], -1, -1)
        if not is_encoder:
            cores = C.unflatten(0, levels.shape).repeat_interleave(CANVAS // levels.shape[1], 1)  # (b, c, r, r)
        return output + 7 / 3 * torch.einsum("blij,blj->bli", cores, inner) @ B.T

    return hook


def _names(base):
    return [name for name, module in base.named_modules() if hasattr(module, "lora_variant")]


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"core_type": "knots", "core_sharing": "layer"}])
def test_twins_share_one_adapter_saved_once(fields, tmp_path):
    model = adapted(**fields)
    base = model.get_base_model()
    for index in range(2):
        one = base.model.encoder.language_model.layers[index].self_attn.q_proj
        other = base.model.decoder.layers[index].self_attn.q_proj
        assert one.lora_A["default"] is other.lora_A["default"]
        assert one.lora_B["default"] is other.lora_B["default"]
    saved = get_peft_model_state_dict(model)
    assert not [key for key in saved if "encoder" in key]
    factors = 6 * (3 if fields.get("use_dora") else 2)
    assert sum(".decoder." in key for key in saved) == factors
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        torch.manual_seed(99)
        other = PeftModel.from_pretrained(tiny_gemma(), tmp_path, low_cpu_mem_usage=low_memory).eval()
        with torch.no_grad(), noise_level(model, [0.9, 0.2, 0.6]), noise_level(other, [0.9, 0.2, 0.6]):
            assert_near(other(**inputs()).logits, model(**inputs()).logits, model)


def test_file_without_a_decoder_layer_does_not_load(tmp_path):
    from safetensors.torch import load_file, save_file

    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in tensors if "layers.1.self_attn.q_proj.lora_A" in key)]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj"):
        PeftModel.from_pretrained(tiny_gemma(), tmp_path)


def test_decoder_only_leaves_encoder_and_allows_tying():
    model = adapted(DECODER)
    base, plain = model.get_base_model(), tiny_gemma()
    ids = inputs()["input_ids"]
    assert torch.equal(
        base.model.encoder(input_ids=ids).last_hidden_state, plain.model.encoder(input_ids=ids).last_hidden_state
    )
    base.tie_weights()
    q_proj = base.model.decoder.layers[0].self_attn.q_proj
    assert base.model.encoder.language_model.layers[0].self_attn.q_proj.weight is q_proj.base_layer.weight
    assert_far(q_proj.lora_A["default"].weight, base.model.decoder.layers[1].self_attn.q_proj.lora_A["default"].weight)


def test_tying_again_keeps_separate_adapters_apart():
    model = adapted(DECODER)
    base = model.get_base_model()
    model.add_adapter("plain", NaraConfig(r=3, target_modules=BOTH, core_type="identity"))
    original = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    base.tie_weights()
    for name, value in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(value, original[name]), name
    model.unload()
    assert "_tied_weights_keys" not in vars(base.model)


def test_adapter_gradient_is_loss_slope_in_both_twins():
    model, batch = adapted(), batch_of(self_conditioning=0.0)
    A = model.get_base_model().model.decoder.layers[0].self_attn.q_proj.lora_A["default"].weight
    canvas_loss(model, batch).loss.backward()
    direction = A.grad / A.grad.norm()
    losses = []
    with torch.no_grad():
        for step in (0.001, -0.002):
            A.add_(step * direction)
            losses.append(canvas_loss(model, batch).loss.item())
    assert (losses[0] - losses[1]) / 0.002 == pytest.approx(A.grad.norm().item(), rel=0.02)
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert len(set(trainable)) == len(trainable)


def test_step_under_autocast_matches_float32_except_rounding(monkeypatch):
    monkeypatch.setattr(f"{__name__}.tiny_gemma", partial(tiny_gemma, num_experts=2))  # rounding changes no routes
    losses, grads = [], []
    for is_low in (False, True):
        model = adapted(core_type="knots").train()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_low):
            losses.append(canvas_loss(model, batch_of()))
        losses[-1].loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[1].token_loss.dtype == losses[1].encoder_loss.dtype == torch.float32
    assert relative_error(losses[1].token_loss, losses[0].token_loss) < 0.05
    assert relative_error(losses[1].encoder_loss, losses[0].encoder_loss) < 0.05
    for name, grad in grads[0].items():
        assert torch.cosine_similarity(grads[1][name].flatten(), grad.flatten(), 0) > 0.98, name


def recompute(model, **options):
    """Call what transformers named `gradient_checkpointing_enable` before 5.24."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(options)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # transformers < 5.24
def test_checkpointing_needs_non_reentrant_form_for_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            recompute(model.get_base_model(), use_reentrant=False)
        canvas_loss(model, batch_of()).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_near(grads[1][name], grad, model, 3)
    recompute(model.get_base_model(), use_reentrant=True)
    with pytest.raises(ValueError, match="reentrant"):
        canvas_loss(model, batch_of())


def test_merging_and_exporting_raise():
    model = adapted()
    with pytest.raises(ValueError, match="share each weight"):
        model.merge_adapter(noise_level=0.5)
    with pytest.raises(ValueError, match="share each weight"), noise_level(model, 0.5):
        model.get_base_model().model.decoder.layers[0].self_attn.q_proj.merge()
    with pytest.raises(ValueError, match="share each weight"):
        to_lora(model, noise_level=0.5)


@pytest.mark.parametrize("core_type", ["hypernetwork", "identity"])
def test_a_file_is_not_folded(tmp_path, core_type):
    adapted(DECODER, core_type=core_type).save_pretrained(tmp_path / "nara")
    with pytest.raises(SystemExit, match="A LoRA at one λ is right for neither"):
        nara_command.main(["fold", f"{tmp_path}/nara", f"{tmp_path}/lora", "--noise_level", "0.5", "--form", "peft"])
    assert not (tmp_path / "lora").exists()


def test_static_adapter_is_exported_for_each_twin(tmp_path):
    model = adapted(core_type="identity", use_dora=True)
    to_lora(model).save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_gemma(), tmp_path).eval()
    with torch.no_grad():
        assert_near(plain(**inputs()).logits, model(**inputs()).logits, model)
        assert_far(plain(**inputs()).logits, tiny_gemma()(**inputs()).logits)


def test_routers_and_encoders_without_their_twins_raise():
    with pytest.raises(ValueError, match="router"):
        adapted(r".*decoder.*router\.proj")
    with pytest.raises(ValueError, match="only the decoder"):
        adapted(r".*encoder.language_model.*layers.*q_proj")


@pytest.mark.parametrize("twin", ["encoder", "decoder"])
def test_twins_of_different_rank_raise(twin):
    with pytest.raises(ValueError, match=r"rank_pattern gives '.*q_proj' rank \d but '.*q_proj'.*rank \d"):
        adapted(rank_pattern={rf".*{twin}.*q_proj": 5})


def test_without_lambda_decoder_raises_and_encoder_runs():
    model = adapted().get_base_model()
    cache = DynamicCache()
    model.model.encoder(input_ids=inputs()["input_ids"], **{CACHE: cache})
    with pytest.raises(ValueError, match="λ can't be read: no sampler is running"):
        model.forward(decoder_input_ids=inputs()["decoder_input_ids"], **{CACHE: cache})


def through_pickle(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle])
def test_model_copy_has_its_own_hooks(copy_of):
    model = adapted()
    copied = copy_of(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
        with noise_level(copied, 0.4):
            other = copied(**inputs()).logits
        with noise_level(model, 0.4):
            assert_far(model(**inputs()).logits, other)
        holder_of(model.get_base_model()).detach()
        with noise_level(copied, 0.4):
            assert torch.equal(copied(**inputs()).logits, other)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_decoder_mask_takes_cache_under_both_names(name):
    """Before 5.24, transformers itself names the cache `past_key_values`."""
    plain, calls = tiny_gemma(), []

    def with_cache(config, inputs_embeds, cache):
        calls.append(cache)

    def with_past_key_values(config, inputs_embeds, past_key_values):
        calls.append(past_key_values)

    make_mask = with_cache if name == "cache" else with_past_key_values
    plain.model.decoder.create_diffusion_decoder_attention_mask = make_mask
    model = get_peft_model(plain, NaraConfig(r=3, target_modules=DECODER))
    make_mask = model.get_base_model().model.decoder.create_diffusion_decoder_attention_mask
    for key in {name, "past_key_values"}:
        make_mask(config=None, inputs_embeds=None, **{key: key})
    assert set(calls) == {name, "past_key_values"}
