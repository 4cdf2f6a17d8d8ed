"""What the documents show is what happens: their programs are run and print what stands below them."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(("name", "num_programs"), [("streaming", 3), ("engines", 7), ("async_rl", 1)])
def test_programs_run_and_print_what_is_said(name: str, num_programs: int) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / f"{name}.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    found = 0
    for (language, program), (following, shown) in zip(blocks, [*blocks[1:], ("end", "")], strict=True):
        if language != "python":
            continue
        found += 1
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(program, names)
        if not following and not shown.startswith("client ──"):
            assert output.getvalue() == shown
    assert found == num_programs


def test_the_tests_that_prove_guarantees_are_there() -> None:
    text = (DOCS / "guarantees.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", text)
    assert len(named) == text.count("`tests/") > 15
    for path, name in named:
        *classes, last = name.split("::")
        source, indent = (DOCS.parent / path).read_text(), "    " * len(classes)
        assert re.search(rf"^{indent}(def {last}\(|{last} = )", source, re.MULTILINE), f"{path} has no {name}"
        assert all(f"\nclass {one}:" in source for one in classes), f"{path} has no {name}"
