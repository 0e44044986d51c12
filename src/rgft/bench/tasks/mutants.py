"""Programs that differ from a right one in one place: an operator, a comparison, a constant, a name."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Sequence

#: Operator or word → what stands in its place. Comparisons that move by one case are off by one.
SWAPS = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "/", "%": "//", "**": "*", "+=": "-=", "-=": "+=", "*=": "+=",
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&": "|", "|": "&", "<<": ">>", ">>": "<<",
    "and": "or", "or": "and", "True": "False", "False": "True", "min": "max", "max": "min", "any": "all", "all": "any",
}  # fmt: skip


def mutants(prompt: str, continuation: str) -> list[str]:
    """Continuations that parse and differ from the given one in one token; everything else stays as it is written.

    Args:
        prompt: stays as it is.
        continuation: of the prompt; both together are a program.

    Raises:
        SyntaxError: they are none.
    """
    program = prompt + continuation
    tree = ast.parse(program)
    lines = [*io.StringIO(program), ""]  # the last token stands on a line of its own
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    names, read = _names(tree), _read_names(tree)
    found: dict[str, None] = {}
    for token in tokenize.generate_tokens(io.StringIO(program).readline):
        start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        if start < len(prompt):
            continue
        row, column = token.start
        is_read = (row, len(lines[row - 1][:column].encode())) in read  # trees count bytes
        for other in _others(token, names if is_read else ()):
            changed = program[:start] + other + program[end:]
            if _parses(changed):
                found[changed[len(prompt) :]] = None
    return list(found)


def _others(token: tokenize.TokenInfo, names: Sequence[str]) -> Iterator[str]:
    if token.type == tokenize.NUMBER and token.string.isdecimal():
        number = int(token.string)
        yield from (str(near) for near in (number + 1, number - 1) if near >= 0)
    elif token.string in SWAPS:
        yield SWAPS[token.string]
    elif token.string in names:
        yield names[(names.index(token.string) + 1) % len(names)]


def _names(tree: ast.AST) -> list[str]:
    """Names that the program binds itself, sorted."""
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return sorted(bound)


def _read_names(tree: ast.AST) -> set[tuple[int, int]]:
    """Lines, and columns in bytes, at which a name is read."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    return {(node.lineno, node.col_offset) for node in nodes}


def _parses(program: str) -> bool:
    try:
        ast.parse(program)
    except (SyntaxError, ValueError):
        return False
    return True
