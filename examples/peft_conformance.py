"""PEFT's own tests of LoRA, with each `LoraConfig` made a `NaraConfig`, at λ = 0.3.

    pip download peft==0.21.2 --no-deps --no-binary peft && tar xzf peft-0.21.2.tar.gz
    python examples/peft_conformance.py peft-0.21.2

`tests/test_custom_models.py` is copied to a temporary folder and run there by pytest, offline, in one process (ten
minutes). A test counts if it makes a LoraConfig. What fails runs again with LoRA. The program prints how many tests

    passed
    refused      the project raised, with a message of its own: the option has no meaning for ΔW(λ)
    explained    they ask for something that NaRA does otherwise on purpose: see `EXPLAINED`
    LoRA's too   they fail with LoRA here as well: most need the Hub
    failed       none of these

and the names of those that failed; it exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import linecache
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it

import peft
import pytest
from peft import LoraConfig

import nara_diffusion
from nara_diffusion import NaraConfig
from nara_diffusion.noise.context import Entry, present
from nara_diffusion.noise.level import as_level

LEVEL = 0.3
FILES = ("test_custom_models.py", "testing_common.py", "testing_utils.py")
PACKAGE = "tests"  # a message that they expect has this name
OWN = str(Path(nara_diffusion.__file__).parent)
EXPLAINED = {
    "base_model_state_dict": "PEFT's two functions find an adapter by types of modules, and the core is a plain one",
    "test_from_pretrained_config_construction": "peft_config has a copy, as a configuration may serve several models",
    "test_adapter_dtype_autocast": "the core stays in float32, whatever the dtype of A and B",
    "test_requires_grad": "the core is trained too, and the test lists A and B only",
    "rejects_duplicate_name_without_mutation[True]": "PeftMixedModel takes PEFT's own types only",
    "same_modules_to_save_merging_adapters_raises": "add_weighted_adapter refuses a core before PEFT's own check",
    "adapter_batches_lora_with_dora_raises": "adapter_names is refused for NaRA before PEFT's own check",
    "test_only_params_are_updated[Embedding": "three steps move the core's first layers by 5e-5; the test wants 1e-4",
    "test_disable_adapters[Conv2d Groups2 LoRA-": "the test's steps diverge: loss 3e10 with LoRA, NaN with a core",
}
"""{part of a test's name: why NaRA doesn't pass it}."""


class AnyModel:
    """In the place of a context's models: all of them."""

    def __contains__(self, holder: object) -> bool:
        return True


class Recorder:
    """A pytest plugin: leaves out the tests of other methods, and notes what the others come to.

    Attributes:
        outcomes: name of a test → "passed", "skipped", "refused" or "failed".
        messages: name of a test → the error's first line.
    """

    def __init__(self, config_class: type) -> None:
        self.config_class = config_class
        self.outcomes: dict[str, str] = {}
        self.messages: dict[str, str] = {}
        self.made = 0

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        deselected = [item for item in items if not self._may_count(item)]
        items[:] = [item for item in items if self._may_count(item)]
        config.hook.pytest_deselected(items=deselected)

    def _may_count(self, item: Any) -> bool:
        parameters = getattr(item, "callspec", None)
        return parameters is None or parameters.params.get("config_cls", self.config_class) is self.config_class

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        made_before, init = self.made, self.config_class.__post_init__  # type: ignore[attr-defined]

        def counted(config: Any) -> None:
            self.made += 1
            init(config)

        with patch.object(self.config_class, "__post_init__", counted):
            result = yield
        if self.made == made_before:
            self.outcomes.pop(item.nodeid, None)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        if report.when == "call" or report.outcome != "passed":
            outcome = report.outcome
            if outcome == "failed":
                outcome = "refused" if is_refusal(call.excinfo.value) else "failed"
                self.messages[item.nodeid] = f"{call.excinfo.typename}: {call.excinfo.value}".partition("\n")[0]
            self.outcomes[item.nodeid] = outcome
        return report


