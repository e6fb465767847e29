"""λ of each model call of DiffusionGemma's samplers, against loops of the test's own that set it by hand."""

import copy
import inspect

import pytest
import torch
from diffusers import (
    BlockRefinementScheduler,
    DiffusionGemmaPipeline,
    DiscreteDDIMScheduler,
    EntropyBoundScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from peft import get_peft_model
from torch.nn.functional import one_hot
from transformers import DynamicCache, StaticCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm.models.model_classes import CACHE
from nara_diffusion.tuner.holder import CoreHolder, holder_of
from tests.helpers.tiny_gemma import CANVAS, VOCABULARY, tiny_gemma

TARGETS = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|o_proj)"
PROMPTS = torch.tensor([[5, 9, 11, 30], [7, 8, 40, 3], [22, 1, 2, 60]])
STEPS, BLOCKS = 3, 2
GENERATION = {
    "max_new_tokens": BLOCKS * CANVAS,
    "max_denoising_steps": STEPS,
    "sampler_config": EntropyBoundSamplerConfig(entropy_bound=2.0),
    "t_min": 0.4,
    "t_max": 0.8,
    "eos_token_id": None,
}
SCHEDULERS = {
    "block refinement": lambda: BlockRefinementScheduler(threshold=0.4),
    "entropy bound": lambda: EntropyBoundScheduler(entropy_bound=2.0),
    "ddim": DiscreteDDIMScheduler,
    "ddim with correctors": lambda: DiscreteDDIMScheduler(corrector_steps=1, corrector_k=2),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")


class Processor:
    """Three prompts of four tokens, whatever the messages."""

    eos_token_id = None

    def apply_chat_template(self, messages, **_):
        return {"input_ids": PROMPTS}

    def batch_decode(self, sequences, **_):
        return [str(sequence.tolist()) for sequence in sequences]


@pytest.fixture
def model():
    torch.manual_seed(5)
    config = NaraConfig(r=3, target_modules=TARGETS, core_scale=1.0)
    adapted = get_peft_model(tiny_gemma(), config).get_base_model().eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted


def pipeline(model, scheduler):
    pipe = DiffusionGemmaPipeline(model=model, scheduler=scheduler, processor=Processor())
    pipe.set_progress_bar_config(disable=True)
    holder_of(model).finder.usage.pipelines.add(pipe)
    return pipe


def sampled(pipe, **options):
    settings = {"gen_length": BLOCKS * CANVAS, "num_inference_steps": STEPS, "confidence_threshold": None}
    settings |= {"prompt": ["a"] * 3, "output_type": "seq", "generator": torch.Generator().manual_seed(3)}
    return pipe(**settings | options).sequences


def by_hand(model, scheduler, budget=STEPS, entropy=None):
    """The pipeline's loop at λ that the test computes; its tokens, and λ of each call. An `entropy` stops it early."""
    generator, levels, ids = torch.Generator().manual_seed(3), [], PROMPTS
    sweeps = scheduler.config.get("corrector_steps", 0)
    corrected = (budget - 1) // (1 + sweeps) if sweeps else 0
    steps = budget - corrected * sweeps
    options = {"block_length": CANVAS} if isinstance(scheduler, BlockRefinementScheduler) else {}
    scheduler.set_timesteps(steps, device="cpu", **options)
    parameters = inspect.signature(scheduler.step).parameters
    options_of_step = {"mask_token_id": None, "temperature": 0.0, "generator": generator}
    options_of_step = {name: value for name, value in options_of_step.items() if name in parameters}
    for _ in range(BLOCKS):
        cache = DynamicCache(config=model.config.get_text_config())
        model.model.encoder(input_ids=ids, **{CACHE: cache})
        canvas = torch.randint(0, VOCABULARY, (3, CANVAS), generator=generator)
        level, conditioning = torch.ones(3), None
        is_frozen, predicted = torch.zeros(3, dtype=torch.bool), torch.full_like(canvas, -1)

        def logits(canvas, conditioning, level, cache=cache):
            levels.append(level)
            with noise_level(model, level):
                return model(decoder_input_ids=canvas, **{CACHE: cache}, self_conditioning_logits=conditioning).logits

        for step in range(steps):
            output = scheduler.step(logits(canvas, conditioning, level), step, canvas, **options_of_step)
            canvas, conditioning = output.prev_sample, output.pred_logits
            if isinstance(scheduler, BlockRefinementScheduler):
                level = (~scheduler._committed).float().mean(1)
            elif isinstance(scheduler, EntropyBoundScheduler):
                level = (~output.accepted_index).float().mean(1)
            else:
                level = torch.full((3,), 1 - (step + 1) / steps)
            for _ in range(sweeps if step < corrected else 0):
                correct = logits(canvas, conditioning, level)
                canvas = scheduler.step_correct(correct, step, canvas, generator=generator).prev_sample
            if entropy is not None:  # a sample is frozen once it predicts the same tokens twice
                log_p, previous = conditioning.log_softmax(-1), predicted
                predicted = torch.where(is_frozen[:, None], previous, log_p.argmax(-1))
                is_sure = -(log_p.exp() * log_p).sum(-1).mean(1) < entropy
                is_frozen = is_frozen | (is_sure & (predicted == previous).all(1))
                canvas = torch.where(is_frozen[:, None], predicted, canvas)
                if is_frozen.all():
                    break
        ids = torch.cat([ids, canvas], 1)
    return ids[:, PROMPTS.shape[1] :], levels


@pytest.fixture
def levels(monkeypatch):
    """λ of each call of a decoder; that of the encoder, 0, is left out."""
    seen, make = [], CoreHolder.deviations_of

    def recorded(deviations, names, level):
        if level.any() or len(level) > 1:
            seen.append(level)
        return make(deviations, names, level)

    monkeypatch.setattr(CoreHolder, "deviations_of", recorded)
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_pipeline_runs_each_call_at_uncommitted_share(model, levels, name):
    expected, by_loop = by_hand(model, SCHEDULERS[name]())
    levels.clear()
    pipe = pipeline(model, SCHEDULERS[name]())
    assert torch.equal(sampled(pipe), expected)
    assert len(levels) == len(by_loop)
    for level, share in zip(levels, by_loop, strict=True):
        torch.testing.assert_close(level.expand(3), share)
    assert any(0 < level.min() < 1 for level in levels)
    assert torch.equal(sampled(pipe), expected)  # the second run starts at λ = 1 again


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_block_ending_early_keeps_next_blocks_lambda(model, levels, name):
    chosen = torch.randint(0, VOCABULARY, (CANVAS,), generator=torch.Generator().manual_seed(8))
    likely = 7 * one_hot(chosen, VOCABULARY)  # stable predictions
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + likely)
    expected, by_loop = by_hand(model, SCHEDULERS[name](), budget=6, entropy=2.0)
    levels.clear()
    options = {"num_inference_steps": 6, "confidence_threshold": 2.0}
    assert torch.equal(sampled(pipeline(model, SCHEDULERS[name]()), **options), expected)
    assert len(by_loop) < BLOCKS * 6
    torch.testing.assert_close([level.expand(3) for level in levels], by_loop)


