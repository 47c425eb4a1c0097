"""libghostgram through ctypes: structs as ghostgram.h declares them, and ops called with what a room's kernel takes."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ghostgram import _C, _arrays

HEADER = Path(__file__).parents[1] / "csrc/include/ghostgram/ghostgram.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
CONSTANTS = {name: int(value) for name, value in re.findall(r"GHOSTGRAM_(\w+)(?: =)? (\d+)", TEXT)}
SCALARS = {
    **{f"{kind}_t": getattr(ctypes, f"c_{kind}") for kind in ("int32", "int64", "uint32", "uint64")},
    **{"size_t": ctypes.c_size_t, "double": ctypes.c_double},
    **dict.fromkeys(("ghostgram_dtype", "ghostgram_project_kind"), ctypes.c_int32),
}
STRUCTS: dict[str, Any] = {}
"""Every struct of the header by its name there: pointers are void pointers, so that any address can be given."""

for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", TEXT, flags=re.DOTALL):
    fields = []
    for line in filter(None, (line.strip().removeprefix("const ") for line in body.split(";"))):
        kind, _, names = line.partition(" ")
        known = STRUCTS.get(kind) or SCALARS.get(kind, ctypes.c_void_p)
        fields += [(x.strip(" *"), ctypes.c_void_p if "*" in x else known) for x in names.split(",")]
    STRUCTS[name] = type(name, (ctypes.Structure,), {"_fields_": fields})

OPS = [name.removeprefix("ghostgram_").removesuffix("_args") for name in STRUCTS if name.endswith("_args")]


def library() -> Path:
    """The library that this process has its kernels from."""
    assert _C.isa()
    with open("/proc/self/maps") as maps:
        return next(Path(line.split()[-1]) for line in maps if "libghostgram.so" in line)


def load(path: Path) -> ctypes.CDLL:
    """The functions of a library; those of kernels that it lacks fail when they are called."""
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    lib = ctypes.CDLL(str(path), handle=dlopen(os.fsencode(path), os.RTLD_LAZY))
    for name in re.findall(r"const char \*(ghostgram_\w+)\(", TEXT):
        getattr(lib, name).restype = ctypes.c_char_p
    for op in OPS:
        args = ctypes.POINTER(STRUCTS[f"ghostgram_{op}_args"])
        getattr(lib, f"ghostgram_{op}").argtypes = [args]
        getattr(lib, f"ghostgram_{op}_cuda_workspace").argtypes = [args, ctypes.POINTER(ctypes.c_size_t)]
        getattr(lib, f"ghostgram_{op}_cuda").argtypes = [args, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return lib


def dtype(x: Any) -> int:
    """GHOSTGRAM_FLOAT32 and so on."""
    return CONSTANTS[_arrays.dtype_name(x).upper()]


def at(x: Any) -> int | None:
    """The address of a tensor, or of none."""
    return None if x is None else x.data_ptr()


def fields_of(op: str, *args: Any) -> tuple[dict[str, Any], Any]:
    """The fields of an op's struct for what its room's kernel takes, and what must live while it is used."""
    return globals()[f"_{op}"](*args)


def struct(op: str, fields: dict[str, Any]) -> Any:
    """The struct of an op."""
    kind = STRUCTS[f"ghostgram_{op}_args"]
    return kind(struct_size=ctypes.sizeof(kind), **fields)


def runner(lib: ctypes.CDLL, op: str) -> Callable[..., None]:
    """The CPU kernel of an op as _dispatch calls it, through the library's door for C."""

    def run(*args: Any) -> None:
        fields, _alive = fields_of(op, *args)
        status = getattr(lib, f"ghostgram_{op}")(struct(op, fields))
        assert status == CONSTANTS["OK"], lib.ghostgram_last_error()

    return run


def _layer(a, b):
    sizes = {"samples": a.shape[0], "tokens": a.shape[1], "d": a.shape[2], "p": b.shape[2]}
    return {"dtype": dtype(a)} | sizes | _side(a, b)


def _side(a, b):
    strides = {"a_sample": a.stride(0), "a_token": a.stride(1), "b_sample": b.stride(0), "b_token": b.stride(1)}
    return {"a": at(a), "b": at(b)} | strides


def _directions(D):
    if D is None:
        return {}
    strides = {"D_direction": D.stride(0), "D_row": D.stride(1)}
    return {"D": at(D), "directions": D.shape[0], "direction_dtype": dtype(D)} | strides


def _grad_stats(a, b, D, weight_grad, norms2, dots, accumulate):
    outputs = {"weight_grad": at(weight_grad), "norms2": at(norms2), "dots": at(dots), "accumulate": accumulate}
    return _layer(a, b) | _directions(D) | outputs | {"weight_grad_row": weight_grad.stride(0)}, None


def _grad_gram(a, b, a2, b2, out):
    side = STRUCTS["ghostgram_grad_gram_side"]
    left = side(samples=a.shape[0], tokens=a.shape[1], **_side(a, b))
    right = None if a2 is None else side(samples=a2.shape[0], tokens=a2.shape[1], **_side(a2, b2))
    fields = {"dtype": dtype(a), "d": a.shape[2], "p": b.shape[2], "left": left, "diagonal": out.ndim == 1}
    fields |= {"right": right and ctypes.addressof(right), "out": at(out), "out_row": out.stride(0)}
    return fields, right


