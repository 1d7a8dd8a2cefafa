"""The tutorials do what they say: their commands and their Python run as they stand, from an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tutorials"
# One needs an environment of its own, make test-nnunet, and test_plug_in.py reads the other as one program.
ELSEWHERE = ("nnunet.md", "plug-in.md")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(language, code, folder):
    command = {"sh": ["bash", "-euo", "pipefail", "-c", code], "python": [sys.executable, "-c", code]}[language]
    paths = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run(command, cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md") if path.name not in ELSEWHERE))
def test_every_block_of_a_tutorial_runs_in_order(page, tmp_path):
    blocks = BLOCK.findall((PAGES / page).read_text(encoding="utf-8"))
    assert blocks, f"{page} shows nothing to do"
    for language, code in blocks:
        done = run(language, code, tmp_path)
        assert done.returncode == 0, f"{page} says\n{code}\nwhich ends with\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
