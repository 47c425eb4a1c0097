"""Scored pools for tests of selection: tables, shards of them, and the selection by definition."""

import hashlib

import numpy as np
import pyarrow as pa

from ghostgram.reference.gumbel_topk import noise as reference_noise


def ids_of(names):
    """(n,) 16-byte ids, hashed as documents' are."""
    return [hashlib.blake2b(str(name).encode(), digest_size=16).digest() for name in names]


def table(ids, z, tokens=None, domains=None, **columns):
    """A table of scores; z is an array or a dict of them by reference."""
    z = z if isinstance(z, dict) else {"ref": z}
    n = len(ids)
    held = {
        "doc_id": pa.array(ids, pa.binary(16)),
        "n_tokens": pa.array(np.ones(n, np.int32) if tokens is None else tokens, pa.int32()),
        "domain": pa.array([None] * n if domains is None else list(domains), pa.string()),
    }
    held |= {f"z_{name}": pa.array(np.asarray(values, np.float32)) for name, values in z.items()}
    return pa.table(held | columns)


def pool(n, seed=0, **columns):
    """n documents of three domains with lengths from 1 to 2000 that go with their scores."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(n)
    tokens = np.clip(np.exp(rng.normal(5 + 0.3 * z, 1)), 1, 2000).astype(np.int32)
    domains = rng.choice(["web", "code", "wiki"], n, p=[0.7, 0.2, 0.1])
    return table(ids_of(range(seed * n, seed * n + n)), z * 0.7 + 0.2, tokens, domains, **columns)


def words(ids):
    return np.frombuffer(b"".join(ids), "<u8").reshape(-1, 2)


def keys_by_definition(scored, stream, temperature=1.0, sign=1):
    """Every document's key from the table of all, and the order of falling keys."""
    s = scored["z_ref"].to_numpy().astype(np.float64)
    z = (s - s.mean()) / s.std()
    first = np.ascontiguousarray(words(scored["doc_id"].to_pylist())[:, 0])
    keys = z / temperature + sign * reference_noise(first, stream)
    return keys, np.lexsort((first, -keys))


def chosen(plan):
    return plan.table["doc_id"].to_pylist()
