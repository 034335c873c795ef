import os
import re
from collections.abc import Iterable

import pytest
import torch
import transformers
from hypothesis import settings

settings.register_profile("lorakit", derandomize=True, deadline=None)  # the same cases on every machine; tests.fuzz draws new ones
settings.load_profile("lorakit")
os.environ.setdefault("LORAKIT_CACHE", "off")  # tests leave the cache of whoever runs them alone
torch.set_num_threads(1)  # the same bits on every machine, and no fight over cores
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LAW = re.compile(r"tests/laws/test_l\d.*::test_(L\d+)\w*\[([a-z0-9_]+)")


@pytest.fixture(autouse=True)
def _global_random_state():
    """Every test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many laws held for how many methods, whatever number of processes the tests ran in."""
    held, failed = (_laws(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed"))
    if held | failed:
        methods = {name for _, name in held | failed}
        terminalreporter.write_line(f"laws × methods: {len(held - failed)} pairs held for {len(methods)} methods, {len(failed)} failed")


def _laws(reports: Iterable[pytest.TestReport]) -> set[tuple[str, str]]:
    found = (LAW.search(report.nodeid) for report in reports)
    return {(match[1], match[2]) for match in found if match}
