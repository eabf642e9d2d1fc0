"""The parts' files as one page of tables, and whether every row of them is there."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

PAGE = "README.md"
CEILINGS = ("copy", "product")
Record = dict[str, Any]


def read(folder: Path) -> list[Record]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def write(folder: Path) -> Path:
    """The page of all parts that lie in the folder."""
    records = read(folder)
    page = folder / PAGE
    page.write_text("\n\n".join(["# GPU benchmarks", *map(section, records)]) + "\n", encoding="utf-8")
    return page


def section(part: Record) -> str:
    machine, versions = part["machine"], part["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [
        f"## {part['benchmark']}",
        "",
        f"{machine['gpu'] or machine['processor']}; {known}; {part['date']}",
    ]
    if part["dry"]:
        lines += ["", "**A dry run on the CPU, with tiny shapes: the figures mean nothing.**"]
    lines += [
        "",
        "| case | variant | median us | p10 - p90 | rate | of the ceiling | remark |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [line(row, part["rows"]) for row in part["rows"]]
    if part["targets"]:
        lines += [
            "",
            "| target | bound | measured | |",
            "|---|---|---|---|",
            *map(target_line, part["targets"]),
        ]
    return "\n".join(lines)


def line(row: Record, rows: list[Record]) -> str:
    if not row["samples_us"]:
        return f"| {row['case']} | {row['variant']} | {escaped(row['note'])} | | | | |"
    ordered = sorted(row["samples_us"])
    count = len(ordered)
    spread = f"{ordered[count // 10]:.1f} - {ordered[count * 9 // 10]:.1f}" if count > 1 else ""
    rate, share = "", ""
    if row["amount"]:
        per_second = row["amount"] / median(ordered) * 1e6
        rate = (
            f"{per_second / 1e9:.0f} GB/s" if row["unit"] == "bytes" else f"{per_second / 1e12:.1f} TFLOP/s"
        )
        share = share_of_ceiling(row, rows)
    figures = f"{median(ordered):.1f} | {spread} | {rate} | {share} | {escaped(row['remark'])}"
    return f"| {row['case']} | {row['variant']} | {figures} |"


def share_of_ceiling(row: Record, rows: list[Record]) -> str:
    """Of the copy or product measured in the same turns; the median over the turns."""
    for other in rows:
        if other["case"] == row["case"] and other["variant"] in CEILINGS and other["samples_us"]:
            if other is row:
                return "the ceiling"
            times = zip(other["samples_us"], row["samples_us"], strict=False)
            ratio = median(ceiling / own for ceiling, own in times)
            return f"{100 * ratio * row['amount'] / other['amount']:.0f} %"
    return ""


def target_line(target: Record) -> str:
    sign = ">=" if target["at_least"] else "<="
    figure = target["figure"]
    if figure is None:
        return f"| {target['claim']} | {sign} {target['bound']:g} | not measured | |"
    met = figure >= target["bound"] if target["at_least"] else figure <= target["bound"]
    return f"| {target['claim']} | {sign} {target['bound']:g} | {figure:.2f} | {'met' if met else 'missed'} |"


def escaped(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def faults(folder: Path, parts: list[str]) -> list[str]:
    """What a dry run must not leave: parts without a file, and rows that failed or did not run."""
    by_name = {record["benchmark"]: record for record in read(folder) if record["benchmark"] in parts}
    found = [f"{name}: no file" for name in parts if name not in by_name]
    for name, record in by_name.items():
        if not record["rows"]:
            found.append(f"{name}: no rows")
        for row in record["rows"]:
            if not row["samples_us"] and not row["note"].startswith("not here: "):
                found.append(f"{name}: {row['case']}: {row['variant']}: {row['note']}")
    return found
