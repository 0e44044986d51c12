"""Tables that are printed, or put into a document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Update = Annotated[Path | None, typer.Option(help="Markdown file whose marked part is replaced")]


def put(text: str, update: Path | None) -> None:
    """Prints Markdown, or makes it the marked part of a document."""
    from rgft.bench import table

    if update is None:
        typer.echo(text)
    else:
        table.update(update, text)
