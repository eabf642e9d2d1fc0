"""Writes docs/settings.md, every setting of a job file, from the settings themselves: python tests/settings_page.py"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kvshard.runtime.config import JobConfig

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD = """# Settings of a job file

Every setting, its default and what it may be; unknown ones are refused. `scheduler.max_num_seqs` stands in the file as
`scheduler: {max_num_seqs: 64}`, on the command line as `--set scheduler.max_num_seqs=64`, and in Python as
`LLM(..., scheduler={"max_num_seqs": 64})`. Job files with comments are in [configs/](../configs/).
A row of the input may bring the settings under `sampling` itself.

| setting | default | may be | |
|---|---|---|---|
"""


def page() -> str:
    return HEAD + "".join(_rows(JobConfig, ""))


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = next((kind for kind in _kinds(field.annotation) if _is_section(kind)), None)
        if section is not None:
            yield from _rows(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        description = (field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {default} | {_values(field)} | {description} |\n"


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _values(field: FieldInfo) -> str:
    values = []
    for kind in _kinds(field.annotation):
        if get_origin(kind) is Literal:
            values += [f"`{value}`" for value in get_args(kind)]
        elif kind is type(None):
            values.append("`null`")
        else:
            values.append(_NAMES.get(get_origin(kind) or kind, str(kind)) + _bounds(field))
    return ", ".join(values)


_NAMES = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    tuple: "list",
    list: "list",
    dict: "map",
    frozenset: "list",
}


def _bounds(field: FieldInfo) -> str:
    words = []
    for bound in field.metadata:
        if isinstance(bound, Ge):
            words.append(f"from {bound.ge}")
        elif isinstance(bound, Gt):
            words.append(f"above {bound.gt}")
        elif isinstance(bound, Le):
            words.append(f"to {bound.le}")
        elif isinstance(bound, Lt):
            words.append(f"below {bound.lt}")
    return " " + " ".join(words) if words else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
