"""PAD on handwritten digits: ten synthetic images, one of each class, that teach more than real ones do.

The 1,438 training images of scikit-learn's digits (8x8) are distilled; then fresh nets are trained on the result, on as
many real images and on all of them, and asked about the 359 test images. Grids of the images, curves and all results go
to a page. Killed and called again, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

import ghostgram as gg
from ghostgram import data
from ghostgram.cli.pad_tables import draw
from ghostgram.report import pad as page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=data.image_sets(), default="digits")
    parser.add_argument("--root", type=Path, help="the folder of image sets that no package has")
    parser.add_argument("--preset", default="digits-1", help="such as digits-10, fashion-1, c10-10-paper")
    parser.add_argument("--iterations", type=int, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pad-output"))
    args = parser.parse_args()
    found = data.load_images(args.data, root=args.root)
    changes = {} if args.iterations is None else {"iterations": args.iterations}
    gg.pad(
        found.train_images, found.train_labels, args.out, preset=args.preset, classes=found.classes,
        test=(found.test_images, found.test_labels), seed=args.seed, **changes,
    )  # fmt: skip
    written = page.write(args.out)
    console = Console()
    draw(page.read(args.out), console)
    console.print(f"wrote {', '.join(path.name for path in written)} to {args.out}")


if __name__ == "__main__":
    main()
