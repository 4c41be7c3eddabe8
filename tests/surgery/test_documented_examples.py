"""The examples on the page about surgery run, one after the other, and say what the page says."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "surgery.md").read_text()


def test_the_examples_run_in_order(capsys):
    space: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        exec(compile(code, "docs/surgery.md", "exec"), space)
    said = capsys.readouterr().out
    assert "Constraints(parts=1, minimum=16, multiple_of=8)" in said
    assert "Scatter(4 of 16, dim=1) Gather(8 of 16, dim=1)" in said
