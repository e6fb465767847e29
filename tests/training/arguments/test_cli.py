"""One dataclass read from flags, from YAML, and from both."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

from nara_diffusion import NaraConfig
from nara_diffusion.training.adapters.configs import CORE_ARGUMENTS
from nara_diffusion.training.arguments.cli import build_parser, option, parse_arguments
from nara_diffusion.training.arguments.common import AdapterArguments, OptimizationArguments, RunArguments


@dataclass
class Base:
    """Weights"""

    rank: int = option(8, "Inner size.", unit="columns")
    rate: float = option(1e-4, "Peak rate.")
    shape: str = option("linear", "Shape.", choices=("linear", "cosine"))


@dataclass
class Example(Base):
    """Everything else

    More about it.
    """

    other_names: ClassVar = {"network_dim": "rank", "unet_lr": "rate", "bf16": "shape cosine", "absent": "missing"}
    removed_arguments: ClassVar = {"noise_scale": "linear", "width": None}

    steps: int | None = option(None, "Steps.")
    dora: bool = option(False, "Norms.", aliases=("norms",))
    modules: list[str] = option(["q"], "Names.")  # noqa: RUF009
    share: float | None = option(0.5, "Share, 50 % say.", aliases=("part", "portion"))
    optimizer: str = option("AdamW", "Optimizer.", choices=("AdamW", "prodigy"))
    prompts: list[str] | None = option(None, "Prompts.", sentences=True, aliases=("prompt",))  # noqa: RUF009


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], Example()),
        (["--rank", "3", "--rate", "1e-2"], Example(rank=3, rate=0.01)),
        (["--dora"], Example(dora=True)),
        (["--no-dora"], Example(dora=False)),
        (["--dora", "True"], Example(dora=True)),
        (["--dora", "false", "--rank", "3"], Example(dora=False, rank=3)),
        (["--dora=FALSE"], Example(dora=False)),
        (["--norms", "False"], Example(dora=False)),
        (["--norms=true"], Example(dora=True)),
        (["--modules", "a,b"], Example(modules=["a", "b"])),
        (["--modules", "a", "b,c"], Example(modules=["a", "b", "c"])),
        (["--share", "none", "--steps", "7"], Example(share=None, steps=7)),
        (["--portion", "0.25"], Example(share=0.25)),
        (["--prompts", "a dog, red", "a cat"], Example(prompts=["a dog, red", "a cat"])),
        (["--prompt", "a dog, red"], Example(prompts=["a dog, red"])),
        (["--prompts", "none"], Example(prompts=None)),
    ],
)
def test_flags(argv: list[str], expected: Example) -> None:
    assert parse_arguments(Example, argv) == expected


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    # 1e-3 without a point is text to YAML 1.1, and still a number to us
    earlier = "noise_scale: linear\nwidth: 16\n"
    given = "rank: 5\nrate: 1e-3\nmodules: [x, y]\nshare: null\ndora: true\nprompts: ['a dog, red', a cat]\n"
    file.write_text(earlier + given)
    args = parse_arguments(Example, ["--config", str(file), "--rank", "6", "--no-dora"])
    prompts = ["a dog, red", "a cat"]
    assert args == Example(rank=6, rate=1e-3, modules=["x", "y"], share=None, dora=False, prompts=prompts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rnak: 5", "unknown key 'rnak'. Did you mean 'rank'?"),
        ("network_dim: 5", "unknown key 'network_dim'. Did you mean 'rank'?"),
        ("zzz: 5", "unknown key 'zzz'. --help lists the known ones."),
        ("noise_scale: log_snr", "noise_scale is 'log_snr', an option that this version no longer has: remove the key"),
        ("rank: five", "rank takes a whole number, got 'five'"),
        ("rank: 1.5", "rank takes a whole number, got 1.5"),
        ("rank: true", "rank takes a whole number, got True"),
        ("rank: null", "rank takes a whole number, got None"),
        ("dora: 1", "dora takes true or false, got 1"),
        ("shape: square", "shape takes one of linear, cosine, got 'square'"),
        ("- a", "must hold `key: value` lines, got list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, capsys, content: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as error:
        parse_arguments(Example, ["--config", str(file)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(Example, ["--config", str(tmp_path / "none.yaml")])
    assert "none.yaml can't be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rank", "x"], "rank takes a whole number, got 'x'"),
        (["--shape", "square"], "shape takes one of linear, cosine, got 'square'"),
        (["--ran", "3"], "unrecognized arguments: --ran 3. Did you mean --rank?"),
        (["--zzz"], "unrecognized arguments: --zzz. --help lists the known ones."),
        (["--dora", "maybe"], "unrecognized arguments: maybe"),
        (["--no-dora", "true"], "unrecognized arguments: true"),
        (["--dora=maybe"], "ignored explicit argument 'maybe'"),
        (["--network_dim", "4"], "unrecognized arguments: --network_dim 4. Did you mean --rank?"),
        (["--unet-lr=1", "--bf16"], "--unet-lr=1 --bf16. Did you mean --rate, --shape cosine?"),
        (["--absent", "4"], "unrecognized arguments: --absent 4. --help lists the known ones."),
    ],
)
def test_a_bad_flag_is_refused(capsys, argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(Example, argv)
    assert message in capsys.readouterr().err


def test_help_groups_flags_and_gives_unit_and_default() -> None:
    text = build_parser(Example, "What it does.").format_help()
    assert text.index("Everything else:") < text.index("--steps") < text.index("Weights:") < text.index("--rank")
    assert "Inner size. [columns] (default: 8)" in text
    assert "Share, 50 % say. (default: 0.5)" in text
    assert "--dora, --no-dora, --norms, --no-norms" in text
    assert "A file that names a core_module makes that module's code run" in " ".join(text.split())
    assert "{linear,cosine}" in text
    assert "Optimizer. (default: AdamW)" in text
    assert "Norms. (default: false)" in text


def test_values_that_stand_in_for_arguments_that_were_not_given(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 5\n")
    seen = []

    def stand_in(given: dict) -> dict:
        seen.append(set(given))
        return {"rank": 6, "rate": 7.0, "steps": 8}

    args = parse_arguments(Example, ["--config", str(file), "--rate", "2"], stand_in=stand_in)
    assert args == Example(rank=5, rate=2.0, steps=8)
    assert seen == [{"rank", "rate"}]


def test_a_list_default_is_not_shared() -> None:
    Example().modules.append("more")
    assert Example().modules == ["q"]


def test_every_own_field_of_nara_config_is_an_argument_with_its_default() -> None:
    inherited = {field.name for field in fields(NaraConfig.__mro__[1])}
    own = {field.name: field.default for field in fields(NaraConfig) if field.name not in inherited}
    # a train script knows what its λ means and what it trains for; strength is for use
    del own["noise_convention"], own["scheduler"], own["strength"]
    assert sorted(own) == sorted(CORE_ARGUMENTS)
    for name, default in own.items():
        value = getattr(AdapterArguments(), name)
        assert (tuple(value) if isinstance(value, list) else value) == default, name


@pytest.mark.parametrize("group", [AdapterArguments, OptimizationArguments, RunArguments])
def test_every_shared_argument_has_help(group: type) -> None:
    assert build_parser(group).format_help()
    for field in fields(group):
        assert field.metadata["help"].endswith((".", ")")), field.name
