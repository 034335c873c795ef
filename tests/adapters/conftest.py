import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client

import huggingface_hub.constants
import pytest


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Saving and loading never touch the network: here they could not."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"network access: {args}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
