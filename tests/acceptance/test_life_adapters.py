"""What Diffusers does with the adapters of a pipeline does to NaRAs what it does to the equal LoRAs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from peft import LoraConfig
from torch import Tensor

from nara_diffusion import core_matrix, noise_level
from tests.acceptance._lives import (
    FEW_TARGETS,
    LEVELS,
    Call,
    Lives,
    add_nara,
    assert_far,
    assert_near,
    fill,
    frozen_sd,
    nara_config,
    predict,
    save_lora,
    save_nara,
)
from tests.helpers.small_pipelines import pixels

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),  # PEFT, at a second LoRA
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),  # PEFT's delete_adapter
    pytest.mark.filterwarnings("ignore:Already unmerged"),  # PEFT, at layers that hold nothing merged
]

BLOCKS = {"unet": {"down": 0.2, "mid": 1.4, "up": {"block_0": [0.5, -0.7]}}}
HALF = {"cross_attention_kwargs": {"scale": 0.5}}

LIVES: dict[str, tuple[Call, ...]] = {
    "weight, then none": (lambda pipe: pipe.set_adapters("a", 0.3), lambda pipe: pipe.set_adapters("a")),
    "weights of blocks": (lambda pipe: pipe.set_adapters("b", BLOCKS),),
    "two, then weights": (
        lambda pipe: pipe.set_adapters(["a", "b"]),
        lambda pipe: pipe.set_adapters(["b", "a"], [0.4, -0.6]),
    ),
    "the model's own": (lambda pipe: pipe.unet.set_adapters(["a", "b"], [{"mid": 0.3, "up": 1.1}, 0.8]),),
    "the other one": (lambda pipe: pipe.unet.set_adapter("a"),),
    "the model's disabled, then enabled": (
        lambda pipe: pipe.unet.disable_adapters(),
        lambda pipe: pipe.unet.enable_adapters() or pipe.set_adapters("a"),
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of NaRAs of other ranks and layers: "a", "b" and "dora"; and "swapped", of the rank and layers of "a"."""
    root = tmp_path_factory.mktemp("naras")
    save_nara(root / "a")
    save_nara(root / "b", seed=2, r=3, lora_alpha=5, target_modules=FEW_TARGETS)
    save_nara(root / "dora", seed=3, use_dora=True, target_modules=FEW_TARGETS)
    save_nara(root / "swapped", seed=4, lora_alpha=2, use_rslora=True, core_scale=0.9)
    save_nara(root / "static", seed=5, text=True, core_type="identity")
    return root


@pytest.fixture(scope="module")
def loaded(root: Path) -> Lives:
    return Lives().load(root / "a", "a").load(root / "b", "b")


@pytest.fixture
def two(loaded: Lives) -> Lives:
    """With "a" and then "b", which is active, as loading leaves them."""
    return loaded.call(lambda pipe: pipe.enable_lora(), lambda pipe: pipe.set_adapters("b"))


@pytest.mark.parametrize("calls", LIVES.values(), ids=LIVES)
def test_adapters_after_set_adapters_equal_the_loras(two: Lives, calls: tuple[Call, ...]) -> None:
    original = two.check()
    assert_far(original, predict(two.loras[0], torch.tensor([900, 370, 900])))  # the λ of another sample is seen
    assert_far(two.check(**HALF), original)
    assert_near(two.check(), original, two.nara.unet)  # the scale is of one call
    for call in calls:
        assert_far(two.call(call).check(), original)


def test_dora_disabled_enabled_or_separate_equals_the_lora(root: Path) -> None:
    lives = Lives()
    base = predict(lives.nara)
    lives.load(root / "dora", "dora").load(root / "a", "a")
    lives.call(lambda pipe: pipe.set_adapters(["dora", "a"], [0.6, 0.5]))
    both = lives.check()
    assert_near(lives.call(lambda pipe: pipe.disable_lora()).check(), base, lives.nara.unet)
    assert_near(lives.call(lambda pipe: pipe.enable_lora()).check(), both, lives.nara.unet)
    assert_far(lives.call(lambda pipe: pipe.delete_adapters("a")).check(), both)
    assert_far(lives.call(lambda pipe: pipe.set_adapters("dora", 0.7)).check(), both)


def test_nara_beside_a_lora_equals_two_loras(root: Path, tmp_path: Path) -> None:
    plain = save_lora(tmp_path)
    lives = Lives().call(lambda pipe: pipe.load_lora_weights(plain, adapter_name="plain")).load(root / "a", "a")
    alone = lives.check()
    for names, weights in ((["plain", "a"], [0.7, 0.4]), ("plain", None)):
        assert_far(lives.call(lambda pipe, n=names, w=weights: pipe.set_adapters(n, w)).check(), alone)
    lives.call(lambda pipe: pipe.delete_adapters("a")).check()


