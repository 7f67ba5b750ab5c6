import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors gain nothing from more, and lose much on a busy machine."""
    torch.set_num_threads(1)
