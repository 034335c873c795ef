"""`lorakit quickstart`: the whole way on the bundled base, in minutes."""

from typing import Annotated

import typer


def quickstart(
    out: Annotated[str, typer.Option("--out", help="folder for adapter, curve and report")] = "out/quickstart",
    steps: Annotated[int, typer.Option("--steps", min=1, help="training steps of each trial")] = 50,
    rank: Annotated[int, typer.Option("--r", min=1)] = 4,
    task: Annotated[str | None, typer.Option("--task", help="a built-in task, e.g. builtin:email/code")] = None,
) -> None:
    """Fine-tune the bundled base on a held-out task: LoRA against full fine-tuning, head only and norms only."""
    from lorakit.apps.quickstart import TASK
    from lorakit.apps.quickstart import quickstart as run

    run(out, task=task or TASK, steps=steps, rank=rank)
