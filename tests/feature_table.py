"""Holds docs/features.md against the tests that ran: a pytest plugin.

The page's first table has a feature a row, and in each cell the tests that show it, or why there is none. A test goes by a
short name with its parameters, as `same[3-auto]`; the page's second table gives each name the id of a test. A test marked
slow stands there as `kill[ray]` (slow).

When all tests of the checkout are run (`make test`, `make test-all`), a named test must exist, be marked slow as the page
says, and have passed; those marked slow only where slow ones were not left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

NO_TEST = ("no test: ", "not applicable: ")
_NAMED = re.compile(r"`(\w+)(\[[^`]*\])?`( \(slow\))?")
_DEFINED = re.compile(r"`(\w+)`")
_NODE = re.compile(r"`([^`]+::\w+)`")


@dataclass(frozen=True)
class Claim:
    """A test that the page names."""

    node_id: str
    is_slow: bool


def read_claims(page: str) -> list[Claim]:
    """The tests named in the features' table. Raises ValueError where the page is not as it should be."""
    features, tests = _tables(page)
    nodes: dict[str, str] = {}
    for cells in tests:
        name, node = _DEFINED.fullmatch(cells[0]), _NODE.fullmatch(cells[1])
        if name is None or node is None or name[1] in nodes:
            raise ValueError(f"{' | '.join(cells)}: expected a new `name` and the `id` of a test")
        nodes[name[1]] = node[1]
    claims, used = [], set()
    for cells in features:
        for cell in cells[1:]:
            named = _NAMED.findall(cell)
            if not named and not cell.startswith(NO_TEST):
                raise ValueError(f"{cells[0]}: {cell!r} names no test and does not say why")
            for name, parameters, slow in named:
                if name not in nodes:
                    raise ValueError(f"{cells[0]}: {name} is not in the table of tests")
                used.add(name)
                claims.append(Claim(nodes[name] + parameters, bool(slow)))
    if unused := nodes.keys() - used:
        raise ValueError(f"no feature names {', '.join(sorted(unused))}")
    return claims


def _tables(page: str) -> list[list[list[str]]]:
    """Rows of cells of the page's two tables, their heads left out."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in page.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
        inside = True
        tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    if len(tables) != 2 or any(len({len(cells) for cells in table}) != 1 for table in tables):
        raise ValueError("expected two tables, each with as many cells in every row")
    return [table[2:] for table in tables]


def find_problems(
    claims: list[Claim], is_slow: dict[str, bool], outcomes: dict[str, str], *, slow_ran: bool
) -> list[str]:
    """What is not as the page says.

    is_slow: by node id, of all tests that were found; outcomes: passed, skipped or failed, of those that ran.
    """
    problems = []
    for claim in claims:
        if claim.node_id not in is_slow:
            problems.append(f"{claim.node_id} does not exist")
        elif claim.is_slow != is_slow[claim.node_id]:
            problems.append(f"{claim.node_id} is {'not ' if claim.is_slow else ''}marked slow")
        elif (slow_ran or not claim.is_slow) and outcomes.get(claim.node_id) != "passed":
            problems.append(f"{claim.node_id} was {outcomes.get(claim.node_id, 'not run')}")
    return list(dict.fromkeys(problems))


class FeatureTable:
    """The plugin. Says nothing when only some tests are asked for."""

    def __init__(self, config: pytest.Config, page: Path) -> None:
        options = config.option
        only_some = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or options.keyword
        self._page = page
        self._applies = not only_some and options.markexpr in ("", "not slow") and not options.collectonly
        self._slow_ran = options.markexpr == ""
        self._is_slow: dict[str, bool] = {}
        self._outcomes: dict[str, str] = {}
        self._lines: list[str] = []

    @pytest.hookimpl(tryfirst=True)  # before any are deselected
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._is_slow = {item.nodeid: item.get_closest_marker("slow") is not None for item in items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self._outcomes.get(report.nodeid, "passed")
        self._outcomes[report.nodeid] = report.outcome if before == "passed" else before

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not self._applies or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        try:
            claims = read_claims(self._page.read_text(encoding="utf-8"))
        except ValueError as error:
            self._lines = [str(error)]
        else:
            self._lines = find_problems(claims, self._is_slow, self._outcomes, slow_ran=self._slow_ran)
        if self._lines:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._lines:
            terminalreporter.section(f"{self._page.name} is not what the tests show", red=True)
        for line in self._lines:
            terminalreporter.line(line)
