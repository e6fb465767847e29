"""load_nara_weights, save_nara_weights and unload_nara_weights on DiffusionGemmaPipeline."""

from functools import wraps

import pytest
import torch
from diffusers import BlockRefinementScheduler, DiffusionGemmaPipeline
from peft import get_peft_model
from peft.functional import delete_adapter, set_adapter

from nara_diffusion import NaraConfig
from nara_diffusion.dllm.models.model_classes import CACHE
from nara_diffusion.noise.sources import CORRUPTED_SHARE
from nara_diffusion.tuner.holder import CoreHolder, holder_of
from tests.helpers.adapted import disturb
from tests.helpers.tiny_gemma import CANVAS, tiny_gemma

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")


class Processor:
    eos_token_id = None

    def apply_chat_template(self, messages, **_):
        return {"input_ids": torch.tensor([[5, 9, 11], [7, 8, 40]])}


def pipeline(scheduler=None, model=None):
    scheduler = scheduler or BlockRefinementScheduler(threshold=0.4)
    pipe = DiffusionGemmaPipeline(model=model or tiny_gemma(), scheduler=scheduler, processor=Processor())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe, **options):
    generator = torch.Generator().manual_seed(3)
    settings = {"gen_length": 2 * CANVAS, "num_inference_steps": 4, "output_type": "seq", "generator": generator}
    return pipe(prompt=["a", "b"], **settings | options).sequences


def short(pipe):
    """The first canvas."""
    return sampled(pipe, gen_length=CANVAS)


BOTH = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|o_proj)"
DECODER = r".*decoder\.layers\..*(q_proj|o_proj)"


def trained(folder, targets=BOTH, seed=1):
    model = get_peft_model(
        tiny_gemma(), NaraConfig(r=3, target_modules=targets, core_scale=1.0, noise_convention=CORRUPTED_SHARE)
    )
    disturb(model, seed=seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return trained(tmp_path)


def test_a_trained_folder_loads_runs_saves_and_unloads(folder, tmp_path):
    pipe = pipeline()
    pipe.load_nara_weights(folder)
    adapted = sampled(pipe)
    layers = pipe.model.model.decoder.layers[0].self_attn.q_proj
    twin = pipe.model.model.encoder.language_model.layers[0].self_attn.q_proj
    assert twin.lora_A["default_0"] is layers.lora_A["default_0"]

    pipe.save_nara_weights(tmp_path / "saved")
    other = pipeline()
    other.load_nara_weights(tmp_path / "saved")
    assert torch.equal(sampled(other), adapted)

    state = tiny_gemma().state_dict()
    other.unload_nara_weights()
    assert all(torch.equal(value, state[name]) for name, value in other.model.state_dict().items())
    if CACHE == "cache":  # diffusers 0.42.1 under transformers 5.24
        with pytest.raises(TypeError, match="past_key_values"):
            sampled(other)


def test_adapters_are_swapped_chosen_deleted_and_loaded_again(tmp_path):
    folders = [trained(tmp_path / "0"), trained(tmp_path / "1", seed=2), trained(tmp_path / "2", DECODER, seed=3)]
    alone = []
    for folder in folders:
        pipe = pipeline()
        pipe.load_nara_weights(folder)
        alone.append(short(pipe))
    assert len({str(answer) for answer in alone}) == 3

    pipe = pipeline()
    pipe.load_nara_weights(folders[0], adapter_name="x")
    pipe.load_nara_weights(folders[1], adapter_name="x", hotswap=True)
    assert torch.equal(short(pipe), alone[1])
    with pytest.raises(ValueError, match="hotswap keeps the modules"):
        pipe.load_nara_weights(folders[2], adapter_name="x", hotswap=True)
    pipe.load_nara_weights(folders[2], adapter_name="y")
    for name, expected in (("x", alone[1]), ("y", alone[2])):
        set_adapter(pipe.model, name)
        assert torch.equal(short(pipe), expected)
    set_adapter(pipe.model, "x")
    delete_adapter(pipe.model, "y", "lora_")
    assert torch.equal(short(pipe), alone[1])
    pipe.unload_nara_weights()
    pipe.load_nara_weights(folders[2])
    assert torch.equal(short(pipe), alone[2])


def test_models_sharing_a_scheduler_unload_in_any_order(tmp_path):
    folders, alone = [trained(tmp_path / "0"), trained(tmp_path / "1", seed=2)], []
    for folder in folders:
        pipe = pipeline()
        pipe.load_nara_weights(folder)
        alone.append(short(pipe))
    for first in (0, 1):
        scheduler = BlockRefinementScheduler(threshold=0.4)
        pipes = [pipeline(scheduler), pipeline(scheduler)]
        for pipe, folder in zip(pipes, folders, strict=True):
            pipe.load_nara_weights(folder)
        for i in (0, 1, 0):
            assert torch.equal(short(pipes[i]), alone[i])
        pipes[first].unload_nara_weights()
        assert torch.equal(short(pipes[1 - first]), alone[1 - first])
        pipes[1 - first].unload_nara_weights()
        assert not {"step", "step_correct"} & set(vars(scheduler))


def test_schedulers_own_step_is_called_and_restored(folder):
    pipe, calls = pipeline(), []
    expected = pipeline()
    expected.load_nara_weights(folder)
    step = pipe.scheduler.step

    @wraps(step)
    def counted(*args, **kwargs):
        calls.append(1)
        return step(*args, **kwargs)

    pipe.scheduler.step = counted
    pipe.load_nara_weights(folder)
    assert torch.equal(sampled(pipe), sampled(expected))
    assert len(calls) == 8
    pipe.unload_nara_weights()
    assert pipe.scheduler.step is counted
    assert "step_correct" not in vars(pipe.scheduler)


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "loaded"])
def test_levels_of_a_model_in_bfloat16_are_float32(tmp_path, monkeypatch, is_trained):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 16}  # of its kernels
    model = tiny_gemma(**sizes, global_head_dim=16).bfloat16().requires_grad_(False)
    trained = get_peft_model(model, NaraConfig(r=3, target_modules=BOTH, core_scale=1.0))
    disturb(trained)
    assert {tensor.dtype for tensor in trained.parameters() if tensor.requires_grad} == {torch.float32}
    if not is_trained:
        trained.save_pretrained(tmp_path)
        model = trained.unload()
    pipe, levels, shares, make = pipeline(model=model), [], [], CoreHolder.deviations_of
    if is_trained:
        holder_of(model).finder.add_pipeline(pipe)
    else:
        pipe.load_nara_weights(tmp_path)

    def recorded(deviations, names, level):
        levels.append(level)
        by_key = make(deviations, names, level)
        assert {tensor.dtype for tensor in by_key.values()} == {torch.float32}
        return by_key

    def after_step(pipe, *_):
        shares.append(1 - pipe.scheduler._committed.float().mean(1))
        return {}

    monkeypatch.setattr(CoreHolder, "deviations_of", recorded)
    sampled(pipe, callback_on_step_end=after_step)
    for block in (0, 1):
        expected = [torch.zeros(1), torch.ones(1), *shares[4 * block : 4 * block + 3]]
        torch.testing.assert_close(levels[5 * block : 5 * block + 5], expected, rtol=0, atol=1e-6)


def test_an_adapter_of_masks_does_not_load(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace(CORRUPTED_SHARE, "masked_share"))
    with pytest.raises(ValueError, match="masked_share"):
        pipeline().load_nara_weights(folder)