def test_pixels_over_a_life_equal_the_lora(root: Path) -> None:
    lives = Lives()
    base = pixels(lives.nara)
    lives.load(root / "static", "toy")
    actual = lives.check_pixels()
    assert (actual - base).abs().max() > 0.02
    assert (lives.check_pixels(**HALF) - actual).abs().max() > 0.01
    for call in (
        lambda pipe: pipe.set_adapters("toy", 0.5),
        lambda pipe: pipe.set_adapters("toy", {"unet": {"mid": 0.2, "up": 1.5}, "text_encoder": 0.4}),
        lambda pipe: pipe.set_adapters("toy", {"unet": 0.6, "text_encoder": 0.0}),
        lambda pipe: pipe.disable_lora(),
    ):
        assert (lives.call(call).check_pixels() - actual).abs().max() > 0.01
    lives.call(lambda pipe: pipe.enable_lora(), lambda pipe: pipe.set_adapters("toy"))
    torch.testing.assert_close(lives.check_pixels(), actual, rtol=0, atol=1e-4)
    lives.call(lambda pipe: pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.8))
    assert (lives.check_pixels() - actual).abs().max() > 0.005
    lives.call(lambda pipe: pipe.unfuse_lora(components=["unet", "text_encoder"])).check_pixels()


def test_fused_adapter_is_its_lora_until_unfused(root: Path) -> None:
    lives = Lives().load(root / "a", "a")
    free = lives.check()
    for fuse in (lambda: lives.nara.fuse_lora(components=["unet"], lora_scale=0.6), lives.nara.unet.fuse_lora):
        with pytest.raises(ValueError, match="noise_level"):
            fuse()
        lives.check()  # no layer keeps Diffusers' scale of .6
    with noise_level(lives.nara.unet, LEVELS[1]):
        lives.call(lambda pipe: pipe.fuse_lora(components=["unet"], lora_scale=0.6))
    assert_near(predict(lives.nara), predict(lives.loras[1]), lives.nara.unet)
    lives.call(lambda pipe: pipe.unfuse_lora(components=["unet"]))
    assert_far(lives.check(), free)  # Diffusers leaves its scale of .6


def test_copied_unet_reads_its_own_timesteps_and_weights(root: Path) -> None:
    lives = Lives().load(root / "a", "a")
    expected = lives.check()
    sibling: Any = copy.copy(lives.nara)
    sibling.unet = copy.deepcopy(lives.nara.unet)
    with noise_level(lives.nara.unet, 0.5):
        assert_near(predict(sibling), expected, sibling.unet)
    fill(sibling.unet, seed=9)
    assert_far(predict(sibling), expected)
    lives.check()


