"""Every Python block of the documentation runs, page by page, in order; functions called `test_...` in it too."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SKIP = re.compile(r"<!-- not run: \S.* -->")


def blocks(text):
    """(line number of the code, code) of each ```python block that no comment `<!-- not run: reason -->` precedes."""
    lines = text.splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        if start is None and line.startswith("```python"):
            start = number + 1
        elif start is not None and line == "```":
            before = "\n".join(lines[: start - 1]).rstrip().rpartition("\n")[2]
            if not SKIP.fullmatch(before):
                found.append((start + 1, "\n".join(lines[start:number])))
            start = None
    if start is not None:
        raise ValueError(f"the block in line {start} does not end")
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text())], ids=lambda page: page.stem)
def test_blocks_run(page):
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    for line, code in blocks(page.read_text()):
        # Blank lines in front give errors the line numbers of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    for name, value in list(namespace.items()):
        if name.startswith("test_"):
            value()


def test_every_guide_has_blocks():
    assert {page.stem for page in PAGES if blocks(page.read_text())} >= {
        "abnormal-events",
        "attend-infer-repeat",
        "boundary-trees",
        "core",
        "crf",
        "deconvolution",
        "decoupled",
        "deep-clustering",
        "deploying",
        "estimators",
        "getting-started",
        "gradients",
        "halting",
        "index",
        "kmeans",
        "l0",
        "layer-report",
        "learned-pde",
        "lista",
        "lowrank",
        "own-step",
        "sc2net",
        "seeded-diffusion",
        "segmentation",
        "shrinkage",
        "tnrd",
        "scaling-out",
        "sketches",
        "training",
        "which-lista",
    }


def test_the_step_is_that_of_the_readme_and_the_example():
    """Three copies of one class, each where a reader needs it: they must not drift apart."""
    root = DOCS.parent
    pattern = re.compile(r"^class State\(.*?(?=\n\n\n(?!class TotalVariation)|\n```)", re.MULTILINE | re.DOTALL)
    readme, page, example = (
        pattern.search((root / path).read_text()).group()
        for path in ("README.md", "docs/own-step.md", "examples/own_algorithm.py")
    )
    assert "class TotalVariation" in readme
    assert page == readme
    assert example == readme


def test_blocks_are_found_and_skipped():
    text = "```python\na = 1\n```\n\n<!-- not run: needs two machines -->\n```python\nb = 2\n```\n```bash\nls\n```\n"
    assert blocks(text) == [(2, "a = 1")]
    with pytest.raises(ValueError, match="line 1"):
        blocks("```python\na = 1\n")