@torch.no_grad()
def test_swapped_scheduler_is_followed_and_both_restored(model):
    first, second = BlockRefinementScheduler(threshold=0.4), DiscreteDDIMScheduler()
    expected = by_hand(model, DiscreteDDIMScheduler())[0]
    pipe = pipeline(model, first)
    signature = inspect.signature(first.step)
    sampled(pipe)
    assert inspect.signature(first.step) == signature
    pipe.scheduler = second
    assert torch.equal(sampled(pipe), expected)
    pipe.unload_nara_weights()
    for scheduler in (first, second):
        assert not {"step", "step_correct"} & set(vars(scheduler))
    assert not {"_prepare_sampler", "_compile_functions"} & vars(model).keys()
    assert "create_diffusion_decoder_attention_mask" not in vars(model.model.decoder)


@torch.no_grad()
def test_generate_runs_each_call_at_unaccepted_share(model, levels, monkeypatch):
    accepted, accept = [], EntropyBoundSampler.accept_canvas

    def recorded(sampler, *args):
        canvas = accept(sampler, *args)
        accepted.append(1 - sampler.accepted_token_mask.float().mean(1))
        return canvas

    monkeypatch.setattr(EntropyBoundSampler, "accept_canvas", recorded)
    torch.manual_seed(4)
    model.generate(PROMPTS, **GENERATION)
    assert len(levels) == len(accepted) == BLOCKS * STEPS
    for index, level in enumerate(levels):
        expected = accepted[index - 1] if index % STEPS else torch.ones(3)
        torch.testing.assert_close(level.expand(3), expected)
    assert len({tuple(level.tolist()) for level in levels}) > 2


