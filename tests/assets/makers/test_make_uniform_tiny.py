"""Random tokens in place of masks: the corruption, the loss by hand in float64, and a run of the maker."""

import pytest
import torch

pytest.importorskip("reasoning_gym")

import make_uniform_tiny
from tiny_text.tokenizer import build_tokenizer
from tiny_text.uniform import noise_tokens, uniform_corruption, uniform_loss

from nara_diffusion.dllm import load_backbone

IDS = torch.randint(0, 49, (6, 11), generator=torch.Generator().manual_seed(3))
PROMPTS = torch.tensor([2, 4, 1, 3, 5, 2])
TOKENS = torch.tensor([3, 8, 9, 21, 40, 48])


def corrupted(**changes):
    return uniform_corruption(IDS, PROMPTS, TOKENS, **{"seed": 5, "sample_indices": range(6), **changes})


def test_uniform_corruption_replaces_answer_tokens_alone_and_can_be_repeated():
    batch = corrupted()
    changed = batch.input_ids != IDS
    assert changed.any()
    assert not (changed & ~batch.masked).any()
    assert set(batch.input_ids[batch.masked].tolist()) == set(TOKENS.tolist())
    assert not (batch.masked & (torch.arange(11) < PROMPTS[:, None])).any()
    assert torch.equal(batch.targets, IDS)
    assert torch.equal(corrupted().input_ids, batch.input_ids)
    assert not torch.equal(corrupted(seed=6).input_ids, batch.input_ids)


def test_uniform_corruption_replaces_a_share_of_lambda_by_uniform_tokens():
    ids, count = torch.full((400, 60), 7), 400
    tokens = torch.arange(3, 23)
    batch = uniform_corruption(ids, torch.full((count,), 10), tokens, seed=1, sample_indices=range(count))
    share = batch.masked[:, 10:].float().mean(1)
    assert (share - batch.noise_level).abs().mean() < 0.08  # 50 tokens each
    counts = torch.bincount(batch.input_ids[batch.masked], minlength=23) / batch.masked.sum()
    assert counts[:3].sum() == 0
    assert (counts[3:] - 1 / 20).abs().max() < 0.01


def test_noise_tokens_are_those_that_answers_are_written_in():
    tokenizer = build_tokenizer()
    tokens = noise_tokens(tokenizer).tolist()
    assert "".join(tokenizer.decode(token) for token in tokens[:-2]) == "abcdefghijklmnopqrstuvwxyz0123456789 "
    assert tokenizer.convert_ids_to_tokens(tokens[-2:]) == ["<|eot_id|>", "<|endoftext|>"]


def test_uniform_loss_is_the_mean_over_all_answer_tokens(tiny_llama):
    batch = corrupted()
    with torch.no_grad():
        found = uniform_loss(tiny_llama, batch)
        logits = tiny_llama(input_ids=batch.input_ids).logits.double()
    for row, first in enumerate(PROMPTS.tolist()):
        said = [-logits[row, j].log_softmax(-1)[IDS[row, j]].item() for j in range(first, 11)]
        assert found[row].item() == pytest.approx(sum(said) / len(said), rel=1e-5)


def test_make_uniform_tiny_writes_a_backbone_and_resumes(tmp_path):
    sizes = {"train_batch_size": 4, "train_size": 20, "validation_size": 1}
    options = {"output_dir": tmp_path, **sizes}
    make_uniform_tiny.main(make_uniform_tiny.Arguments(max_train_steps=2, **options))
    with pytest.raises(ValueError, match="add --resume to go on with it"):
        make_uniform_tiny.main(make_uniform_tiny.Arguments(max_train_steps=3, **options))
    results = make_uniform_tiny.main(make_uniform_tiny.Arguments(max_train_steps=3, resume=True, **options))
    assert results["steps"] == 3
    model, tokenizer = load_backbone(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    assert (tmp_path / "training_curve.csv").read_text().startswith("step,")
    assert set(results["losses"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
    assert f"| 0.5 | {results['losses']['0.5']:.3f} |" in (tmp_path / "README.md").read_text()
    assert "$" not in (tmp_path / "README.md").read_text()
