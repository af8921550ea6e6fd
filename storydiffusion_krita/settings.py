"""What this machine remembers between sessions, as one JSON file in the user's data folder."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

DEVICES = ("cpu", "cuda", "rocm", "mps")


def data_folder() -> Path:
    """Where environment and settings live: not in the plugin's folder, which an update replaces."""
    if given := os.environ.get("STORYDIFFUSION_HOME"):
        return Path(given)
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "storydiffusion-krita"


def default_device() -> str:
    if sys.platform == "darwin":
        return "mps"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


@dataclass
class Settings:
    """`remote` is an address to connect to instead of running a backend here; its token is in `token`."""

    device: str = ""
    remote: str = ""
    token: str = ""
    previews: bool = True
    language: str = ""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        draft = path.with_suffix(".new")
        # the token is a key to somebody's machine: readable by its owner only, from the first byte on
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
        os.replace(draft, path)


def load_settings(folder: Path) -> Settings:
    """What is saved; what is missing or damaged is as on the first day."""
    settings = Settings()
    with contextlib.suppress(OSError, ValueError):
        saved = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        for one in fields(Settings):
            value = saved.get(one.name) if isinstance(saved, dict) else None
            if isinstance(value, type(getattr(settings, one.name))):
                setattr(settings, one.name, value)
    if settings.device not in DEVICES:
        settings.device = default_device()
    return settings
