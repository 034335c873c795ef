"""Where tokens are cached. Apart from the cache itself, so that whoever only asks does not wait for Transformers."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """LORAKIT_CACHE, or XDG_CACHE_HOME/lorakit, or ~/.cache/lorakit; None where LORAKIT_CACHE says off."""
    said = os.environ.get("LORAKIT_CACHE", "")
    if said.lower() in ("off", "0", "false", "no"):
        return None
    return Path(said).expanduser() if said else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorakit"
