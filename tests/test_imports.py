import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "supsup": {"orchestrator", "sweeps", "ray", "optuna", "mlflow"},
    "orchestrator": {"sweeps", "optuna"},
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {file.name: imported(file) & FORBIDDEN[package] for file in files}
    assert not any(wrong.values()), wrong


def test_the_algorithm_loads_no_platform():
    modules = sorted(path.stem for path in (ROOT / "supsup").glob("*.py") if path.stem[0] != "_")
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module("supsup." + name)
print(sorted({{"ray", "optuna", "mlflow"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_loads_nothing_heavy():
    code = """
import sys
import sweeps.cli
heavy = {"torch", "ray", "mlflow", "sklearn", "matplotlib", "optuna", "scipy"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
