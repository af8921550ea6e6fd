from __future__ import annotations

import ast
import re
import string
import sys
from pathlib import Path

import pytest

from storydiffusion_krita.styles import STYLES
from storydiffusion_krita.texts import tr, use_language
from storydiffusion_krita.translations import JAPANESE

FOLDER = Path(__file__).resolve().parents[2] / "storydiffusion_krita"
FILES = sorted(FOLDER.rglob("*.py"))


def told() -> set[str]:
    """Every text that the plugin says."""
    found = set(STYLES.values())
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tr"
            if call and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


def holes(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_everything_that_is_said_is_said_in_japanese_too() -> None:
    assert told() - set(JAPANESE) == set()
    assert set(JAPANESE) - told() == set(), "translated, but said nowhere"


@pytest.mark.parametrize("text", sorted(JAPANESE))
def test_a_translation_has_the_same_placeholders(text: str) -> None:
    assert holes(JAPANESE[text]) == holes(text)


def test_the_language_is_kritas() -> None:
    use_language("ja_JP")
    assert tr("Generate") == "生成"
    use_language("fr")
    assert tr("{count} panels", count=3) == "3 panels"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_plugin_imports_only_what_kritas_python_has(path: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"krita", "PyQt5", "PyQt6"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        assert {name.split(".")[0] for name in names} <= allowed


def test_only_qt_py_knows_which_qt() -> None:
    users = [path.name for path in FILES if re.search(r"(from|import) PyQt", path.read_text(encoding="utf-8"))]
    assert users == ["qt.py"]


def test_only_plugin_and_package_import_krita() -> None:
    users = [path.name for path in FILES if "import krita" in path.read_text() or "from krita" in path.read_text()]
    assert users == ["__init__.py", "plugin.py"]
