"""The extension module: what is the same in every build. Kernels are looked up by name, see `_dispatch`."""

from typing import Any

cpu: Any
cuda: Any
cuda_state: str
isas: tuple[str, ...]

def isa() -> str: ...
def num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
