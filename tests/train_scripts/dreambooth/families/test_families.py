"""train_scripts/dreambooth.py on a tiny model of each family: it trains, resumes to the same bits, and loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.arguments.conditions import check_family
from nara_diffusion.dreambooth.evaluation.samples import sample_batch
from nara_diffusion.dreambooth.families.table import family_of
from nara_diffusion.training.arguments.cli import parse_arguments
from tests.helpers.pipelines.families import FAMILY_PIPELINES, small_wan_images
from tests.train_scripts.dreambooth_runs import WEIGHTS, by_the_card, fresh_accelerate, tiny_arguments, written
from train_scripts.dreambooth import family_defaults, main, shipped_run

LENGTHS = {"sd3": 5, "flux": 12, "flux2": 64, "z_image": 64, "qwen_image": 300, "wan": 20}
SIDES = {"qwen_image": 32, "wan": 32}
FAMILIES = [name for name in FAMILY_PIPELINES if name != "sdxl"]  # which has tests of its own

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(guidance|max_sequence_length).*"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a family's tiny pipeline."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            FAMILY_PIPELINES[name]().save_pretrained(made[name])
        return made[name]

    return of


@pytest.fixture
def arguments(folder, pictures, tmp_path) -> Callable[..., DreamBoothArguments]:
    def of(name: str, **changes: Any) -> DreamBoothArguments:
        model = folder(name)
        defaults = family_defaults({"pretrained_model_name_or_path": str(model)})
        values = defaults | {"resolution": SIDES.get(name, 16), "max_sequence_length": LENGTHS.get(name)}
        values |= {"num_inference_steps": 2, "max_train_steps": 3, "validation_steps": 2}
        return tiny_arguments(model, pictures, tmp_path / changes.pop("output", "run"), **{**values, **changes})

    return of


@pytest.mark.parametrize("name", FAMILIES)
def test_it_trains_resumes_and_loads(arguments, name: str) -> None:
    args = arguments(name, checkpointing_steps=2)
    results = main(args)
    fresh_accelerate()
    assert np.isfinite([*results["curve_before"], *results["curve_after"]]).all()
    assert results["curve_before"] != results["curve_after"]
    out = Path(args.output_dir)
    kind = json.loads((Path(args.pretrained_model_name_or_path) / "model_index.json").read_text())["_class_name"]
    assert f"{kind}.from_pretrained" in (out / "README.md").read_text()

    again = arguments(name, checkpointing_steps=2, output="again", resume_from_checkpoint=str(out / "checkpoint-2"))
    main(again)
    fresh_accelerate()
    one, other = (load_file(Path(run.output_dir) / WEIGHTS) for run in (args, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)

    pipe = by_the_card(out)
    sampled = sample_batch(pipe, [(args.prompts[0], args.seed), (args.prompts[0], args.seed + 1)], call_of(args))
    after = written(out / "samples-after")[:2]
    before = written(out / "samples-before")[:2]
    assert all(np.abs(np.asarray(a).astype(int) - b).max() <= 1 for a, b in zip(sampled, after, strict=True))
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


def call_of(args: DreamBoothArguments) -> dict[str, Any]:
    call = {"height": args.resolution, "width": args.resolution, "num_inference_steps": args.num_inference_steps}
    length = {} if args.max_sequence_length is None else {"max_sequence_length": args.max_sequence_length}
    return {**call, **length, "guidance_scale": args.guidance_scale}


METHODS = [(name, "lora") for name in FAMILIES] + [("flux", "dora"), ("sd3", "full"), ("wan", "oft"), ("sd", "pissa")]


@pytest.mark.parametrize(("name", "adapter"), METHODS)
def test_other_methods_load_as_the_card_says(arguments, name: str, adapter: str) -> None:
    options: dict[str, Any] = {"adapter_options": ["oft_block_size=4"]} if adapter == "oft" else {}
    options |= {"lora_alpha": None} if adapter in ("oft", "full") else {}
    args = arguments(name, adapter=adapter, validation_steps=None, **options)
    main(args)
    pipe = by_the_card(Path(args.output_dir))
    sampled = sample_batch(pipe, [(args.prompts[0], args.seed), (args.prompts[0], args.seed + 1)], call_of(args))
    after, before = (written(Path(args.output_dir) / f"samples-{when}")[:2] for when in ("after", "before"))
    assert all(np.abs(np.asarray(a).astype(int) - b).max() <= 1 for a, b in zip(sampled, after, strict=True))
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


def test_defaults_are_those_of_the_family_and_flags_win_over_them(folder) -> None:
    argv = [
        "--pretrained_model_name_or_path",
        str(folder("sd3")),
        "--instance_data_dir",
        "dog",
        "--instance_prompt",
        "toy",
    ]
    args = parse_arguments(DreamBoothArguments, [*argv, "--num_inference_steps", "9"], stand_in=family_defaults)
    assert (args.resolution, args.guidance_scale, args.num_inference_steps) == (1024, 7.0, 9)
    assert args.weighting_scheme == "logit_normal"
    assert "attn.add_q_proj" in args.target_modules


def test_without_a_model_the_shipped_flow_is_trained_on_the_shipped_subject(folder) -> None:
    args = parse_arguments(DreamBoothArguments, ["--rank", "5"], stand_in=shipped_run)
    assert (Path(args.pretrained_model_name_or_path) / "model_index.json").is_file()
    assert (args.rank, args.max_sequence_length, args.instance_prompt) == (5, 0, "a photo of sks toy")
    own = parse_arguments(
        DreamBoothArguments, ["--instance_data_dir", "x", "--instance_prompt", "x"], stand_in=shipped_run
    )
    assert (own.validation_prompts, own.pretrained_model_name_or_path) == (None, args.pretrained_model_name_or_path)
    named = [
        "--pretrained_model_name_or_path",
        str(folder("wan")),
        "--instance_data_dir",
        "x",
        "--instance_prompt",
        "x",
    ]
    wan = parse_arguments(DreamBoothArguments, named, stand_in=shipped_run)
    assert (wan.resolution, wan.max_train_steps, wan.similarity_model) == (512, None, None)


@pytest.mark.slow
def test_the_shipped_flow_learns_the_shipped_subject(tmp_path) -> None:
    results = main(parse_arguments(DreamBoothArguments, ["--output_dir", str(tmp_path / "run")], stand_in=shipped_run))
    assert results["similarity_after"] > results["similarity_before"] + 0.2
    assert results["validation_loss_after"] < 0.8 * results["validation_loss_before"]


def test_a_pipeline_of_no_family_is_refused_before_anything_is_written(arguments, folder, tmp_path) -> None:
    args = arguments("sd")
    other = tmp_path / "other"
    shutil.copytree(folder("sd"), other)
    index = json.loads((other / "model_index.json").read_text()) | {"_class_name": "LuminaPipeline"}
    (other / "model_index.json").write_text(json.dumps(index))
    args.pretrained_model_name_or_path = str(other)
    with pytest.raises(ValueError, match=r"LuminaPipeline is no class of pipelines .* FLUX.1 \(FluxPipeline\)"):
        main(args)
    assert not Path(str(args.output_dir)).exists()


def test_an_option_that_the_family_cannot_express_is_refused_before_its_model_is_loaded(arguments, monkeypatch) -> None:
    monkeypatch.setattr("train_scripts.dreambooth.loader_of", None)
    args = arguments("z_image", snr_gamma=5.0)
    with pytest.raises(ValueError, match=r"snr_gamma is 5\.0, but Z-Image is a rectified flow"):
        main(args)
    assert not Path(str(args.output_dir)).exists()


def test_guidance_for_a_model_that_is_not_distilled_for_it_is_refused(arguments) -> None:
    with pytest.raises(ValueError, match=r"training_guidance_scale is 1\.0, but FLUX\.2 has no distilled guidance"):
        main(arguments("flux2", training_guidance_scale=1.0))


def test_two_transformers_of_wan_are_refused(arguments, tmp_path) -> None:
    args = arguments("wan")
    pipe = small_wan_images(boundary_ratio=0.7)
    pipe.register_modules(transformer_2=small_wan_images().transformer)
    pipe.save_pretrained(tmp_path / "wan")
    args.pretrained_model_name_or_path = str(tmp_path / "wan")
    with pytest.raises(ValueError, match=r"wan can't be trained as Wan \(one frame\): it has two transformers"):
        main(args)


@pytest.mark.parametrize(("name", "model"), [("sd3", "stable-diffusion-3.5-medium"), ("flux", "FLUX.1-dev")])
def test_configurations_are_complete_and_can_be_expressed(name: str, model: str) -> None:
    path = Path(__file__).parents[4] / "train_scripts" / "configs" / f"{name}_dreambooth.yaml"
    argv = ["--config", str(path), "--instance_data_dir", "dog", "--instance_prompt", "a photo of sks dog"]
    args = parse_arguments(DreamBoothArguments, argv)
    assert args.pretrained_model_name_or_path.endswith(model)
    family = family_of(FAMILY_PIPELINES[name]())
    check_family(args, family)
    given = yaml.safe_load(path.read_text())
    assert {"target_modules", *family.defaults} <= given.keys()
    assert set(args.target_modules) <= set(family.targets)


def test_images_of_the_class_are_made_by_the_family_s_pipeline(arguments, tmp_path) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a toy"}
    args = arguments("qwen_image", num_class_images=2, validation_steps=None, **prior)
    assert main(args)["n"] == 4
    assert len(list((tmp_path / "class").glob("*.png"))) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_trains_and_samples_as_a_user_loads(arguments, name: str) -> None:
    args = arguments(name, mixed_precision="bf16", validation_steps=None, gradient_checkpointing=True)
    results = main(args)
    assert np.isfinite([*results["curve_before"], *results["curve_after"]]).all()
    pipe = by_the_card(Path(args.output_dir))
    assert next(pipe.vae.parameters()).dtype == torch.bfloat16
    sampled = sample_batch(pipe, [(args.prompts[0], args.seed), (args.prompts[0], args.seed + 1)], call_of(args))
    after = written(Path(args.output_dir) / "samples-after")[:2]
    assert all((np.asarray(a) == b).all() for a, b in zip(sampled, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "z_image"])
def test_check_measures_the_training_of_a_flow(arguments, name: str) -> None:
    args = arguments(name, check=True, max_train_steps=None, lora_alpha=None)
    results = main(args)
    assert {"base", "nara"} <= results["losses"].keys()
    assert (Path(args.output_dir) / "check.json").is_file()
