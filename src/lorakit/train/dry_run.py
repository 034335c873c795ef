"""What a run would do, before it does it: configuration, every matched site, parameter counts, and memory by row."""

from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from lorakit.core.base import numel
from lorakit.core.method import describe
from lorakit.core.params import ParamTable
from lorakit.train.config import TrainConfig
from lorakit.train.distributed import world
from lorakit.train.expected import expected
from lorakit.train.memory import MemoryEstimate
from lorakit.train.train import build


@dataclass(frozen=True)
class Preview:
    """Everything that `--dry-run` prints."""

    config: TrainConfig
    table: ParamTable
    sites: list[tuple[str, str, int]]
    total_params: int
    accounts: list[str]
    notes: list[str]
    memory: MemoryEstimate

    def show(self, console: Console) -> None:
        """Print it."""
        import yaml

        defaults = {name: parameter.default for name, parameter in describe(self.config.method).parameters.items()}
        settings = self.config.model_dump(mode="json", exclude={"method_args"}) | defaults | self.config.method_args
        console.print(yaml.safe_dump(settings, sort_keys=False).rstrip(), highlight=False, soft_wrap=True)
        sites = Table("site", "shape", "trainable", title=f"{len(self.sites)} sites", box=None)
        for name, shape, n in self.sites:
            sites.add_row(name, shape, f"{n:,}")
        console.print(sites)
        n = self.table.numel()
        console.print(f"trainable {n:,} of {self.total_params:,} parameters ({100 * n / self.total_params:.2f} %)")
        for line in [*self.accounts, *(f"note: {note}" for note in self.notes)]:
            console.print(line, soft_wrap=True)
        console.print(self.memory.table())


def dry_run(config: TrainConfig) -> Preview:
    """Load and attach as a run would, trace one micro-batch for memory, train nothing and write nothing."""
    here = world()
    parts = build(config.model_copy(update={"torch_compile": False}), here)
    adapted, data = parts.adapted, parts.data
    config = parts.config.model_copy(update={"torch_compile": config.torch_compile})
    table = adapted.params()
    per_site: Counter[str] = Counter()
    for row in table:
        per_site[row.site.name if row.site else row.name] += row.tensor.numel()
    shapes = {b.site.name: f"{b.site.d_out} × {b.site.d_in}" for b in adapted.branches()}
    sites = [(name, shapes.get(name, "whole"), n) for name, n in per_site.items()]
    memory = expected(adapted, data, config, here.device)
    accounts = [f"data: {note}" for note in parts.held.notes]
    accounts += [line for task in data.tasks for line in (f"train: {task.train.account}", f"eval: {task.valid.account}")]
    return Preview(config, table, sites, numel(adapted.model), accounts, adapted.notes, memory)