def test_from_pipe_sibling_shares_adapters_and_their_removal(root: Path) -> None:
    image = torch.rand(1, 3, 16, 16)

    def edited(sibling: Any) -> Tensor:
        sibling.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        options = {"strength": 0.7, "num_inference_steps": 4, "output_type": "np", "generator": generator}
        return torch.from_numpy(sibling("a photo", image=image, **options).images)

    lives = Lives()
    base = edited(StableDiffusionImg2ImgPipeline.from_pipe(lives.nara))
    lives.load(root / "static", "toy").call(lambda pipe: pipe.set_adapters("toy", 0.8))
    siblings: list[Any] = [StableDiffusionImg2ImgPipeline.from_pipe(pipe) for pipe in (lives.nara, lives.loras[0])]
    actual, expected = map(edited, siblings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert (actual - base).abs().max() > 0.01
    for sibling in siblings:
        sibling.set_adapters("toy", 0.2)
    lives.check_pixels()
    siblings[0].unload_nara_weights()
    assert torch.equal(edited(siblings[0]), base)
    assert torch.equal(predict(lives.nara), predict(frozen_sd()))


def test_hotswap_at_equal_rank_gives_the_new_adapter(root: Path) -> None:
    lives = Lives().load(root / "a", "toy")
    original = lives.check()
    assert_far(lives.load(root / "swapped", "toy", hotswap=True).check(), original)
    lives.call(lambda pipe: pipe.set_adapters("toy", 0.6)).check()


def test_hotswap_that_would_mix_two_adapters_is_refused(root: Path, tmp_path: Path) -> None:
    bins = {number: save_nara(tmp_path / f"bins-{number}", core_type="bins", core_bins=number) for number in (2, 4)}
    for old, new, message in [
        (bins[2], bins[4], "core_bins is 4 .* but 2 in"),
        (root / "a", save_nara(tmp_path / "edm", noise_convention="edm"), "defined as 'edm', but .* as 'b' of this"),
        (save_nara(tmp_path / "text", text=True), root / "a", "no part for 'text_encoder'"),
    ]:
        pipe: Any = frozen_sd()
        pipe.load_nara_weights(root / "b", adapter_name="b")
        pipe.load_nara_weights(old, adapter_name="toy")
        original = predict(pipe)
        with pytest.raises(ValueError, match=message):
            pipe.load_nara_weights(new, adapter_name="toy", hotswap=True)
        assert torch.equal(predict(pipe), original)
    with noise_level(pipe.unet, 0.3):
        pipe.fuse_lora(components=["unet"])
    with pytest.raises(ValueError, match="is merged"):
        pipe.load_nara_weights(old, adapter_name="toy", hotswap=True)
    pipe = frozen_sd()
    pipe.unet.enable_lora_hotswap(target_rank=5)
    with pytest.raises(ValueError, match="target_rank=5, but 'toy' depends on λ and has rank 4"):
        pipe.load_nara_weights(root / "a", adapter_name="toy")


def test_hotswap_that_fails_on_its_way_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the factory fails")

    pipe: Any = frozen_sd()
    pipe.load_nara_weights(save_nara(tmp_path / "old", core_type="acceptance affine"), adapter_name="toy")
    new, original = save_nara(tmp_path / "new", seed=2, core_type="acceptance affine", lora_alpha=9), predict(pipe)
    monkeypatch.setattr("nara_diffusion.loaders.insertion.rebuild_core", fail)
    with pytest.raises(ValueError, match="the factory fails"):
        pipe.load_nara_weights(new, adapter_name="toy", hotswap=True)
    assert torch.equal(predict(pipe), original)


def test_set_lora_device_moves_one_adapters_factors_only(root: Path) -> None:
    lives = Lives().load(root / "b", "b").load(root / "a", "a")

    def on_meta(pipe: Any) -> set[str]:
        return {name for name, tensor in pipe.unet.state_dict().items() if tensor.device.type == "meta"}

    lives.call(lambda pipe: pipe.set_lora_device(["a"], "meta"))
    moved = on_meta(lives.nara)
    assert moved == {name for name in lives.nara.unet.state_dict() if ".a." in name and "core" not in name}
    assert len([name for name in moved if "lora_A" in name]) == len(on_meta(lives.loras[0])) // 2
    lives.call(lambda pipe: pipe.set_adapters("b")).check()


# ---------------------------------------------------------------- deleted, added, trained


@pytest.mark.parametrize("how", ["set_adapter", "set_adapters"])
def test_only_an_adapter_and_its_core_train(how: str) -> None:
    pipe = add_nara(frozen_sd(), "a")
    unet = add_nara(pipe, "b", seed=2, r=3, target_modules=FEW_TARGETS).unet  # active
    lists: dict[str, Callable[[], Iterable[torch.nn.Parameter]]] = {
        "parameters": unet.parameters,
        "named_parameters": lambda: dict(unet.named_parameters()).values(),
        "modules": lambda: [p for module in unet.modules() for p in module.parameters(recurse=False)],
        "children": lambda: [p for child in unet.children() for p in child.parameters()],
    }
    for listed, parameters in lists.items():
        trained = []
        for active in ("b", "a", ["a", "b"]):
            getattr(unet, how)(active)
            trained.append({id(parameter) for parameter in parameters() if parameter.requires_grad})
        of_b, of_a, both = trained
        assert both == of_a | of_b, listed
        assert not of_a & of_b
        names = {name for name, parameter in unet.named_parameters() if id(parameter) in of_a}
        assert names == {name for name, _ in unet.named_parameters() if "freq" not in name and ".a." in name}
        assert len([name for name in names if "core." in name]) == 6  # three layers of F


def test_deleted_name_added_again_gets_a_fresh_core(root: Path, tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    pipe.load_nara_weights(root / "a", adapter_name="keep")
    pipe.load_nara_weights(root / "b", adapter_name="toy")
    assert not torch.allclose(core_matrix(pipe.unet, 0.5, adapter_name="toy"), torch.eye(3), atol=0.1)
    pipe.delete_adapters("toy")
    assert not [name for name in pipe.unet.state_dict() if "toy" in name]
    pipe.unet.add_adapter(nara_config(r=3, target_modules=FEW_TARGETS), "toy")
    assert torch.equal(core_matrix(pipe.unet, 0.5, adapter_name="toy")[0], torch.eye(3))
    fill(pipe.unet, "toy", seed=8)
    expected = predict(pipe)
    pipe.save_nara_weights(tmp_path, adapter_name="toy")
    assert_near(Lives().load(tmp_path, "toy").check(), expected, pipe.unet)


def test_deleted_core_is_in_no_state_dict(root: Path) -> None:
    """`peft_config` alone says what is there: transformers pops a name from it, and nothing visits the modules then."""
    pipe: Any = frozen_sd()
    for name in ("a", "b"):
        pipe.load_nara_weights(root / name, adapter_name=name)
    unet = pipe.unet
    del unet.peft_config["a"]
    assert {name.split(".")[2] for name in unet.state_dict() if name.startswith("lora_core.")} == {"b"}
    del unet.peft_config["b"]
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "b")
    assert not [name for name in unet.state_dict() if name.startswith("lora_core.")]