@torch.no_grad()
def test_samples_ending_apart_keep_each_others_lambda(model, levels):
    options = GENERATION | {"max_new_tokens": 3 * CANVAS, "pad_token_id": 0, "return_dict_in_generate": False}
    torch.manual_seed(4)
    full = model.generate(PROMPTS, **options)[:, PROMPTS.shape[1] :].unflatten(1, (3, CANVAS))
    expected = torch.stack([level.expand(3) for level in levels]).unflatten(0, (3, STEPS))
    first, second, third = ([set(block) for block in row] for row in full.tolist())
    of_first = first[0] - set().union(*second, *third)
    of_second = second[1] - second[0] - set().union(*first, *third)
    assert of_first
    assert of_second
    levels.clear()
    torch.manual_seed(4)
    ended = model.generate(PROMPTS, **options | {"eos_token_id": [of_first.pop(), of_second.pop()]})
    blocks = ended[:, PROMPTS.shape[1] :].unflatten(1, (3, CANVAS))
    levels_of_canvases = torch.stack([level.expand(3) for level in levels]).unflatten(0, (3, STEPS))
    for row, running in enumerate([1, 2, 3]):
        assert torch.equal(levels_of_canvases[:running, :, row], expected[:running, :, row])
        assert not blocks[row, running:].any()
    assert torch.equal(blocks[2], full[2])
    assert not torch.equal(blocks[0], full[0])


def static_cache(model):
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=40)


@pytest.mark.parametrize("is_given", [False, True])
def test_generate_with_compiled_static_cache_is_refused(model, is_given):
    def options():
        return {CACHE: static_cache(model)} if is_given else {"cache_implementation": "static"}

    with pytest.raises(ValueError, match="disable_compile=True"):
        model.generate(PROMPTS, **options(), **GENERATION)
    model.generate(PROMPTS, **options(), disable_compile=True, **GENERATION)


@torch.no_grad()
def test_calls_that_are_not_a_samplers_raise(model):
    canvas, cache = PROMPTS, DynamicCache()
    logits = torch.zeros(3, 4, VOCABULARY)
    with pytest.raises(ValueError, match="no sampler is running"):
        model(input_ids=PROMPTS, decoder_input_ids=canvas)
    pipe = pipeline(model, BlockRefinementScheduler())
    with pytest.raises(ValueError, match="no sampler is running"):
        model(input_ids=PROMPTS, decoder_input_ids=canvas)
    model.model.encoder(input_ids=PROMPTS, **{CACHE: cache})
    with pytest.raises(ValueError, match="has not stepped since the last call"):
        model(decoder_input_ids=canvas, **{CACHE: cache}, self_conditioning_logits=logits)
    sampled(pipe)  # leaves λ of a step that no call has read
    for conditioning in (logits, None):
        with pytest.raises(ValueError, match="has not stepped since the last call"):
            model(decoder_input_ids=canvas, **{CACHE: cache}, self_conditioning_logits=conditioning)
    with noise_level(model, 0.5):
        model.model.encoder(input_ids=PROMPTS, **{CACHE: cache})
        model(decoder_input_ids=canvas, **{CACHE: cache})
    with pytest.raises(ValueError, match="has not stepped since the last call"):
        model(decoder_input_ids=canvas, **{CACHE: cache})


@torch.no_grad()
def test_loop_that_encodes_again_raises_at_second_step(model):
    pipe = pipeline(model, BlockRefinementScheduler(threshold=0.4))
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS, block_length=CANVAS)
    canvas = torch.randint(0, VOCABULARY, (3, CANVAS), generator=torch.Generator().manual_seed(3))

    def step(index):
        cache = DynamicCache()
        model.model.encoder(input_ids=PROMPTS, **{CACHE: cache})
        logits = model(decoder_input_ids=canvas, **{CACHE: cache}).logits
        return scheduler.step(logits, index, canvas, mask_token_id=None)

    step(0)
    with pytest.raises(ValueError, match="timestep 1"):
        step(1)
    output = step(0)
    cache = DynamicCache()
    model.model.encoder(input_ids=PROMPTS, **{CACHE: cache})
    model(decoder_input_ids=output.prev_sample, **{CACHE: cache}, self_conditioning_logits=output.pred_logits)


def test_an_unknown_scheduler_raises(model):
    source = holder_of(model).finder.forwards.source
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is not known"):
        source.stepped(FlowMatchEulerDiscreteScheduler(), {"timestep": 0}, None)


@torch.no_grad()
def test_a_copied_scheduler_steps_for_itself(model):
    first = BlockRefinementScheduler(threshold=0.4)
    pipe = pipeline(model, first)
    expected = sampled(pipe)
    committed = first._committed.clone()
    pipe.scheduler = copy.deepcopy(first)
    first._committed = None
    assert torch.equal(sampled(pipe), expected)
    assert first._committed is None
    assert torch.equal(pipe.scheduler._committed, committed)
