"""The public surface: what `import lorakit` offers is exactly this, so that a name comes or goes on purpose."""

import os
import subprocess
import sys

import lorakit

PUBLIC = [
    "Adapted",
    "Adapter",
    "AdapterMismatch",
    "AdapterTrainerMixin",
    "BadParameter",
    "CheckpointError",
    "DataError",
    "Delta",
    "Factors",
    "Incompatible",
    "LorakitError",
    "Method",
    "MissingExtra",
    "NoSuchMethod",
    "NoSuchSite",
    "NotExportable",
    "NotMergeable",
    "Site",
    "adapter_trainer",
    "attach",
    "describe",
    "get_method",
    "list_methods",
    "load",
    "method",
    "quantize",
    "select",
]


def test_public_names_are_frozen() -> None:
    assert sorted(lorakit.__all__) == sorted(PUBLIC)
    assert all(hasattr(lorakit, name) for name in PUBLIC)


def test_importing_lorakit_needs_no_extra() -> None:
    """matplotlib, datasets, scikit-learn, peft and accelerate are not imported by `import lorakit`."""
    code = "import sys, lorakit; print([m for m in ('matplotlib', 'datasets', 'sklearn', 'peft', 'typer') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )
    assert found.stdout.strip() == "[]"
