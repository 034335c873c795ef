import pytest
import torch
import transformers

torch.set_num_threads(1)  # the same bits on every machine, and no fight over cores
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _global_random_state():
    """Every test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)
