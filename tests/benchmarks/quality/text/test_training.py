import copy

import pytest
import torch
from quality.text.methods import adapted
from quality.text.recipe import Recipe
from quality.text.training import batches, build_optimizer, objective, told, train

from nara_diffusion.dllm import masked_diffusion_loss
from tests.helpers.adapted import disturb


def model_of(task, method, **settings):
    torch.manual_seed(0)
    return adapted(copy.deepcopy(task.model), method, Recipe.of(**settings))


def test_batches_follow_from_seed_and_sizes_alone(task):
    mask_id = task.model.config.mask_token_id
    recipe = Recipe(steps=6, batch_size=16)  # 96 questions: more than one pass over the 80 rows
    first = list(batches(task.data.train, recipe, 3, mask_id))
    other = list(batches(task.data.train, Recipe.of(steps=6, batch_size=16, learning_rate=1.0), 3, mask_id))
    for one, two in zip(first, other, strict=True):
        assert torch.equal(one.input_ids, two.input_ids)
        assert torch.equal(one.noise_level, two.noise_level)
    assert not torch.equal(first[0].noise_level, next(batches(task.data.train, recipe, 4, mask_id)).noise_level)
    width = min(batch.targets.shape[1] for batch in first[:5])
    rows = torch.cat([batch.targets[:, :width] for batch in first[:5]])
    assert len(rows.unique(dim=0)) >= 70  # 80 rows without repetition in a pass, some alike in their first tokens


def test_complementary_batches_hold_half_as_many_questions_twice(task):
    batch = next(batches(task.data.train, Recipe(batch_size=8, complementary=True), 0, task.model.config.mask_token_id))
    assert torch.equal(batch.targets[:4], batch.targets[4:])
    assert torch.equal(batch.masked[:4], batch.answer[:4] & ~batch.masked[4:])


def test_the_objective_is_the_librarys(task):
    model = model_of(task, "nara", rank=3)
    disturb(model)
    rows, recipe = task.data.train, Recipe(batch_size=8, steps=1)
    batch = next(batches(rows, recipe, 5, task.model.config.mask_token_id))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))[:8]
    expected = masked_diffusion_loss(model, **rows.batch(order), seed=5, sample_indices=range(8)).loss
    torch.testing.assert_close(objective(model, batch, batch.noise_level), expected)


def test_the_masked_share_can_be_told_in_place_of_the_sampled_level(task):
    batch = next(batches(task.data.train, Recipe(batch_size=8), 5, task.model.config.mask_token_id))
    counted = torch.tensor([m.sum() / a.sum() for m, a in zip(batch.masked, batch.answer, strict=True)])
    torch.testing.assert_close(told(batch, Recipe(told="masked_share")), counted)
    assert torch.equal(told(batch, Recipe()), batch.noise_level)
    assert not torch.allclose(counted, batch.noise_level, atol=1e-2)


def test_the_core_has_its_own_rate_and_may_start_later(task):
    model = model_of(task, "nara", core_scale=1.0)
    optimizer, parameters = build_optimizer(model, Recipe(learning_rate=0.5, core_learning_rate=0.25))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"adapter": 0.5, "core": 0.25}
    core = {id(p) for name, p in model.named_parameters() if "nara_core." in name}
    assert {id(p) for p in groups["core"]["params"]} == core
    assert len(parameters) == sum(len(group["params"]) for group in groups.values())

    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, task.data.train, Recipe(steps=2, batch_size=4, core_start_step=2), seed=0)
    for name, parameter in model.named_parameters():
        if "nara_core." in name:
            assert torch.equal(parameter, before[name])
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    train(model, task.data.train, Recipe(steps=2, batch_size=4, core_start_step=1), seed=0)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "nara_core." in n)


def test_training_lowers_the_loss_and_leaves_the_base_alone(task):
    model = model_of(task, "lora", rank=4)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    found = train(model, task.data.train, Recipe(steps=12, batch_size=16, rank=4, learning_rate=2e-2), seed=0)
    assert len(found.losses) == 12
    assert sum(found.losses[-3:]) < 0.8 * sum(found.losses[:3])
    assert found.step_ms > 0
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert not model.training


def test_a_diverging_training_ends_at_once(task):
    model = model_of(task, "full")
    with pytest.raises(ArithmeticError, match=r"the loss became (nan|inf) in step \d of 9"):
        train(model, task.data.train, Recipe(steps=9, batch_size=4, learning_rate=1e12, warmup=0.0), seed=0)


def test_adalora_drops_directions_as_it_goes(task):
    steps = 24
    model = model_of(task, "adalora", rank=2, steps=steps)
    train(model, task.data.train, Recipe(steps=steps, batch_size=4, learning_rate=1e-2), seed=0)
    kept = model.peft_config["default"].rank_pattern
    assert sum(sum(layer) for layer in kept.values()) == 2 * len(kept)  # of 3 that each began with


def test_impossible_recipes_are_refused():
    with pytest.raises(ValueError, match="told is 'guessed', expected one of sampled, masked_share"):
        Recipe(told="guessed")
    with pytest.raises(ValueError, match="steps is 0, expected 1 at least"):
        Recipe(steps=0)
    with pytest.raises(ValueError, match="batch_size is 3, but complementary masks make pairs"):
        Recipe(batch_size=3, complementary=True)


def test_settings_that_a_recipe_does_not_know_are_the_adapters():
    recipe = Recipe.of(rank=3, core_scale=1.0, steps=7)
    assert (recipe.rank, recipe.steps, recipe.adapter) == (3, 7, {"core_scale": 1.0})
    settings = recipe.settings()
    assert settings["core_scale"] == 1.0
    assert "rank" not in settings
    assert settings["target_modules"] == ["all-linear"]
