"""What every figure is drawn on."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .._files import whole_file
from .palette import LIGHT

MILLI = 1e3  # values of single documents are read in thousandths of a nat

_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, readable aloud
    "svg.hashsalt": "ghostgram",
    "font.size": 10.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["line"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches; it is to be drawn and written inside the block, where the style holds."""
    with mpl.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1))


def save(figure: Figure, path: Path) -> None:
    """Writes a figure that stands on its own, as what its suffix says (.svg, .png), whole or not at all."""
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], facecolor=LIGHT["card"], dpi=160, metadata=metadata)


def svg(figure: Figure, name: str) -> str:
    """A figure for a page, which it takes colours and fonts from; the name keeps its ids apart from other figures'."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    # The page sets the size and describes the figure; the namespace of links is HTML's own.
    drawn = re.sub(r'^<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', drawn)
    for role, colour in LIGHT.items():
        drawn = drawn.replace(colour, f"var(--{role})")
    return drawn
