"""--plan: its figures against the same counter on real runs, what it writes, and the flags that it names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import plan_runs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nara_diffusion.dllm import load_backbone
from nara_diffusion.dllm import train as text
from nara_diffusion.dreambooth import train as images
from nara_diffusion.dreambooth.families import placed
from nara_diffusion.dreambooth.image_arguments import run_family
from nara_diffusion.dreambooth.image_plan import PlannedPrompts, pipeline_on_meta, planned_image_step
from nara_diffusion.training.optimization import build_optimizer
from nara_diffusion.training.plan import cheaper
from nara_diffusion.training.planned_step import PlannedStep, StepCounter, measure, optimizer_bytes
from nara_diffusion.utils.quantised import prepare_quantised
from nara_flags.parser import parse_arguments
from nara_flags.training import OPTIMIZERS
from tests.helpers.pipelines.families import FAMILY_PIPELINES
from tests.helpers.plans import CONFIGURATIONS, counted_run, planned, save_configurations, text_words
from tests.helpers.small_pipelines import small_sdxl

ASSETS = Path(__file__).parents[2] / "examples" / "assets"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The shipped models' folders without their weights and tokenizers."""
    root = tmp_path_factory.mktemp("configurations")
    save_configurations(small_sdxl(), root / "small")
    for name in ("llada-tiny", "sdxl-tiny"):
        for file in (ASSETS / name).rglob("*.json"):
            if file.name in CONFIGURATIONS:
                target = root / name / file.relative_to(ASSETS / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
    return root


@pytest.mark.slow
def test_image_plan_is_what_the_run_holds(folders, tmp_path, monkeypatch):
    words = ["--resolution", "64", "--train_batch_size", "12", "--max_train_steps", "1", "--validation_steps", "none"]
    words += ["--instance_data_dir", str(ASSETS / "subject"), "--instance_prompt", "a photo of sks toy"]
    words += [
        "--checkpointing_steps",
        "none",
        "--adapter",
        "nara_dora",
        "--target_modules",
        "to_q",
        "to_out.0",
    ]
    real = ["--pretrained_model_name_or_path", str(ASSETS / "sdxl-tiny"), *words, "--output_dir", str(tmp_path / "out")]
    args = parse_arguments(images.DreamBoothArguments, real, defaults=images.shipped_run)
    peak, states = counted_run(images, args, monkeypatch)
    figures = planned(images, ["--pretrained_model_name_or_path", str(folders / "sdxl-tiny"), *words])
    assert figures["activations"] == pytest.approx(peak, rel=0.005)
    assert figures["optimizer"] == states


def test_plan_of_trained_text_encoders_counts_them(folders):
    words = ["--pretrained_model_name_or_path", str(folders / "small"), "--resolution", "16", "--plan"]
    both, denoiser = (
        planned_image_step(parse_arguments(images.DreamBoothArguments, words + more, defaults=images.shipped_run))
        for more in (["--train_text_encoder"], [])
    )
    assert both.model.trained.keys() > denoiser.model.trained.keys()
    assert both.parts.keys() < denoiser.parts.keys()


@pytest.mark.slow
def test_step_of_trained_text_encoders_is_planned(folders):
    words = ["--pretrained_model_name_or_path", str(folders / "small"), "--resolution", "16"]
    flops = [planned(images, words + more)["flops"] for more in (["--train_text_encoder"], [])]
    assert flops[0] > flops[1]


@pytest.mark.slow
def test_plan_with_a_size_names_flags_that_fit(folders, capsys):
    words = text_words(folders / "llada-tiny", "--train_batch_size", "8", "--load_in_8bit")
    needed = planned(text, [*words, "--train_batch_size", "1", "--gradient_accumulation_steps", "8"])["peak"] / 1e9
    for size, word in (
        (needed * 1.01, "--train_batch_size 1 --gradient_accumulation_steps 8 does"),
        (1e-6, "Lower --max_l"),
    ):
        args = parse_arguments(text.Arguments, [*words, "--plan", str(size)])
        text.main(args)
        assert word in capsys.readouterr().out
    text.main(parse_arguments(text.Arguments, [*words, "--plan", "1"]))
    assert "It fits into 1 GB" in capsys.readouterr().out


def test_cheaper_batch_of_1_keeps_the_accumulated_batch():
    args = text.Arguments(
        pretrained_model_name_or_path="none", train_file="none", train_batch_size=4, gradient_accumulation_steps=3
    )
    words, changed = next(cheaper(args, swappable=0))
    assert words == "--train_batch_size 1 --gradient_accumulation_steps 12"
    assert changed == {"train_batch_size": 1, "gradient_accumulation_steps": 12}


@pytest.mark.parametrize(("words", "message"), [
    (["--plan", "0"], "plan must be above 0"),
    (["--plan", "nan"], "plan must be above 0"),
    (["--plan", "big"], "expected a number"),
])  # fmt: skip
def test_wrong_size_is_refused(words, message, folders, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(text.Arguments, [*text_words(folders / "llada-tiny"), *words])
    assert message in capsys.readouterr().err


OTHER_FAMILIES = ["z_image", "qwen_image", "flux", "flux2", "wan", "sd3"]


def family_words(name, folder):
    length = 40 if name == "sd3" else 24
    save_configurations(FAMILY_PIPELINES[name](), folder)
    words = ["--pretrained_model_name_or_path", str(folder), "--resolution", "32"]
    return [*words, "--max_sequence_length", str(length)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_other_families_are_planned(name, tmp_path):
    assert planned(images, family_words(name, tmp_path))["flops"] > 0


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_planned_prompts_have_the_shapes_of_real_ones(name, tmp_path):
    pipe = FAMILY_PIPELINES[name]()
    words = [*family_words(name, tmp_path), "--plan"]
    args = parse_arguments(images.DreamBoothArguments, words, defaults=images.shipped_run)
    family = run_family(args, pipe)
    expected = family.encode(pipe, ["one two three " * 60])
    expected = placed(expected, torch.device("cpu"))
    actual = PlannedPrompts(pipeline_on_meta(args), family).get(["one"], [])
    assert [getattr(part, "shape", part) for part in actual] == [getattr(part, "shape", part) for part in expected]


def test_a_run_with_a_teacher_has_no_plan():
    with pytest.raises(ValueError, match="plan is inf, but distill_to"):
        planned(images, ["--pretrained_model_name_or_path", str(ASSETS / "sdxl-tiny"), "--distill_to", "2"])


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_rounded_weights_take_what_bitsandbytes_stores(bits, folders):
    pytest.importorskip("bitsandbytes")
    figures = planned(text, text_words(folders / "llada-tiny", f"--load_in_{bits}bit"))
    model, _ = load_backbone(str(ASSETS / "llada-tiny"), dtype=torch.float32, **{f"load_in_{bits}bit": True})
    prepare_quantised(model)
    stored = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        stored += parameter.nbytes
        if state is not None:
            stored += state.absmax.nbytes + state.state2.absmax.nbytes
    assert figures["weights"] == pytest.approx(stored, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("run", plan_runs.RUNS)
def test_docs_table_is_what_the_script_prints(run):
    started = time.process_time()
    row = plan_runs.row(run)
    assert time.process_time() - started < 30
    assert row in (Path(__file__).parents[2] / "docs" / "runs.md").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_large_real_step_is_resident_as_planned():
    command = [sys.executable, plan_runs.__file__, "--measure"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plan, resident = (float(word) for word in re.findall(r"([\d.]+) GB", output))
    assert resident > 1.07
    assert plan == pytest.approx(resident, rel=0.2)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "AdamW8bit"])
def test_optimizer_bytes_are_those_of_its_states(name):
    model = get_peft_model(
        nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 36)), LoraConfig(r=6, target_modules=["0", "1"])
    )
    args = parse_arguments(text.Arguments, [*text_words("x"), "--train_file", "x", "--optimizer", name])
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # prodigy keeps nothing of a zero
    optimizer = build_optimizer(model, args)
    model(torch.randn(5, 40)).square().sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    state_bytes = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert optimizer_bytes(trained, name) == state_bytes


def needs_of_a_layer(*flags):
    """The needs of a step that trains a weight of 40 x 24 in float32, and that weight's bytes."""
    with torch.device("meta"):
        model = nn.Linear(24, 40, bias=False)
    args = parse_arguments(text.Arguments, [*text_words("x"), "--train_file", "x", *flags])
    step = PlannedStep(model, lambda: model(torch.ones(1, 24)).sum(), "a layer")
    return measure(step, args), 4 * 40 * 24


@pytest.mark.parametrize("flag", ["--gradient_accumulation_steps", "--global_batch_size"])
def test_later_forwards_keep_gradients_of_earlier_ones(flag):
    first, weight = needs_of_a_layer()
    later, _ = needs_of_a_layer(flag, "4")
    assert later.activations - first.activations == weight


def test_unfused_update_needs_a_copy_of_trained_weights():
    fused, weight = needs_of_a_layer()
    assert fused.peak == weight + 2 * weight + fused.activations  # the weight, two moments, the step
    assert weight < fused.activations < 2 * weight
    scaled, _ = needs_of_a_layer("--mixed_precision", "fp16")
    assert scaled.peak == weight + 2 * weight + 2 * weight  # and a gradient and a copy in the update
    prodigy, _ = needs_of_a_layer("--optimizer", "prodigy")
    assert prodigy.peak == weight + 4 * weight + 2 * weight


def test_moving_average_takes_as_much_as_its_weights():
    without, weight = needs_of_a_layer()
    average, _ = needs_of_a_layer("--ema_decay", "0.9")
    assert average.peak == without.peak + weight


def test_flops_are_those_of_pytorch_and_attention_counts():
    model, x = nn.Linear(24, 36), torch.randn(5, 24)
    with FlopCounterMode(display=False) as expected:
        model(x).sum().backward()
    with StepCounter() as counter:
        model(x).sum().backward()
    assert counter.flops == expected.get_total_flops() > 0
    q, k = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 11, 16)
    with StepCounter() as counter:
        nn.functional.scaled_dot_product_attention(q, k, k)
    assert counter.flops == 2 * 2 * (2 * 3 * 7 * 11 * 16)


def test_expert_products_are_planned_in_any_dtype():
    rows, weights = torch.randn(12, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    ends = torch.tensor([2, 7, 12], dtype=torch.int32)
    with StepCounter() as real:
        nn.functional.grouped_mm(rows.requires_grad_(), weights.requires_grad_(), offs=ends).square().sum().backward()
    assert real.flops == 3 * 2 * (12 * 16 * 8)
    with FakeTensorMode(), StepCounter() as planned_counter:
        rows, weights = (torch.empty(shape, requires_grad=True) for shape in ((12, 15), (3, 15, 7)))
        product = nn.functional.grouped_mm(rows, weights, offs=torch.empty(3, dtype=torch.int32))
        product.square().sum().backward()
    assert product.shape == (12, 7)
    assert planned_counter.flops == 3 * 2 * (12 * 15 * 7)
    assert (rows.grad.shape, weights.grad.shape, weights.grad.dtype) == (rows.shape, weights.shape, torch.float32)
