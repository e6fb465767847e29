"""Imports between the rooms of the package run downwards, and no module imports itself by a detour."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

NAME = "nara_diffusion"
PACKAGE = Path(__file__).parents[1] / NAME
FLOORS = (
    *("utils", "cores", "noise", "layers", "config", "strict", "tuner", "loaders", "wraps", "export", "__init__"),
    *("training", "dllm", "dreambooth", "lm_eval", "cli"),
)
"""From below. A room, or a module of the package itself, imports only itself and what is before it here."""
IMPORTERS = ("import_module", "__import__", "run_module")
"""Functions that import a module by its name."""
LONGEST = 400
"""The most lines of a file, which has one subject. A longer one is two subjects."""
LONGEST_NAME = 8
"""The most words of a test's name, after `test_`."""


def imports(package: Path) -> dict[str, set[str]]:
    """{module: modules of the package that it imports, anywhere in the file}."""
    files = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    by_module = {}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = {name for node in ast.walk(tree) for name in names_in(node, parent)}
        by_module[module] = {name for name in names if name in files and name != module}
    return by_module


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def names_in(node: ast.AST, parent: str) -> Iterator[str]:
    """The modules that one node may import; `parent` is the package of the file."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = absolute("." * node.level + (node.module or ""), parent)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and called(node) in IMPORTERS:
        yield from texts_in(node, parent)


def absolute(name: str, parent: str) -> str:
    """The full name of a module; one dot in front of `name` stands for `parent`, two for the package around it."""
    relative = name.lstrip(".")
    dots = len(name) - len(relative)
    if not dots:
        return name
    above = parent.split(".")
    parents = above[: len(above) - dots + 1]
    return ".".join([*parents, relative] if relative else parents)


def called(call: ast.Call) -> str:
    """The last name of the function that is called."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def texts_in(call: ast.Call, parent: str) -> Iterator[str]:
    """The modules that the strings in a call name, ".room.module" among them."""
    for node in ast.walk(call):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield absolute(node.value, parent)


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def upward(found: Mapping[str, set[str]]) -> list[str]:
    """The imports of a room above, as "module → module"."""
    floor = {room: number for number, room in enumerate(FLOORS)}
    return [
        f"{module} → {name}"
        for module, names in found.items()
        for name in sorted(names)
        if floor[room_of(name)] > floor[room_of(module)]
    ]


def circle(found: Mapping[str, set[str]]) -> list[str]:
    """The modules of a circle of imports; none if there is no circle. Packages that a module is in don't count."""
    graph = {module: {name for name in names if not module.startswith(f"{name}.")} for module, names in found.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def own_modules_imported_by_name(package: Path) -> list[str]:
    """The calls of `import_module` and its like that name a module of the package."""
    calls = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and called(node) in IMPORTERS:
                parent = module_name(path.parent, package)
                names = [text for text in texts_in(node, parent) if text.split(".")[0] == package.name]
                calls += [f"{path.relative_to(package)}:{node.lineno} {name}" for name in names]
    return calls


# ---------------------------------------------------------------------- the package


def test_every_room_imports_nothing_from_above():
    imported = imports(PACKAGE)
    assert {room_of(module) for module in imported} == set(FLOORS)
    assert upward(imported) == []


def test_the_plugin_imports_nothing_of_training():
    graph = imports(PACKAGE)
    seen, queue = set(), [NAME, f"{NAME}.dllm", f"{NAME}.export"]
    while queue:
        module = queue.pop()
        if module not in seen:
            seen.add(module)
            queue += graph[module]
    rooms = {room_of(module) for module in seen}
    assert rooms.isdisjoint({"training", "dreambooth", "check", "lm_eval", "cli"}), sorted(seen)
    assert f"{NAME}.dllm.train" not in seen
    assert {f"{NAME}.dllm.sampler", f"{NAME}.loaders.weights"} <= seen


def test_no_modules_import_each_other():
    assert circle(imports(PACKAGE)) == []


def test_no_package_module_is_imported_by_string():
    assert own_modules_imported_by_name(PACKAGE) == []


@pytest.mark.parametrize("room", ["cores", "layers/functional.py"])
def test_mathematics_imports_torch_alone(room):
    files = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).glob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {name.split(".")[0] for name in names_in(node, "")}
            assert names.isdisjoint({"peft", "diffusers", "transformers"}), path


