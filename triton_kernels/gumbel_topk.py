"""gumbel_topk in Triton: the noise and the keys of documents, with the bits of every other backend.

A kernel turns documents into integers that sort as their keys do; torch's radix sort does the rest, on the same stream
and with nothing read by the host. What bounds it: that sort, of all documents. See docs/gpu/gumbel_topk.md.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

LAST = tl.constexpr(2**63 - 1)  # the order of no number
LN2_HIGH, LN2_LOW = tl.constexpr(6.93147180369123816490e-01), tl.constexpr(1.90821492927058770002e-10)
# Of log(1 + f), as in core/log.h.
R0, R1 = tl.constexpr(6.666666666666735130e-01), tl.constexpr(3.999999999940941908e-01)
R2, R3 = tl.constexpr(2.857142874366239149e-01), tl.constexpr(2.222219843214978396e-01)
R4, R5 = tl.constexpr(1.818357216161805012e-01), tl.constexpr(1.531383769920937332e-01)
R6 = tl.constexpr(1.479819860511658591e-01)


@triton.jit
def log_same_bits(x):
    """core/log.h's logarithm: each operation is rounded once, if the compiler fuses none (FLAGS)."""
    shifted = x.to(tl.uint64, bitcast=True) + (0x3FF0000000000000 - 0x3FE6A09E00000000)
    k = (shifted >> 52 | 0x4330000000000000).to(tl.float64, bitcast=True) - (2.0**52 + 1023.0)
    f = ((shifted & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E00000000).to(tl.float64, bitcast=True) - 1.0
    half_square = (f * 0.5) * f
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    even = w * (w * (w * R5 + R3) + R1)
    odd = z * (w * (w * (w * R6 + R4) + R2) + R0)
    tail = s * (half_square + (even + odd)) + k * LN2_LOW
    return ((tail - half_square) + f) + k * LN2_HIGH


@triton.jit
def noise_bits(id, seed):
    """52 bits of Philox4x32-10 at counter (id, 0), as in core/philox.h: a 32-bit word in a 64-bit lane."""
    low = 0xFFFFFFFF
    c0, c1 = id & low, id >> 32
    c2, c3 = tl.zeros_like(id), tl.zeros_like(id)
    key0, key1 = seed & low, seed >> 32
    for _ in tl.static_range(10):
        p, q = (c0 & low) * 0xD2511F53, (c2 & low) * 0xCD9E8D57
        c0, c1, c2, c3 = (q >> 32) ^ c1 ^ key0, q, (p >> 32) ^ c3 ^ key1, p
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return ((c0 & low) << 32 | (c1 & low)) >> 12


@triton.jit
def gumbel_topk_orders(
    scores, ids, threshold, orders, nan_at, count, seed, temperature_bits,
    NOISY: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The order of each document's key, LAST below the threshold; and the first NaN of each program, or LAST."""
    at = tl.program_id(0).to(tl.int64) * DOCUMENTS + tl.arange(0, DOCUMENTS)
    live = at < count
    key = tl.load(scores + at, mask=live, other=0.0).to(tl.float64)
    is_nan = live & (key != key)
    if NOISY:
        id = at if ids is None else tl.load(ids + at, mask=live, other=0)
        h = noise_bits(id.to(tl.uint64, bitcast=True), tl.cast(seed, tl.int64).to(tl.uint64, bitcast=True))
        u = (h | 0x3FF0000000000000).to(tl.float64, bitcast=True) - (1.0 - 2.0**-53)
        noise = -log_same_bits(-log_same_bits(u))
        key = key / tl.cast(temperature_bits, tl.int64).to(tl.float64, bitcast=True) + noise
    bits = (key + 0.0).to(tl.int64, bitcast=True)  # -0 becomes 0
    order = ~(bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
    keep = live & (key >= tl.load(threshold))  # as NaN never is
    tl.store(orders + at, tl.where(keep, order, LAST), mask=live)
    tl.store(nan_at + tl.program_id(0), tl.min(tl.where(is_nan, at, LAST), axis=0))


# ----------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DOCUMENTS, WARPS = 1024, 4
FLAGS = {"enable_fp_fusion": False}  # or keys would differ in the last bit from those of other backends
LEAST_SPARE = 512  # gumbel_topk.h's
SIGN = -(2**63)


def orders_of(keys: torch.Tensor) -> torch.Tensor:
    """The bits of doubles as integers that rise as the doubles fall, as the kernel above makes them."""
    bits = keys.view(torch.int64)
    return ~(bits ^ ((bits >> 63) & (2**63 - 1)))


def keys_of(orders: torch.Tensor) -> torch.Tensor:
    """The doubles that orders stand for."""
    bits = ~orders
    return (bits ^ ((bits >> 63) & (2**63 - 1))).view(torch.float64)


def _document_orders(
    scores: torch.Tensor, ids: torch.Tensor | None, threshold: torch.Tensor, seed: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The orders of documents, and the smallest position of a NaN or else LAST."""
    count = scores.shape[0]
    if not count:
        return scores.new_empty(0, dtype=torch.int64), scores.new_full((), LAST.value, dtype=torch.int64)
    programs = triton.cdiv(count, DOCUMENTS)
    orders, nan_at = (scores.new_empty(n, dtype=torch.int64) for n in (count, programs))
    (bits,) = struct.unpack("<q", struct.pack("<d", temperature))
    gumbel_topk_orders[(programs,)](
        scores, ids, threshold, orders, nan_at, count, seed, bits,
        NOISY=temperature > 0, DOCUMENTS=DOCUMENTS, num_warps=WARPS, **FLAGS,
    )  # fmt: skip
    return orders, nan_at.amin()


def _smallest_repeated(ids: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether any of the first `held` ids occurs twice, and the smallest that does, as unsigned; else -1."""
    if ids.shape[0] < 2:
        return torch.zeros_like(held, dtype=torch.bool), torch.full_like(held, -1)
    ordered, place = torch.sort(ids ^ SIGN, stable=True)
    repeated = (ordered[1:] == ordered[:-1]) & (place[1:] < held) & (place[:-1] < held)
    smallest = torch.where(repeated, ordered[1:], 2**63 - 1).amin() ^ SIGN
    return repeated.any(), torch.where(repeated.any(), smallest, -1)


def run(
    scores: torch.Tensor,
    ids: torch.Tensor | None,
    keys: torch.Tensor,
    picks: torch.Tensor,
    held: torch.Tensor,
    threshold: torch.Tensor,
    fault: torch.Tensor,
    k: int,
    seed: int,
    temperature: float,
    by_position: bool,
    finish: bool,
) -> None:
    """Leaves the best k of the reservoir and the documents in the reservoir, best first; see gumbel_topk.h."""
    if scores.dtype not in DTYPES:
        raise ValueError(f"gumbel_topk: Triton takes float32, float64, bfloat16 or float16, got {scores.dtype}")
    count, capacity = scores.shape[0], keys.shape[0]
    with torch.cuda.device_of(scores):
        roomy = (count <= capacity - held) | (k <= capacity - LEAST_SPARE)
        sound = (held >= 0) & (held <= capacity) & roomy & (held == 0 if by_position else True)
        if k == 0:
            threshold.copy_(torch.where(sound, float("inf"), threshold))
        orders, nan_at = _document_orders(scores, ids, threshold, seed, temperature)
        own_picks = own_ids = torch.arange(count, device=scores.device)
        if ids is not None:
            own_ids = ids
            own_picks = own_picks if by_position else ids
        if not by_position:
            inside = torch.arange(capacity, device=scores.device) < held
            orders = torch.cat([torch.where(inside, orders_of(keys), LAST.value), orders])
            own_ids, own_picks = (torch.cat([picks, x]) for x in (own_ids, own_picks))
        if ids is not None or not by_position:  # else ids rise, and stable sorts leave them so
            by_id = torch.sort(own_ids ^ SIGN, stable=True).indices
            orders, own_ids, own_picks = orders[by_id], own_ids[by_id], own_picks[by_id]
        orders, place = torch.sort(orders, stable=True)
        own_ids, own_picks = own_ids[place], own_picks[place]

        counts = orders != LAST.value
        counts[1:] &= (orders[1:] != orders[:-1]) | (own_ids[1:] != own_ids[:-1])
        rank = counts.cumsum(0) - 1
        size = min(k, capacity, orders.shape[0])
        to = torch.where(counts & (rank < size), rank, size)  # a place beyond the end for all that is not kept
        best = [x.new_zeros(size + 1).scatter_(0, to, x)[:size] for x in (orders, own_picks, own_ids)]
        best_keys = keys_of(best[0])
        found = counts.sum().clamp(max=k).reshape(1)
        if 0 < k <= size:
            threshold.copy_(torch.where(sound & (found == k), best_keys[k - 1], threshold))
        keys[:size] = torch.where(sound, best_keys, keys[:size])
        picks[:size] = torch.where(sound, best[1], picks[:size])
        held.copy_(torch.where(sound, found, held))

        fault[0] = torch.where(sound & (nan_at != LAST.value), nan_at, -1).squeeze()
        fault[3] = (~sound).squeeze()
        repeats, id = torch.zeros_like(sound), torch.full_like(held, -1)
        if finish and (ids is not None or not by_position):
            repeats, id = _smallest_repeated(best[2], found)
        fault[1], fault[2] = (repeats & sound).squeeze(), torch.where(sound, id, -1).squeeze()
