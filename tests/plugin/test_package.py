from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from storydiffusion import package
from storydiffusion.cli import main
from storydiffusion.errors import StoryDiffusionError

NAME = package.NAME


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "storydiffusion-0.1.0-py3-none-any.whl"
    path.write_bytes(b"wheel")
    return path


def test_kritas_importer_finds_everything_it_looks_for(tmp_path: Path, wheel: Path) -> None:
    path = package.write_zip(package.plugin_folder(), wheel, tmp_path / "out" / "plugin.zip")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert f"{NAME}/" in names, "without a directory entry the importer finds no plugin"
        assert f"X-KDE-Library={NAME}" in archive.read(f"{NAME}.desktop").decode()
        assert {f"{NAME}/__init__.py", f"{NAME}/{NAME}.action", f"{NAME}/Manual.html"} <= set(names)
        assert archive.read(f"{NAME}/backend/{wheel.name}") == b"wheel"
        assert all(name == f"{NAME}.desktop" or name.startswith(f"{NAME}/") for name in names)
        assert not [name for name in names if "__pycache__" in name]
        assert archive.testzip() is None
    assert list(path.parent.iterdir()) == [path]


def test_the_same_files_are_the_same_zip(tmp_path: Path, wheel: Path) -> None:
    one = package.write_zip(package.plugin_folder(), wheel, tmp_path / "1.zip").read_bytes()
    assert package.write_zip(package.plugin_folder(), wheel, tmp_path / "2.zip").read_bytes() == one


def test_installing_replaces_an_earlier_plugin_and_nothing_else(tmp_path: Path, wheel: Path) -> None:
    other = tmp_path / "pykrita" / "other" / "__init__.py"
    old = tmp_path / "pykrita" / NAME / "old.py"
    for path in (other, old):
        path.parent.mkdir(parents=True)
        path.write_text("")
    assert main(["krita", "install", "--wheel", str(wheel), "--resources", str(tmp_path)]) == 0
    assert other.exists()
    assert not old.exists()
    assert (tmp_path / "pykrita" / NAME / "backend" / wheel.name).exists()
    assert (tmp_path / "pykrita" / f"{NAME}.desktop").exists()
    assert (tmp_path / "actions" / f"{NAME}.action").exists()
    assert sorted(path.name for path in (tmp_path / "pykrita").iterdir()) == ["other", NAME, f"{NAME}.desktop"]


def test_the_command_builds_the_zip(tmp_path: Path) -> None:
    output = tmp_path / "plugin.zip"
    assert main(["package", "--no-wheel", "-o", str(output)]) == 0
    assert zipfile.is_zipfile(output)


def test_a_file_that_is_no_wheel_of_ours_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(b"")
    assert main(["package", "--wheel", str(other), "-o", str(tmp_path / "x.zip")]) == 1
    assert "no wheel" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()


def test_outside_a_checkout_a_wheel_has_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(StoryDiffusionError, match="checkout"):
        package.build_wheel(tmp_path, tmp_path)
