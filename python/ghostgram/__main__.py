"""python -m ghostgram --cmakedir | --includedir | --libdir: where C and C++ find this package's library."""

import argparse
import sys
from pathlib import Path

FOLDERS = {
    "cmakedir": ("lib/cmake/ghostgram", "the CMake package, for -Dghostgram_DIR="),
    "includedir": ("include", "where ghostgram/ghostgram.h is, for -I"),
    "libdir": ("lib", "where libghostgram.so.0 is, for -L and -Wl,-rpath"),
}


def main(arguments: list[str] | None = None) -> None:
    """Prints the folders asked for, a line each."""
    parser = argparse.ArgumentParser("python -m ghostgram", description="Where C and C++ find ghostgram's library.")
    for name, (below, what) in FOLDERS.items():
        folder = str(Path(__file__).parent / below)
        parser.add_argument(f"--{name}", dest="folders", action="append_const", const=folder, help=what)
    folders = parser.parse_args(arguments).folders or parser.error("expected one of --" + ", --".join(FOLDERS))
    for folder in folders:
        if not Path(folder).is_dir():
            sys.exit(f"{folder} is not here: this is not an installed package; `cmake --install` of a build makes one")
        print(folder)


if __name__ == "__main__":
    main()
