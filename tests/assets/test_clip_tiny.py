"""clip-tiny as shipped: it loads, is small, and retrieves as its card says; and its maker stops and goes on."""

import json
from pathlib import Path

import make_clip_tiny
import pytest
import torch
from make_clip_tiny import Arguments, main
from safetensors.torch import load_file
from tiny_clip.retrieval import retrieval
from tiny_clip.vocabulary import words
from tiny_training import Training
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor

FOLDER = Path(__file__).parents[2] / "examples" / "assets" / "clip-tiny"


def small_run(folder: Path, **changes: object) -> Arguments:
    sizes = {"text_width": 32, "text_layers": 2, "vision_width": 32, "vision_layers": 2, "retrieval_batches": 1}
    return Arguments(output_dir=folder, train_batch_size=6, lr_warmup_steps=2, save_steps=2, **{**sizes, **changes})


def test_it_loads_as_a_clip_of_known_size() -> None:
    model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
    assert isinstance(model, CLIPModel)
    assert isinstance(processor, CLIPProcessor)
    assert 1e6 < model.num_parameters() < 2e6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3 * 2**20
    assert not (FOLDER / "training_state.pt").exists()
    tokenizer = processor.tokenizer
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words())
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id


def test_retrieval_among_64_is_what_the_card_says() -> None:
    model = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    measured = retrieval(model, CLIPProcessor.from_pretrained(FOLDER), batches=8)
    recorded = json.loads((FOLDER / "results.json").read_text())["retrieval_among_64"]
    for name, value in measured.items():
        assert value == pytest.approx(recorded[name], abs=0.01)
    assert measured["image_to_text"] >= 0.9
    assert measured["text_to_image"] >= 0.9
    assert measured["cosine_own"] - measured["cosine_other"] > 0.6
    assert f"nearest of 64 | {recorded['image_to_text']:.1%}" in (FOLDER / "README.md").read_text()


def test_the_unseen_word_was_never_trained() -> None:
    """Its embedding kept the scale of its random start, which the words of the captions left."""
    model, processor = CLIPModel.from_pretrained(FOLDER), CLIPProcessor.from_pretrained(FOLDER)
    table = model.text_model.embeddings.token_embedding.weight.float()
    norm = {word: table[processor.tokenizer.convert_tokens_to_ids(f"{word}</w>")].norm().item() for word in words()}
    unseen = norm.pop("sks")
    assert unseen < min(norm.values())


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main(small_run(whole, max_train_steps=5))
    update = Training._update

    def stop_at_step_three(training: Training, loss: torch.Tensor) -> None:
        if training.step == 3:
            raise KeyboardInterrupt
        update(training, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_update", stop_at_step_three)
        with pytest.raises(KeyboardInterrupt):
            main(small_run(stopped, max_train_steps=5))
    with pytest.raises(ValueError, match="add --resume"):
        main(small_run(stopped, max_train_steps=5))
    with pytest.raises(ValueError, match=r"another run: learning_rate was 0\.001"):
        main(small_run(stopped, max_train_steps=5, learning_rate=1e-2, resume=True))
    main(small_run(stopped, max_train_steps=5, resume=True))

    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    fresh = make_clip_tiny.build_clip(small_run(tmp_path), make_clip_tiny.build_processor())
    changed = sum((fresh.state_dict()[name] - expected[name].float()).abs().max() > 1e-4 for name in expected)
    assert changed > len(expected) / 2
    assert "nearest of 64" in (whole / "README.md").read_text()
