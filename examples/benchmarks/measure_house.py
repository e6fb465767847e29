"""The size of the house: lines, files, tests, options, replaced functions, and what a forward costs in Python.

    python examples/benchmarks/measure_house.py                 # about three minutes
    python examples/benchmarks/measure_house.py --only tests --seconds --json house.json

It measures the checkout that it lies in. `--seconds` also runs README's test command, which takes minutes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("peft", "diffusers", "transformers", "torch")
SHAPES = re.compile(r"\((\.\.\. ?,|[a-zA-Z0-9_ ·*/]+,)[^()]*\)|\[0, 1\]|λ|seconds|[Ss]hape|bytes|tokens|pixels|steps")
FRAMES = re.compile(r"\b(_getframe|currentframe|f_back|f_locals|f_lasti|gi_frame|cr_frame|walk_stack|inspect\.stack)\b")
FLAG = re.compile(r"^ +(?:-\w(?: \w+)?, )?--(\w+)", re.MULTILINE)
Rows = dict[str, Any]


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def line_count(*folders: str) -> int:
    return sum(text(file).count("\n") for file in sources(*folders))


def nodes(*kinds: type) -> list[tuple[Path, Any]]:
    """(file, node) for each node of these kinds in the library."""
    walks = ((file, ast.walk(ast.parse(text(file)))) for file in sources("nara_diffusion"))
    return [(file, node) for file, walk in walks for node in walk if isinstance(node, kinds)]


def python(*arguments: str) -> str:
    """What this Python prints, run in the checkout."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True).stdout


def library() -> Rows:
    names = Counter(file.name for file in sources("nara_diffusion"))
    return {
        "library lines": line_count("nara_diffusion"),
        "library statements": len(nodes(ast.stmt)),
        "library files": names.total(),
        "file names twice": sum(names[name] > 1 for name in names.keys() - {"__init__.py", "train.py"}),
        "train_scripts, pipelines, comfyui: lines": line_count("train_scripts", "pipelines", "comfyui"),
        "examples: lines": line_count("examples"),
        "of these in benchmarks / makers": [str(line_count(f"examples/{x}")) for x in ("benchmarks", "assets/makers")],
    }


def docstrings() -> Rows:
    """Exported names, and all public definitions, whose docstring names a shape or a unit."""
    exported: dict[str, Any] = {}
    for room in ("", ".dllm", ".dreambooth", ".check"):
        module = importlib.import_module(f"nara_diffusion{room}")
        names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        exported |= {name: getattr(module, name) for name in names if callable(getattr(module, name))}
    public = [node for _, node in nodes(ast.FunctionDef, ast.ClassDef) if not node.name.startswith("_")]
    texts = [ast.get_docstring(node) or "" for node in public]
    described = [name for name, value in exported.items() if SHAPES.search(value.__doc__ or "")]
    return {
        "exported names with shapes or units": f"{len(described)} of {len(exported)}",
        "public definitions with them": f"{sum(bool(SHAPES.search(d)) for d in texts)} of {len(texts)}",
    }


def tests(seconds: bool) -> Rows:
    collected = python("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider").splitlines()[-1:]
    rows = {"test lines": line_count("tests"), "tests collected": " ".join(collected)}
    if seconds:
        start = time.perf_counter()
        summary = python("-m", "pytest", "-q", "-p", "no:cacheprovider").splitlines()[-1]
        rows["README's test command, seconds"] = f"{time.perf_counter() - start:.0f} ({summary})"
    return rows


def frames() -> Rows:
    """Modules whose code looks at stack frames, and those that import from them."""
    looking = {file for file in sources("nara_diffusion") if FRAMES.search(text(file))}
    names = {file.stem for file in looking}
    calling = {file for file, node in nodes(ast.ImportFrom) if (node.module or "").rpartition(".")[2] in names}
    modules = sorted(str(file.relative_to(ROOT)) for file in looking | calling)
    return {"modules that look at stack frames": len(modules), "these modules": modules}


def options() -> Rows:
    rows = {}
    for file in ("train_scripts/dllm.py", "train_scripts/dreambooth.py"):
        listed = {*FLAG.findall(python(file, "--help"))} - {"help", "help_all"}
        every = listed | {*FLAG.findall(python(file, "--help_all"))} - {"help", "help_all"}
        counts = [sum(name[3:] not in names or name[:3] != "no_" for name in names) for names in (every, listed)]
        rows[f"{file}: options / shown by --help"] = f"{counts[0]} / {counts[1]}"
    return rows


def pipeline(weights: str | None = None) -> Any:
    """The shipped SDXL, with a NaRA loaded."""
    import diffusers

    folder = ROOT / "examples/assets/sdxl-tiny"
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    if weights:
        importlib.import_module("nara_diffusion")
        pipe.load_nara_weights(weights, adapter_name="toy")
    return pipe


TOY = str(ROOT / "examples/assets/toy-nara")


