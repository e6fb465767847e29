"""What is promised around the code: the wheel, the extras, the README's commands and its Python."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from nara_diffusion import NaraConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands_with(words: str) -> list[str]:
    return [line for block in code_blocks("bash") for line in block.splitlines() if words in line]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_package_and_nothing_else(wheel_names):
    package = {name for name in wheel_names if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "nara_diffusion").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert package == sources
    assert "nara_diffusion/py.typed" in package
    assert "nara_diffusion/dllm/__init__.py" in package


def test_the_wheel_carries_the_licence(wheel_names):
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_each_requirement_is_a_range_and_only_the_tools_are_pinned():
    extras = PROJECT["optional-dependencies"]
    ranged = [*PROJECT["dependencies"], *extras["train"], *extras["test"]]
    assert not [requirement for requirement in ranged if "==" in requirement.partition(";")[0]]
    pinned = [requirement for requirement in extras["dev"] if not requirement.startswith("nara-diffusion")]
    assert all("==" in requirement for requirement in pinned)


def requirements_of(extra: str) -> set[str]:
    """The names of the packages that `pip install nara-diffusion[extra]` asks for, other extras' included."""
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        others = re.match(r"nara-diffusion\[(.*)\]", requirement)
        names = [requirements_of(name) for name in others[1].split(",")] if others else [{name_of(requirement)}]
        found.update(*names)
    return found


def name_of(requirement: str) -> str:
    return re.split(r"[\s<>=!;\[]", requirement)[0].replace("_", "-")


def test_each_package_that_a_test_is_skipped_without_is_installed_for_the_tests():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    asked = [re.findall(r'(?:importorskip|find_spec)\("(\w+)"', source) for source in sources]
    names = {name.replace("_", "-") for found in asked for name in found}
    assert {"bitsandbytes", "deepspeed"} < names
    assert names - requirements_of("test") == set()


def test_continuous_integration_runs_the_readmes_test_command():
    (command,) = commands_with("-m pytest")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_readme_has_one_command_that_sets_up_and_runs_the_main_job():
    (command,) = (line for line in commands_with("accelerate launch train_scripts/dllm.py") if "-m venv" in line)
    assert command.startswith("python3 -m venv .venv && ")
    assert command.endswith("accelerate launch train_scripts/dllm.py")


def local_links(text: str) -> list[str]:
    """Those that lead to a file, of Markdown without its code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\]\((?!https?:|#)([^)#]+)", prose)


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md"]


def test_local_links_of_the_pages_lead_somewhere():
    links = [(page, link) for page in PAGES for link in local_links(page.read_text(encoding="utf-8"))]
    assert {README, ROOT / "RESULTS.md", ROOT / "docs" / "index.md"} < {page for page, _ in links}
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_read_in_a_few_minutes():
    """What goes further has a page in docs/."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 220


def test_errors_that_their_page_lists_are_in_the_code():
    """Each piece of a message between what changes."""
    files = (ROOT / "nara_diffusion").rglob("*.py")
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in files))
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| (?:merging: )?`(.*?)` \|", page, flags=re.MULTILINE)
    assert len(messages) >= 7
    pieces = [piece.strip(" ,") for message in messages for piece in re.split(r"…|\b\d+\b", message)]
    assert [piece for piece in pieces if piece not in code] == []


def write_nara_weights(folder: Path) -> None:
    """What the README's DreamBooth command leaves behind, from a UNet that has learnt nothing."""
    pipe = DiffusionPipeline.from_pretrained(ROOT / "examples" / "assets" / "sdxl-tiny", dtype=torch.float32)
    pipe.unet.add_adapter(NaraConfig(r=2, target_modules=["to_q"]))
    pipe.save_nara_weights(folder)


def test_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    write_nara_weights(tmp_path / "outputs" / "dreambooth-1")
    blocks = code_blocks("python")
    assert len(blocks) >= 3
    exec(compile("\n".join(blocks), str(README), "exec"), {"__name__": "readme"})