def is_refusal(error: BaseException | None) -> bool:
    """Whether the project raised `error`, or the error that it comes from. A failed assertion is no refusal."""
    while error is not None and not isinstance(error, AssertionError):
        if error.__cause__ is None and _raised_here(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, (ValueError, RuntimeError, NotImplementedError)):
        return False
    file = trace.tb_frame.f_code.co_filename
    return file.startswith(OWN) and linecache.getline(file, trace.tb_lineno).strip().startswith("raise ")


def under_lora(test: str) -> str:
    """The name that pytest gives the same test of LoRA."""
    return test.replace(NaraConfig.__name__, LoraConfig.__name__)


def explanation(test: str) -> str | None:
    """Why NaRA doesn't pass `test`; None if nothing in `EXPLAINED` says so."""
    return next((reason for part, reason in EXPLAINED.items() if part in test), None)


def sort_outcomes(found: dict[str, str], with_lora: Iterable[str]) -> dict[str, list[str]]:
    """{"passed", "refused", "explained", "LoRA's too" or "failed": names of tests}; skipped ones are left out.

    Args:
        found: `Recorder.outcomes` of the NaRA. with_lora: the tests that LoRA fails, too.
    """
    kinds: dict[str, list[str]] = {kind: [] for kind in ("passed", "refused", "explained", "LoRA's too", "failed")}
    for test, outcome in found.items():
        if outcome == "failed" and test in with_lora:
            outcome = "LoRA's too"
        elif outcome == "failed" and explanation(test):
            outcome = "explained"
        if outcome in kinds:
            kinds[outcome].append(test)
    return kinds


def run_tests(folder: Path, config_class: type, tests: Sequence[str], options: Sequence[str] = ()) -> Recorder:
    """Run `tests`, by pytest's names in `folder`, with `config_class` in the place of `peft.LoraConfig`."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    recorder = Recorder(config_class)
    quiet = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "--rootdir", str(folder), "--tb=no", "--no-header"]
    quiet += ["--no-summary", "-W", "ignore"]
    token = present.set(Entry(None, AnyModel(), as_level(LEVEL)))  # type: ignore[arg-type]
    earlier_folder = Path.cwd()
    os.chdir(folder)
    try:
        with patch.object(peft, "LoraConfig", config_class):
            pytest.main([*quiet, *options, *tests], plugins=[recorder])
    finally:
        os.chdir(earlier_folder)
        present.reset(token)
    return recorder


def copy_tests(source: Path, folder: Path) -> None:
    """Copy what is needed of PEFT's tests into a package below `folder`. Raises SystemExit if it isn't there."""
    package = folder / PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    for name in FILES:
        if not (source / "tests" / name).is_file():
            sys.exit(f"{source} has no tests/{name}: give the folder of PEFT's sources of version {peft.__version__}.")
        shutil.copy(source / "tests" / name, package / name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="PEFT's sources: a folder with tests/test_custom_models.py")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="which tests, as pytest's -k")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tests(args.source, folder)
        nara = run_tests(folder, NaraConfig, [f"{PACKAGE}/{FILES[0]}"], ["-k", args.k] if args.k else [])
        failed = [test for test, outcome in nara.outcomes.items() if outcome == "failed" and not explanation(test)]
        lora = run_tests(folder, LoraConfig, [under_lora(test) for test in failed]) if failed else Recorder(LoraConfig)
    kinds = sort_outcomes(nara.outcomes, [test for test in failed if lora.outcomes.get(under_lora(test)) == "failed"])
    print()
    for message, count in Counter(nara.messages[test] for test in kinds["refused"]).most_common():
        print(f"refused {count:5}  {message}")
    for reason, count in Counter(map(explanation, kinds["explained"])).most_common():
        print(f"explained {count:3}  {reason}")
    for test in kinds["failed"]:
        print(f"failed  {test}\n        {nara.messages[test]}")
    print(", ".join(f"{len(tests)} {kind}" for kind, tests in kinds.items()))
    return 1 if kinds["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
