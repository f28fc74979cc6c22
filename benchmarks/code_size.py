"""How large is the code? Prints code lines per package, and the lengths of functions.

A code line holds at least one token that is neither a comment nor part of a docstring. The length of a function is its number
of lines without its docstring.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

import numpy as np

PACKAGE = Path(__file__).parent.parent / "embedpipe"
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_lines(node: ast.AST) -> set[int]:
    """Return the line numbers of the docstring of a module, class or function."""
    if isinstance(node, Documented) and ast.get_docstring(node) is not None:
        return set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return set()


def code_lines(source: str) -> int:
    """Return the number of code lines."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for t in tokens if t.type not in LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    return len(lines.difference(*(docstring_lines(node) for node in ast.walk(ast.parse(source)))))


def function_lengths(source: str) -> list[int]:
    """Return the number of lines of each function without its docstring."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(f.end_lineno or 0) - f.lineno + 1 - len(docstring_lines(f)) for f in functions]


def main() -> None:
    sizes: Counter[str] = Counter()
    lengths: list[int] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        sizes[path.relative_to(PACKAGE).parts[0].removesuffix(".py")] += code_lines(source)
        lengths += function_lengths(source)
    for name, count in sizes.most_common():
        print(f"{count:>7,}  {name}")
    print(f"{sizes.total():>7,}  code lines in {len(sizes) - 2} packages and modules, without __init__ and __main__")
    median, ninety, longest = np.percentile(lengths, [50, 90, 100])
    print(f"functions: {len(lengths):,}, lines: median {median:g}, 90th percentile {ninety:g}, longest {longest:g}")


if __name__ == "__main__":
    main()
