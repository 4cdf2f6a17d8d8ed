"""What docs/streaming.md shows is what happens."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

DOCUMENT = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text()


def test_its_programs_run_and_print_what_it_says() -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    programs = [content for language, content in blocks if language == "python"]
    assert len(programs) == 3
    names: dict[str, Any] = {}
    printed = []
    for program in programs:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(program, names)
        printed.append(output.getvalue())
    [shown] = [content for language, content in blocks if not language and content.startswith("tensor")]
    assert printed[0] == shown
