"""What every page is made of: one file, figures inline, no script, nothing fetched."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from .palette import css_variables


def document(title: str, body: Iterable[str]) -> str:
    """A whole page."""
    style = css_variables() + files(__package__).joinpath("report.css").read_text("utf-8")
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    page = "\n".join([f"<head>{head}</head>", "<body><main>", *body, "</main></body>"])
    return f"<!doctype html>\n<html lang='en'>\n{page}\n</html>\n"


def figure(drawing: str, alternative: str) -> str:
    """A drawing (SVG, or an image element), with words for those who do not see it."""
    return f"<figure role='img' aria-label=\"{escape(alternative)}\">{drawing}</figure>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first cell of a row is its head."""
    head = f"<thead><tr>{''.join(f'<th scope=col>{cell}</th>' for cell in heads)}</tr></thead>" if heads else ""
    lines = "".join(
        f"<tr><th scope='row'>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in rows
    )
    return f"<div class='table {kind}'><table>{head}<tbody>{lines}</tbody></table></div>"
