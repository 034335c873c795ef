"""`lorakit doctor`: what is here, what will be used, and what is wrong with it."""

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console


def doctor(
    model: Annotated[str | None, typer.Option("--model", help="a model folder to look into, too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print facts and problems as JSON")] = False,
) -> None:
    """Look at this machine and this installation: versions, processors, memory, extras, kernels, caches, and problems with what to type.

    Nothing is fetched and nothing is left behind. The exit code is 1 if something needed is broken.
    """
    from lorakit.train.doctor import examine

    found = examine(model)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False))
    else:
        console = Console(soft_wrap=True, markup=False, highlight=False)
        for title, facts in found.facts.items():
            console.print(title)
            width = max(map(len, facts), default=0)
            for name, fact in facts.items():
                console.print(f"  {name:<{width}}  {fact}")
        for problem in found.problems:
            console.print(f"{'BROKEN' if problem.needed else 'note'}: {problem.what}; {problem.do}")
        broken = sum(problem.needed for problem in found.problems)
        console.print(f"{broken} of these must be mended before anything runs" if broken else "nothing is broken")
    if any(problem.needed for problem in found.problems):
        raise typer.Exit(1)