def snapshot() -> dict[tuple[str, str], tuple[Any, Any]]:
    """{(module or class, attribute): (function, its code) or (None, a container's keys or items)} of the libraries."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] in LIBRARIES}
    classes = {kind for module in modules.values() for kind in [*vars(module).values()] if isinstance(kind, type)}
    owners = modules | {f"{kind.__module__}.{kind.__qualname__}": kind for kind in classes}
    values_by_place, places = {}, [(owner, *item) for owner, values in owners.items() for item in vars(values).items()]
    for owner, name, value in places:
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if isinstance(value, dict | list | set):
            values_by_place[owner, name] = (None, {str(item) for item in value} if len(value) < 2000 else set())
        elif callable(value):
            values_by_place[owner, name] = (
                value,
                None if isinstance(value, type) else getattr(value, "__code__", None),
            )
    return values_by_place


def replaced() -> Rows:
    """Functions of other libraries that are others after `import nara_diffusion` and one load; additions, registries.

    What the import and the load bring in of those libraries is imported before the comparison.
    """
    names = python(__file__, "--list_modules").splitlines()[-1]
    for name in json.loads(names):
        with contextlib.suppress(ImportError):  # torch.ops has namespaces that aren't modules
            importlib.import_module(name)
    pipeline()
    originals = snapshot()
    pipeline(TOY)
    functions, additions, registries = set(), set(), set()
    for (owner, name), (value, detail) in snapshot().items():
        old, old_detail = originals.get((owner, name), (None, None))
        if value is None and any("nara" in item.lower() for item in detail - (old_detail or set())):
            registries.add(name)
        elif value and old is None and "nara_diffusion" in str(getattr(value, "__module__", "")):
            additions.add(f"{owner}.{name}")
        elif value and old and (value is not old or detail is not old_detail):
            functions.add(f"{old.__module__}.{getattr(old, '__qualname__', name)}")
    lists = {"these functions": functions, "additions": additions, "registries": registries}
    counts = {"functions of other libraries replaced": len(functions)}
    return counts | {label: sorted(names) for label, names in lists.items()}


def step() -> Rows:
    """Python in one step of sampling (sdxl-tiny, 14 adapted layers): from the end of a step to that of the next."""
    from nara_diffusion import NaraConfig

    calls, package = [], str(ROOT / "nara_diffusion")

    def profile(frame: Any, event: str, _: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(package):
            calls.append((event, frame.f_code.co_filename))

    def at_end(pipe: Any, index: int, timestep: Any, tensors: Rows) -> Rows:
        sys.setprofile(profile if index == 0 else None)
        return tensors

    with tempfile.TemporaryDirectory() as folder:
        pipe = pipeline()
        pipe.unet.add_adapter(NaraConfig(r=4, target_modules=["to_q"]))
        pipe.save_nara_weights(folder)
        pipe = pipeline(folder)
    pipe("a photo of sks toy", num_inference_steps=2, callback_on_step_end=at_end)
    layers = sum(hasattr(module, "lora_A") for module in pipe.unet.modules())
    stack, changes = [], 0
    for event, file in calls:  # a change: a call from one file of the package into another
        changes += event == "call" and bool(stack) and stack[-1] != file
        stack = [*stack, file] if event == "call" else stack[:-1]
    files, by_layer = len({file for _, file in calls}), sum(event == "call" for event, _ in calls) / layers
    return {f"a step, {layers} layers: files": files, "changes of file": changes, "calls a layer": round(by_layer, 1)}


def imports() -> Rows:
    """Seconds of `import nara_diffusion`, the best of five; and after all that it loads of the libraries."""
    loaded = json.loads(python(__file__, "--list_modules", "imports").splitlines()[-1])
    code = "import importlib, time\nfor name in {}: importlib.import_module(name)\nstart = time.perf_counter()\n"
    code += "import nara_diffusion; print(time.perf_counter() - start)"
    best = [min(float(python("-c", code.format(names))) for _ in range(5)) for names in (["peft", "diffusers"], loaded)]
    return {"import over peft and diffusers, seconds": round(best[0], 3), "its own code": round(best[1], 3)}


def layers() -> Rows:
    """CPU a layer of NaRA over plain LoRA, the core's share included: 224 linear layers of width 16, one thread."""
    import peft
    import torch

    import nara_diffusion

    torch.set_num_threads(1)
    configs = [kind(r=4, target_modules=r"\d+") for kind in (peft.LoraConfig, nara_diffusion.NaraConfig)]
    stacks = [torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(224))) for _ in configs]
    models = [peft.get_peft_model(stack, config) for stack, config in zip(stacks, configs, strict=True)]
    inputs, noise = torch.randn(2, 4, 16), torch.tensor([0.3, 0.7])

    def once(model: Any, train: bool) -> float:
        level = nara_diffusion.noise_level(model, noise) if model is models[1] else contextlib.nullcontext()
        with level, torch.set_grad_enabled(train):
            start = time.process_time()
            output = model(inputs)
            if train:
                output.sum().backward()
            return time.process_time() - start

    rows = {}
    for way, train in {"inference": False, "training": True}.items():
        rounds = [[once(model.train(train), train) for model in models] for _ in range(60)]
        lora, nara = (min(times) for times in zip(*rounds, strict=True))
        rows[f"CPU a layer over plain LoRA, {way}, µs"] = round((nara - lora) / 224 * 1e6, 1)
    return rows


# `replaced` first, before nara_diffusion is imported
FUNCTIONS = (replaced, library, docstrings, tests, frames, options, step, imports, layers)
MEASURES: dict[str, Callable[..., Rows]] = {function.__name__: function for function in FUNCTIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASURES, action="append", help="one measure; may be given several times")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--seconds", action="store_true", help="run README's test command and take its time")
    parser.add_argument("--list_modules", nargs="?", const="load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.list_modules:
        importlib.import_module("nara_diffusion") if args.list_modules == "imports" else pipeline(TOY)
        return print(json.dumps([name for name in sys.modules if name.split(".")[0] in LIBRARIES]))
    results: dict[str, Rows] = {}
    print("| measure | value |\n|---|---|")
    for name in args.only or MEASURES:
        results[name] = MEASURES[name](*[args.seconds] * (name == "tests"))
        for label, value in results[name].items():
            print(f"| {label} | {', '.join(value) if isinstance(value, list) else value} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