def test_no_file_has_more_than_400_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_files_have_no_section_rules():
    """A file that needs them has two subjects."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in texts.items() if "# ----" in text] == []


def test_no_file_name_comes_twice():
    names = Counter(path.name for path in PACKAGE.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= {"__init__.py", "train.py"}


def test_names_have_at_most_8_words():
    long = []
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        names = re.findall(r"^ *def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        long += [name for name in names if name.count("_") > LONGEST_NAME]
    assert long == []


# ---------------------------------------------------------------------- what these tests see

FILES = {
    "__init__.py": "from .tuner import model",
    "strict.py": "",
    "utils/files.py": "",
    "noise/level.py": "from ..utils import files",
    "layers/variants.py": "from nara_diffusion.noise.level import Level",
    "tuner/model.py": "import nara_diffusion.strict\nfrom ..layers.variants import rows_of",
    "dllm/train.py": "",
    "lm_eval/tasks.py": "from nara_diffusion.dllm import train",
}


def package_with(folder: Path, **changed: str) -> Path:
    """A small package of the rooms' names, with code added to files: room__module="code"."""
    package = folder / NAME
    for name, text in FILES.items():
        more = changed.get(name.removesuffix(".py").replace("/", "__"), "")
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("__init__.py").touch()
        path.write_text(f"{text}\n{more}\n", encoding="utf-8")
    return package


def test_a_package_without_circles_is_accepted(tmp_path):
    package = package_with(tmp_path)
    imported = imports(package)
    assert imported["nara_diffusion.noise.level"] == {"nara_diffusion.utils", "nara_diffusion.utils.files"}
    assert (upward(imported), circle(imported), own_modules_imported_by_name(package)) == ([], [], [])


@pytest.mark.parametrize(
    ("place", "code", "target"),
    [
        ("dllm__train", "from nara_diffusion.lm_eval.tasks import run", "lm_eval.tasks"),
        ("dllm__train", "def main():\n    from ..lm_eval import tasks", "lm_eval.tasks"),
        ("dllm__train", "import nara_diffusion.lm_eval.tasks as tasks", "lm_eval.tasks"),
        ("dllm__train", "import_module('nara_diffusion.lm_eval.tasks')", "lm_eval.tasks"),
        ("dllm__train", "importlib.import_module(name='..lm_eval.tasks', package=__package__)", "lm_eval.tasks"),
        ("dllm__train", "importlib.import_module('nara_diffusion.lm_eval.tasks').run()", "lm_eval.tasks"),
        ("dllm__train", "importlib.import_module('..lm_eval.tasks', __package__)", "lm_eval.tasks"),
        ("dllm__train", "__import__('nara_diffusion.lm_eval.tasks')", "lm_eval.tasks"),
        ("noise__level", "from nara_diffusion.layers.variants import rows_of", "layers.variants"),
        ("strict", "from .tuner.model import NaraModel", "tuner.model"),
        ("utils__files", "if TYPE_CHECKING:\n    from nara_diffusion.noise.level import Level", "noise.level"),
    ],
)
def test_import_from_above_and_its_circle_are_found(place, code, target, tmp_path):
    imported = imports(package_with(tmp_path, **{place: code}))
    module = place.replace("__", ".")
    assert f"nara_diffusion.{module} → nara_diffusion.{target}" in upward(imported)
    assert {f"nara_diffusion.{module}", f"nara_diffusion.{target}"} <= set(circle(imported))


def test_a_circle_inside_a_room_is_found(tmp_path):
    package = package_with(tmp_path, noise__level="from .rows import rows")
    (package / "noise" / "rows.py").write_text("from .level import Level", encoding="utf-8")
    imported = imports(package)
    assert upward(imported) == []
    assert set(circle(imported)) == {"nara_diffusion.noise.level", "nara_diffusion.noise.rows"}


@pytest.mark.parametrize("call", ["import_module('nara_diffusion.dllm.train')", "importlib.import_module('..dllm')"])
def test_own_module_imported_by_string_is_found(call, tmp_path):
    calls = own_modules_imported_by_name(package_with(tmp_path, lm_eval__tasks=f"main = {call}.main"))
    assert len(calls) == 1
    assert calls[0].startswith("lm_eval/tasks.py:2 nara_diffusion.")


def test_another_library_may_be_imported_by_a_string(tmp_path):
    assert own_modules_imported_by_name(package_with(tmp_path, lm_eval__tasks="import_module('bitsandbytes')")) == []
