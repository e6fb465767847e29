"""The documentation builds as a site without a warning, and its reference has every public name."""

import os
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    "index": "nara_diffusion",
    "noise": "nara_diffusion.noise",
    "controls": "nara_diffusion.controls",
    "dllm": "nara_diffusion.dllm",
    "dreambooth": "nara_diffusion.dreambooth",
    "metrics": "nara_diffusion.dreambooth.evaluation.fidelity",
    "check": "nara_diffusion.check",
    "export": "nara_diffusion.export",
}
"""{page of docs/reference: the module whose `__all__` it shows}."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_reference_has_every_public_name(site, page):
    module = import_module(PAGES[page])
    html = (site / "reference" / f"{page}.html").read_text(encoding="utf-8")
    names = {name for name in module.__all__ if not name.startswith("__")}
    assert {name for name in names if f'id="{module.__name__}.{name}"' not in html} == set()


def test_reference_has_the_three_methods_of_pipelines(site):
    html = (site / "reference" / "pipelines.html").read_text(encoding="utf-8")
    for name in ("load_nara_weights", "save_nara_weights", "unload_nara_weights"):
        assert f'id="nara_diffusion.loaders.weights.{name}"' in html


def test_first_page_shows_the_flow(site):
    assert '<img alt="' in (html := (site / "index.html").read_text(encoding="utf-8"))
    assert "flow.svg" in html
    assert (site / "flow.svg").read_text(encoding="utf-8").count("<rect") == 6  # a background and five steps


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("see [the script](../train_scripts/dllm.py) there", "see `train_scripts/dllm.py` there"),
        ("see [Cores](cores.md#your-own)", "see [Cores](cores.md#your-own)"),
        ("see [the paper](https://arxiv.org/abs/2605.29716)", "see [the paper](https://arxiv.org/abs/2605.29716)"),
        ("![a picture](results/a.png)", "![a picture](results/a.png)"),
    ],
)
def test_link_out_of_the_documentation_becomes_its_path(given, shown):
    spec = util.spec_from_file_location("site_links", ROOT / "docs" / "site_links.py")
    assert spec is not None
    assert spec.loader is not None
    hook = util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="adapters.md"))
    assert hook.on_page_markdown(given, page=page) == shown
