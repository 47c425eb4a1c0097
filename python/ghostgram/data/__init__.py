"""Real text for the demos, and the documents cut from it."""

from .packages import DomainUnavailable, Package, cache_folder, fetch
from .text import domains, load_text
from .windows import corrupt, split, windows

__all__ = [
    "DomainUnavailable",
    "Package",
    "cache_folder",
    "corrupt",
    "domains",
    "fetch",
    "load_text",
    "split",
    "windows",
]
