"""Aligned Markdown tables: readable as they are printed."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first `words` columns stand left, the rest, numbers, right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def join(cells: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join([*left[:words], *right[words:]])} |"

    rules = ["-" * width for width in widths[:words]]
    rules += ["-" * (width - 1) + ":" for width in widths[words:]]
    return "\n".join([join(header), join(rules), *map(join, rows)])
