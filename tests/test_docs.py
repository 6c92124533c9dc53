import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_loops_of_the_documentation_work(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "python.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    assert names["bank"].stock().tasks == [range(10), range(10, 20)]
    assert names["result"].task_accuracy("h-one-shot") > 0.95
    assert names["learner"].allocated == 5


def test_links_between_documents_lead_somewhere():
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), target


def test_every_word_that_the_readme_tells_to_type_exists():
    from supsup.recipes import RECIPES
    from sweeps.cli import cli

    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:\.venv/bin/)?supsup (\S+)", text, re.MULTILINE)
    assert commands
    assert set(commands) <= set(cli.commands)
    assert set(re.findall(r"supsup run ([a-z]\S*)", text)) <= set(RECIPES)
