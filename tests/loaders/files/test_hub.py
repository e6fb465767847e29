"""save_nara_weights(push_to_hub=True): what is uploaded, under which name, with which card; no network."""

from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from nara_diffusion.loaders import hub
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.small_pipelines import small_sdxl

FILE = "pytorch_nara_weights.safetensors"


@pytest.fixture
def uploads(monkeypatch):
    """(arguments of create_repo, arguments of upload_folder) of each upload."""
    calls, made = [], []

    def create_repo(name, **options):
        made.append((name, options))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    monkeypatch.setattr(hub, "create_repo", create_repo)
    monkeypatch.setattr(hub, "upload_folder", lambda **options: calls.append((made[-1], options)) or "commit")
    return calls


@pytest.fixture(scope="module")
def pipe():
    pipe = small_sdxl()
    pipe.unet.add_adapter(nara_config(target_modules=["to_q"]), "toy")
    disturb(pipe.unet)
    return pipe


def test_file_and_card_are_uploaded_and_nothing_else_of_the_folder(pipe, uploads, tmp_path):
    (tmp_path / "secret.txt").write_text("of the user's")
    options = {"repo_id": "org/toy", "token": "t", "private": True, "commit_message": "first", "create_pr": True}
    pipe.save_nara_weights(tmp_path, adapter_name="toy", push_to_hub=True, **options)
    (((name, made), sent),) = uploads
    assert (name, made) == ("org/toy", {"exist_ok": True, "private": True, "token": "t"})
    assert sent == {
        "repo_id": "org/toy",
        "folder_path": str(tmp_path),
        "allow_patterns": [FILE, "README.md"],
        "token": "t",
        "commit_message": "first",
        "create_pr": True,
    }
    assert (tmp_path / FILE).is_file()


def test_repository_is_named_after_the_folder(pipe, uploads, tmp_path):
    pipe.save_nara_weights(tmp_path / "my-toy", adapter_name="toy", push_to_hub=True)
    (((name, _), sent),) = uploads
    assert (name, sent["repo_id"]) == ("my-toy", "me/my-toy")
    assert "load_nara_weights('me/my-toy')" in (tmp_path / "my-toy" / "README.md").read_text()


def test_card_has_the_hubs_metadata(pipe, uploads, tmp_path):
    pipe.register_to_config(_name_or_path="stabilityai/stable-diffusion-xl-base-1.0")
    pipe.save_nara_weights(tmp_path, adapter_name="toy", weight_name="toy.safetensors", push_to_hub=True)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.base_model == "stabilityai/stable-diffusion-xl-base-1.0"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert {"nara", "lora"} <= set(card.data.tags)
    assert "StableDiffusionXLPipeline.from_pretrained('stabilityai/stable-diffusion-xl-base-1.0'" in card.text
    assert "weight_name='toy.safetensors'" in card.text
    assert "unet (rank 4, core hypernetwork)" in card.text


def test_card_that_is_there_stays(pipe, uploads, tmp_path):
    (tmp_path / "README.md").write_text("written by hand")
    pipe.save_nara_weights(tmp_path, adapter_name="toy", push_to_hub=True)
    assert (tmp_path / "README.md").read_text() == "written by hand"


def test_nothing_is_uploaded_unless_asked_for(pipe, uploads, tmp_path):
    pipe.save_nara_weights(tmp_path, adapter_name="toy")
    assert not uploads
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "org/toy"}, "repo_id is for push_to_hub=True"),
        ({"push_to_hub": True, "branch": "main"}, "no argument 'branch'; for the Hub it takes repo_id, token"),
    ],
)
def test_option_that_would_be_ignored_is_refused_before_anything_is_written(pipe, uploads, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.save_nara_weights(tmp_path, adapter_name="toy", **options)
    assert not list(tmp_path.iterdir())
