"""The plugin as Krita takes it: a zip for its importer, or straight into a local Krita.

Krita's importer copies NAME.desktop and the folder NAME, nothing else; so the backend's wheel, with the
engine's resources in it, lies inside the folder. It finds the folder only by a directory entry of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from storydiffusion import __version__
from storydiffusion.errors import StoryDiffusionError

NAME = "storydiffusion_krita"
WHEELS = "backend"


def plugin_folder() -> Path:
    """Where the plugin lies: in a checkout, or inside the installed package.

    Raises:
        StoryDiffusionError: in neither.
    """
    here = Path(__file__).resolve().parent
    for root in (here.parents[1], here / "plugin"):
        if (root / NAME / "__init__.py").is_file() and (root / f"{NAME}.desktop").is_file():
            return root
    raise StoryDiffusionError("The Krita plugin does not lie beside this program.", "Install the package again.")


def build_wheel(root: Path, into: Path) -> Path:
    """The backend's wheel from a checkout.

    Raises:
        StoryDiffusionError: this is no checkout, or the build failed.
    """
    if not (root / "pyproject.toml").is_file():
        raise StoryDiffusionError("A wheel is built from a checkout.", "Give a finished one with --wheel.")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(into)]
    try:
        import hatchling  # type: ignore[import-not-found]  # noqa: F401

        command.append("--no-build-isolation")  # it is here: no network is needed
    except ImportError:
        pass
    done = subprocess.run([*command, str(root)], capture_output=True, text=True)
    wheels = list(into.glob("storydiffusion-*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise StoryDiffusionError(f"The wheel could not be built: {last}", "Build it by hand and give it with --wheel.")
    return wheels[0]


def plugin_files(root: Path) -> Iterator[tuple[str, Path]]:
    """The plugin's files by their name in the zip."""
    yield f"{NAME}.desktop", root / f"{NAME}.desktop"
    folder = root / NAME
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and "__pycache__" not in relative.parts and relative.parts[0] != WHEELS:
            yield f"{NAME}/{relative.as_posix()}", path


def write_zip(root: Path, wheel: Path | None, path: Path) -> Path:
    """The zip at `path`, whole or not at all; the same files are the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
            folder = zipfile.ZipInfo(f"{NAME}/")
            folder.external_attr = (0o40755 << 16) | 0x10
            archive.writestr(folder, b"")
            for name, file in plugin_files(root):
                archive.writestr(_info(name), file.read_bytes(), zipfile.ZIP_DEFLATED)
            if wheel is not None:
                # weights do not shrink, and the wheel has packed the rest
                archive.writestr(_info(f"{NAME}/{WHEELS}/{wheel.name}"), wheel.read_bytes(), zipfile.ZIP_STORED)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o100644 << 16
    return info


def krita_resources() -> Path:
    """Where this user's Krita keeps its resources."""
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or home / "AppData" / "Roaming") / "krita"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "krita"
    return Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share") / "krita"


def install(root: Path, wheel: Path | None, resources: Path) -> Path:
    """Puts the plugin into a Krita's resources, in place of an earlier one; its folder."""
    plugins = resources / "pykrita"
    plugins.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=plugins, prefix=".new-") as new:
        for name, file in plugin_files(root):
            to = Path(new) / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to)
        if wheel is not None:
            (Path(new) / NAME / WHEELS).mkdir()
            shutil.copyfile(wheel, Path(new) / NAME / WHEELS / wheel.name)
        target = plugins / NAME
        if target.exists():
            target.rename(Path(new) / "old")  # goes with the temporary folder
        (Path(new) / NAME).rename(target)
        os.replace(Path(new) / f"{NAME}.desktop", plugins / f"{NAME}.desktop")
    actions = resources / "actions"
    actions.mkdir(exist_ok=True)
    shutil.copyfile(target / f"{NAME}.action", actions / f"{NAME}.action")
    return target


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`storydiffusion package` and `storydiffusion krita install`."""
    wheel = argparse.ArgumentParser(add_help=False)
    which = wheel.add_mutually_exclusive_group()
    which.add_argument("--wheel", type=Path, metavar="FILE", help="a finished wheel of the backend")
    which.add_argument("--no-wheel", action="store_true", help="without a backend: for connecting to a running one")
    package = commands.add_parser(
        "package", parents=[wheel], help="build the zip that Krita's “Import Python Plugin from File” takes"
    )
    package.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"default: dist/{NAME}-VERSION.zip")
    package.set_defaults(run=run_package)
    krita = commands.add_parser("krita", help="install the plugin into a local Krita")
    inner = krita.add_subparsers(dest="krita_command", required=True, metavar="COMMAND")
    installing = inner.add_parser("install", parents=[wheel], help="put the plugin where this user's Krita looks")
    installing.add_argument("--resources", type=Path, metavar="DIR", help="Krita's resource folder")
    installing.set_defaults(run=run_install)


def run_package(args: argparse.Namespace) -> None:
    root = plugin_folder()
    output = args.output or Path("dist") / f"{NAME}-{__version__}.zip"
    with tempfile.TemporaryDirectory() as folder:
        path = write_zip(root, _wheel(args, root, Path(folder)), output)
    print(f"{path}: in Krita, choose Tools > Scripts > Import Python Plugin from File.")


def run_install(args: argparse.Namespace) -> None:
    root = plugin_folder()
    with tempfile.TemporaryDirectory() as folder:
        target = install(root, _wheel(args, root, Path(folder)), args.resources or krita_resources())
    print(f"{target}: in Krita, tick StoryDiffusion in Settings > Configure Krita > Python Plugin Manager.")


def _wheel(args: argparse.Namespace, root: Path, into: Path) -> Path | None:
    if args.no_wheel:
        return None
    if args.wheel is None:
        return build_wheel(root, into)
    wheel: Path = args.wheel
    if not (wheel.is_file() and wheel.name.startswith("storydiffusion-") and wheel.suffix == ".whl"):
        raise StoryDiffusionError(f"{wheel} is no wheel of this backend.", "Leave --wheel out to build one.")
    return wheel
