"""Trees of mixes from YAML, in our names and in mergekit's."""

from pathlib import Path

import pytest
import torch

from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.mix import mix
from lorakit.adapters.mix.recipe import made, read_recipe
from lorakit.core.errors import BadParameter
from tests.adapters.mix.values import adapter, close, pair, weight

ALIASES = "".join(f"{a}: &{a} {{of: [{', '.join([b] * 8)}]}}\n" for a, b in ("ax", ("b", "*a"), ("c", "*b"), ("d", "*c"))) + "of: [*d, *d]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate("abc"):
        save_adapter(adapter(pair(i)), tmp_path / "adapters" / name)
    return tmp_path


def run(folder: Path, text: str) -> torch.Tensor:
    (folder / "recipe.yaml").write_text(text)
    return weight(made(read_recipe(folder / "recipe.yaml"), load=load_adapter))


def test_a_tree(folder: Path) -> None:
    found = run(
        folder,
        """
how: linear
weights: [1.0, -0.5]
of:
  - adapters/a
  - how: ties
    density: 0.5
    weights: [1, {q_proj: 2.0}]
    of: [adapters/b, adapters/c]
""",
    )
    inner = mix([adapter(pair(1)), adapter(pair(2))], "ties", density=0.5, weights=[1.0, 2.0])
    assert close(found, weight(mix([adapter(pair(0)), inner], weights=[1.0, -0.5])), 1e-6)


def test_mergekits_names(folder: Path) -> None:
    found = run(
        folder,
        """
merge_method: ties
base_model: some/base
dtype: bfloat16
models:
  - model: adapters/a
    parameters: {weight: 0.7}
  - model: adapters/b
    parameters: {weight: 0.3}
parameters: {density: 0.4, lambda: 0.5}
""",
    )
    assert close(found, weight(mix([adapter(pair(0)), adapter(pair(1))], "ties", weights=[0.7, 0.3], density=0.4, scale=0.5)), 1e-6)


@pytest.mark.parametrize(
    ("theirs", "how", "options"),
    [
        ("linear", "average", {}),
        ("linear, parameters: {normalize: false}", "linear", {}),
        ("task_arithmetic", "task_arithmetic", {"scale": 1.0}),
        ("ties", "ties", {"density": 1.0}),
        ("ties, parameters: {density: 0.5, lambda: 0.3}", "ties", {"density": 0.5, "scale": 0.3}),
        ("dare_linear", "dare_linear", {"density": 1.0}),
        ("della_linear, parameters: {density: 0.5}", "della_linear", {"density": 0.5, "epsilon": 0.3}),
        ("della_linear, parameters: {density: 0.5, epsilon: 0.1}", "della_linear", {"density": 0.5, "epsilon": 0.2}),
    ],
)
def test_what_mergekits_files_leave_unsaid_is_as_it_is_there(folder: Path, theirs: str, how: str, options: dict[str, float]) -> None:
    models = "[{model: adapters/a, parameters: {weight: 0.5}}, {model: adapters/b, parameters: {weight: 2}}]"
    found = run(folder, f"{{merge_method: {theirs}, models: {models}}}")
    assert close(found, weight(mix([adapter(pair(0)), adapter(pair(1))], how, weights=[0.5, 2.0], **options)), 1e-6)
    alone = run(folder, f"{{merge_method: {theirs}, models: [{{model: adapters/a}}]}}")
    assert close(alone, weight(mix([adapter(pair(0))], how, weights=[1.0], **options)), 1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("how: [", "is no YAML"),
        ("how: ties", "a mix has no list `of`"),
        ("of: [3]", "'3' is neither a folder nor a mix"),
        ("- a", "is neither a folder nor a mix"),
        ("of: [adapters/a]\nhow: tis", "no mixer is called 'tis'"),
        ("of: [adapters/a]\ndensity: 2", "linear has no option 'density'"),
        ("of: [adapters/a]\nseed: x", r"recipe.yaml: seed: Input should be a valid integer"),
        ("of: [adapters/a, adapters/b]\nweights: [1]", "1 weights for 2 adapters"),
        ("of: [adapters/a]\nparameters: [1]", r"parameters are '\[1\]'; expected names and values"),
        ("models: [{model: adapters/a, parameters: half}]", "parameters are 'half'; expected names and values"),
        ("models: [{model: adapters/a, parameters: {density: 0.5}}]", "'density' of a single model .adapters/a. is not known here"),
        ("models: [{model: adapters/a, weight: 0.7}]", "'weight' stands beside the model adapters/a; .*under parameters"),
        ("models: [adapters/a]\nof: [adapters/a]", "a mix has 'models' and 'of', which mean the same"),
        ("", "recipe.yaml is empty"),
        (ALIASES, "more than 4096 folders and mixes"),
        ("{of: [" * 20 + "a" + "]}" * 20, "nested more than 16 deep"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(BadParameter, match=message):
        run(folder, text)


def test_a_recipe_that_is_not_there_or_too_large(folder: Path) -> None:
    with pytest.raises(BadParameter, match="there is no recipe"):
        read_recipe(folder / "none.yaml")
    (folder / "large.yaml").write_text("#" * (2**20 + 1))
    with pytest.raises(BadParameter, match="a recipe has no more than"):
        read_recipe(folder / "large.yaml")
