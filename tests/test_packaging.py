"""What surrounds the code: the wheel, the extras, and what the pages name."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("comfyui/*.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = ("nara_diffusion", "nara_flags", "train_scripts", "pipelines", "comfyui", "examples")
OTHERS_FLAGS = {
    "use_deepspeed",
    "use_fsdp",
    "num_processes",
    "model_args",
    "log_samples",
    "caption_dropout_rate",
    "proportion_empty_prompts",
    "min_timestep",
    "max_timestep",
}
"""Flags of other programs that pages name."""
FORMER = ("CHANGELOG.md", "regimes_plan.md")
"""Pages that name what was."""


def test_wheel_has_only_the_package_and_command(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    folders = (ROOT / "nara_diffusion", ROOT / "nara_flags")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {str(path.relative_to(ROOT)) for path in files} | {"nara_command.py"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "nara_diffusion/py.typed" in names


def test_requirements_are_ranges_and_tools_are_pinned():
    extras = PROJECT["optional-dependencies"]
    assert not [
        requirement
        for requirement in [*PROJECT["dependencies"], *extras["train"], *extras["test"]]
        if "==" in requirement.partition(";")[0]
    ]
    assert all("==" in requirement for requirement in extras["dev"] if not requirement.startswith("nara-diffusion"))


def test_continuous_integration_runs_the_readmes_test_command():
    (command,) = [line for line in README.read_text(encoding="utf-8").splitlines() if "-m pytest" in line]
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_links_paths_and_flags_of_the_pages_exist():
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    identifiers = {name for path in files for name in re.findall(r"\w+", path.read_text(encoding="utf-8"))}
    assert {str(page.relative_to(ROOT)): missing for page in PAGES if (missing := missing_of(page, identifiers))} == {}


def test_lines_of_pages_are_short_enough_to_compare():
    """At most 160 characters, except tables, code and the pages of records."""
    long = []
    for page in PAGES:
        if page.name == "CHANGELOG.md" or page.parent.name == "results":
            continue
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        lines = [line for line in prose.splitlines() if len(line) > 160 and not line.startswith("|")]
        long += [f"{page.relative_to(ROOT)}: {line}" for line in lines]
    assert long == []


def test_rooms_of_the_diagram_exist():
    picture = (ROOT / "docs" / "flow.svg").read_text(encoding="utf-8")
    rooms = [room.strip(" /") for text in re.findall(r'class="room">([^<]+)', picture) for room in text.split(",")]
    package = ROOT / "nara_diffusion"
    assert "noise" in rooms
    assert [name for name in rooms[1:] if not (package / name).exists() and not (package / f"{name}.py").exists()] == []


def missing_of(page: Path, identifiers: set[str]) -> list[str]:
    """Links, paths and flags of a page that aren't there; `identifiers` are all names in the project's sources."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose) + re.findall(r'<img src="([^"]+)"', prose)
    missing = [link for link in links if not (page.parent / link).exists()]
    if page.name not in FORMER:
        code = "\n".join(re.findall(r"```.*?```|^    .*?$|`[^`\n]*`", text, flags=re.DOTALL | re.MULTILINE))
        paths = re.findall(r"(?<![\w/.:-])(?:train_scripts|examples|pipelines|comfyui|docs)/[\w/.-]*\w(?![\w*])", code)
        paths += re.findall(r"`([\w-]+/[\w/-]+\.py)`", text)
        places = (ROOT, ROOT / "nara_diffusion", page.parent / "assets" / "makers")
        missing += [path for path in paths if not any((place / path).exists() for place in places)]
        flags = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9]*(?:_[a-z0-9]+)+)", code)) - OTHERS_FLAGS
        missing += sorted(flags - identifiers)
    return missing


ORDERS = ("import nara_diffusion, diffusers", "import diffusers; diffusers.ModularPipeline; import nara_diffusion")


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS)
def test_pipelines_have_three_methods_in_any_import_order(imports):
    check = "for kind in (diffusers.DDPMPipeline, diffusers.StableDiffusionXLPipeline, diffusers.ModularPipeline):\n"
    check += "    assert kind.load_nara_weights and kind.save_nara_weights and kind.unload_nara_weights\n"
    check += "assert not hasattr(diffusers.UNet2DModel, 'load_nara_weights')"
    subprocess.run([sys.executable, "-c", f"{imports}\n{check}"], cwd=ROOT, check=True)


PLUGIN_IMPORTS = """
import importlib, pkgutil, sys
import nara_diffusion
for room in ("utils", "cores", "noise", "layers", "tuner", "loaders", "export"):
    package = importlib.import_module(f"nara_diffusion.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
import nara_diffusion.dllm
for name in ("training", "dllm.train", "dreambooth", "lm_eval", "cli"):
    assert f"nara_diffusion.{name}" not in sys.modules, name
assert "diffusers.pipelines.pipeline_utils" not in sys.modules
"""


@pytest.mark.slow
def test_plugin_modules_load_no_training_or_pipelines():
    subprocess.run([sys.executable, "-c", PLUGIN_IMPORTS], cwd=ROOT, check=True)
