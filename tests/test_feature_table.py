"""docs/features.md is held against the tests: what is missing, skipped or not as it says fails the run."""

from pathlib import Path

import pytest
from feature_table import Claim, find_problems, read_claims

PAGE = Path(__file__).parent.parent / "docs" / "features.md"
TEMPLATE = """
| feature | one | two |
|---|---|---|
| windows | {one} | {two} |

Text.

| name | test |
|---|---|
| `plain` | `test_it.py::test_plain` |
| `sizes` | `test_it.py::test_sizes` |
"""
TESTS = """
import pytest

def test_plain():
    pass

@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sizes(size):
    if size == 2:
        pytest.skip("no room")

@pytest.mark.skip
def test_skipped():
    pass
"""
CONFTEST = """
from pathlib import Path
from feature_table import FeatureTable

def pytest_configure(config):
    config.pluginmanager.register(FeatureTable(config, Path("page.md").resolve()))
"""


def test_the_page_can_be_read() -> None:
    claims = read_claims(PAGE.read_text(encoding="utf-8"))
    assert len(claims) > 100
    for claim in claims:
        assert (PAGE.parent.parent / claim.node_id.partition("::")[0]).is_file(), claim


def test_cells() -> None:
    page = TEMPLATE.format(one="`plain`, `sizes[2-a b]` (slow)", two="no test: too dear")
    assert read_claims(page) == [
        Claim("test_it.py::test_plain", False),
        Claim("test_it.py::test_sizes[2-a b]", True),
    ]


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ("`plain` `sizes`", "", "windows: '' names no test and does not say why"),
        ("`plain` `sizes`", "later", "names no test"),
        ("`plain` `other`", "`sizes`", "windows: other is not in the table of tests"),
        ("`plain`", "`plain`", "no feature names sizes"),
        ("`plain` | `sizes`", "`plain`", "as many cells in every row"),
    ],
)
def test_pages_that_say_too_little(one: str, two: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_claims(TEMPLATE.format(one=one, two=two))


@pytest.mark.parametrize(
    ("claim", "slow_ran", "problem"),
    [
        (Claim("passed", False), False, None),
        (Claim("slow", True), False, None),
        (Claim("slow", True), True, "slow was not run"),
        (Claim("slow", False), False, "slow is marked slow"),
        (Claim("passed", True), True, "passed is not marked slow"),
        (Claim("skipped", False), False, "skipped was skipped"),
        (Claim("failed", False), True, "failed was failed"),
        (Claim("left out", False), False, "left out was not run"),
        (Claim("missing", True), False, "missing does not exist"),
    ],
)
def test_claims(claim: Claim, slow_ran: bool, problem: str | None) -> None:
    is_slow = {"passed": False, "slow": True, "skipped": False, "failed": False, "left out": False}
    outcomes = {name: name for name in ("passed", "skipped", "failed")}
    found = find_problems([claim, claim], is_slow, outcomes, slow_ran=slow_ran)
    assert found == ([] if problem is None else [problem])


@pytest.mark.parametrize(
    ("arguments", "one", "code", "said"),
    [
        ([], "`plain` `sizes[1]`", 0, None),
        ([], "`plain` `sizes[2]` (slow)", 0, None),
        (["-m", ""], "`plain` `sizes[2]` (slow)", 1, r"test_it.py::test_sizes\[2\] was skipped"),
        ([], "`plain` `sizes[3]`", 1, r"test_it.py::test_sizes\[3\] does not exist"),
        ([], "`plain`", 1, "no feature names sizes"),
        (["-k", "plain"], "`plain` `sizes[3]`", 0, None),
        (["test_it.py"], "`plain` `sizes[3]`", 0, None),
    ],
)
def test_a_run(
    arguments: list[str], one: str, code: int, said: str | None, pytester: pytest.Pytester
) -> None:
    pytester.makeini(
        "[pytest]\ntestpaths = .\nmarkers = slow\naddopts = -m 'not slow' -p no:hypothesispytest"
    )
    pytester.makepyfile(conftest=CONFTEST, test_it=TESTS)
    (pytester.path / "page.md").write_text(TEMPLATE.format(one=one, two="no test: too dear"))
    result = pytester.runpytest_inprocess(*arguments)
    assert result.ret == code
    if said is not None:
        result.stdout.re_match_lines([said])
