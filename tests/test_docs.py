"""The pages name files and settings that exist."""

import re
from pathlib import Path

import pytest
import settings_page
import yaml

from kvshard.runtime.config import parse_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)+/?)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
MADE = ("outputs/", "dist/", "shared/")  # not in the repository


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = [name for name in PATH.findall(text) if not name.startswith(MADE)]
    missing = [name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()]
    missing += [name for name in LINK.findall(text) if not (page.parent / name).exists()]
    assert not missing


def test_request_flow_names_files() -> None:
    text = (ROOT / "docs/request-flow.md").read_text(encoding="utf-8")
    assert len(set(PATH.findall(text))) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_job_files_in_pages_are_valid(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        parse_config(yaml.safe_load(block), page.name)


def test_the_page_of_settings_is_that_of_the_settings() -> None:
    told = "write it anew: python tests/settings_page.py"
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), told
