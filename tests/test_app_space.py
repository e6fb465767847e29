"""examples/app.py without its server: the table's points, the default adapter, and the folder of a Space."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import app
import app_adapters
import app_sampling
import app_table

from nara_diffusion import NaraConfig
from tests.test_packaging import PROJECT

EXAMPLES = Path(app.__file__).parent


def test_added_point_is_between_the_last_one_and_no_noise():
    assert app_table.with_a_point([[1, 0, 1], [2, 1, 0.3]]) == [[1, 0, 1], [2, 1, 0.3], [2, 0.5, 0.3]]
    assert app_table.with_a_point([[1, None, None]]) == [[1, None, None], [1, 0.5, 1.0]]


def test_space_has_what_the_app_imports_and_the_projects_requirements(tmp_path):
    extras = PROJECT["optional-dependencies"]["app"]
    lines = (EXAMPLES / "space" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    gradio = next(line for line in extras if line.startswith("gradio"))
    assert lines[1:] == [*PROJECT["dependencies"], *(line for line in extras if line != gradio)]
    text = (EXAMPLES / "space" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^sdk_version: 6\.31\.0$", text, re.MULTILINE)
    assert gradio == "gradio>=6.31,<7"
    copying = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[0]
    copying = copying.replace("my-space", str(tmp_path / "space"))
    subprocess.run(["bash", "-euc", copying], cwd=EXAMPLES.parent, check=True)
    names = {path.name for path in (tmp_path / "space").iterdir()}
    assert {f.name for f in EXAMPLES.glob("app*.py")} | {"nara_diffusion", "assets", "README.md"} < names
    assert (tmp_path / "space" / "assets" / app.MODEL.name / "model_index.json").is_file()
    assert (tmp_path / "space" / "assets" / app.ADAPTER.name / "pytorch_nara_weights.safetensors").is_file()


def test_default_adapter_fits_the_default_pipeline():
    adapter = app_adapters.read(str(app.ADAPTER))
    pipe = app_sampling.load_pipeline(str(app.MODEL))
    app_adapters.load(pipe, adapter, "toy")
    config = pipe.unet.peft_config["toy"]
    assert isinstance(config, NaraConfig)
    assert max(adapter.distance) > 0.1