def _embedding_stats(ids, b, D, norms2, dots, padding_idx):
    fields = dict(zip(("samples", "tokens", "features"), b.shape, strict=True)) | _directions(D)
    fields |= {"dtype": dtype(b), "id_dtype": dtype(ids), "rows": 0 if D is None else D.shape[1]}
    fields |= {"ids": at(ids), "id_sample": ids.stride(0), "id_token": ids.stride(1), "norms2": at(norms2)}
    fields |= {"b": at(b), "b_sample": b.stride(0), "b_token": b.stride(1), "dots": at(dots)}
    return fields | {"has_padding_idx": padding_idx >= 0, "padding_idx": padding_idx}, None


def _affine_stats(b, x, mean, rstd, D_weight, D_bias, *rest):
    (weight_grad, bias_grad, weight_norms2, bias_norms2, weight_dots, bias_dots), channels_first = rest[:-1], rest[-1]

    def part(D, grad, norms2, dots):
        directions = {} if D is None else {"D": at(D), "directions": D.shape[0], "D_direction": D.stride(0)}
        return STRUCTS["ghostgram_affine_part"](grad=at(grad), norms2=at(norms2), dots=at(dots), **directions)

    samples, rows, columns = b.shape
    tokens, features = (columns, rows) if channels_first else (rows, columns)
    fields = {"dtype": dtype(b), "channels_first": channels_first}
    fields |= {"samples": samples, "tokens": tokens, "features": features}
    for name, array in {"b": b, "x": x}.items():
        if array is not None:
            fields |= {name: at(array), f"{name}_sample": array.stride(0), f"{name}_row": array.stride(1)}
    for name, array in {"mean": mean, "rstd": rstd}.items():
        if array is not None:
            fields |= {name: at(array), f"{name}_sample": array.stride(0), f"{name}_step": array.stride(1)}
            fields["groups"] = array.shape[1]
    weight = part(D_weight, weight_grad, weight_norms2, weight_dots) if x is not None else part(None, None, None, None)
    return fields | {"weight": weight, "bias": part(D_bias, bias_grad, bias_norms2, bias_dots)}, None


def _gumbel_topk(scores, ids, keys, picks, held, threshold, fault, k, seed, temperature, by_position, finish):
    fields = {"dtype": dtype(scores), "count": len(scores), "capacity": len(keys), "k": k, "seed": seed}
    arrays = {"scores": scores, "ids": ids, "keys": keys, "picks": picks}
    arrays |= {"held": held, "threshold": threshold, "fault": fault}
    fields |= {"temperature": temperature, "by_position": by_position, "finish": finish}
    return fields | {name: at(x) for name, x in arrays.items()}, None


def _grad_project(a, b, P_out, P_in, out, kind, nonzeros, seed, layer):
    fields = _layer(a, b) | {"kind": CONSTANTS[kind.upper()], "seed": seed, "layer": layer, "out": at(out)}
    if kind == "sparse":
        return fields | {"buckets": out.shape[1], "nonzeros": nonzeros}, None
    for name, P in {"P_out": P_out, "P_in": P_in}.items():
        fields |= {} if P is None else {name: at(P), f"{name}_dtype": dtype(P), f"{name}_row": P.stride(0)}
    return fields | {"k_out": out.shape[1], "k_in": out.shape[2]}, None


def _softmax_stats(logits, labels, loss, el2n, entropy, max_probability, bad_row, ignore_index):
    fields = dict(zip(("samples", "tokens", "classes"), logits.shape, strict=True))
    fields |= {"dtype": dtype(logits), "label_dtype": dtype(labels)}
    fields |= {"has_ignore_index": 1, "ignore_index": ignore_index}
    for name, x in {"logit": logits, "label": labels}.items():
        fields |= {f"{name}s": at(x), f"{name}_sample": x.stride(0), f"{name}_token": x.stride(1)}
    outputs = {"loss": loss, "el2n": el2n, "entropy": entropy, "max_probability": max_probability, "bad_row": bad_row}
    return fields | {name: at(x) for name, x in outputs.items()}, None


def _trajectory_match(student, start, target, mask, loss_gradient, loss, totals, gradient, weights, first):
    tensor = STRUCTS["ghostgram_trajectory_tensor"]
    lists = {"student": student, "start": start, "target": target, "mask": mask, "gradient": gradient}
    rows = [
        tensor(
            size=student[i].numel(),
            weight=1 if weights is None else weights[i],
            **{name: at(given[i]) for name, given in lists.items() if given is not None},
        )
        for i in range(len(student))
    ]
    table = (tensor * len(rows))(*rows)
    fields = {"dtype": dtype(student[0]), "count": len(rows), "tensors": ctypes.addressof(table), "first": first}
    fields |= {"measure": start is not None, "gradient": gradient is not None, "loss": at(loss), "totals": at(totals)}
    fields |= {"mask_dtype": 0 if mask is None else dtype(mask[0]), "loss_gradient": at(loss_gradient)}
    return fields, table


def _adam_dots(a, b, clip, m, v, D, out, *scalars):
    fields = _layer(a, b) | _directions(D) | {"clip": at(clip), "m": at(m), "v": at(v), "out": at(out)}
    fields |= {"moment_dtype": dtype(m), "m_row": m.stride(0), "v_row": v.stride(0)}
    return fields | dict(zip(("eta", "beta1", "beta2", "eps", "bc1", "bc2"), scalars, strict=True)), None
