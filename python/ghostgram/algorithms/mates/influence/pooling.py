"""Texts as chunks of tokens, and the mean over all of a text's tokens of what an encoder makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Document = list[NDArray[np.int32]]
"""The token ids of each chunk of a text, special tokens with them."""

_TEXTS_AT_ONCE = 256
_LONGEST_TOKEN = 32  # characters of text read for each token wanted: a book need not be tokenised for its first page


class Chunks(NamedTuple):
    """Some documents as an encoder reads them."""

    ids: Tensor
    """(C, T) int64, the chunks of all documents."""
    mask: Tensor
    """(C, T) int64, 1 where a token is real."""
    owners: Tensor
    """(D, C) float32, 1 where a chunk is of a document."""


def tokenised(tokenizer: Any, texts: Sequence[str], chunks: int, chunk_len: int) -> list[Document]:
    """Each text's first chunks of at most `chunk_len` tokens, every chunk with the tokenizer's special tokens.

    Of a text `32 * chunks * chunk_len` characters are read.
    """
    documents: list[Document] = []
    for i in range(0, len(texts), _TEXTS_AT_ONCE):
        some = [text[: _LONGEST_TOKEN * chunks * chunk_len] for text in texts[i : i + _TEXTS_AT_ONCE]]
        encoded = tokenizer(
            some,
            truncation=True,
            max_length=chunk_len,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ours: list[Document] = [[] for _ in some]
        for owner, ids in zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True):
            if ids and len(ours[owner]) < chunks:
                ours[owner].append(np.array(ids, np.int32))
        documents += ours
    return documents


def in_batches(documents: Sequence[Document], tokens: int) -> Iterator[list[int]]:
    """Rows of documents of like length, by batches of at most `tokens` tokens, padding counted, or of one document."""
    longest = [max((len(chunk) for chunk in document), default=0) for document in documents]
    batch, chunks = list[int](), 0
    for row in sorted(range(len(documents)), key=lambda row: (longest[row], len(documents[row]))):
        if batch and (chunks + len(documents[row])) * longest[row] > tokens:
            yield batch
            batch, chunks = [], 0
        batch.append(row)
        chunks += len(documents[row])
    if batch:
        yield batch


def padded(documents: Sequence[Document], device: torch.device) -> Chunks:
    """Chunks of some documents, padded to the longest with token 0, which the mask hides."""
    chunks = [chunk for document in documents for chunk in document]
    lengths = np.array([len(chunk) for chunk in chunks], np.int64)
    shape = len(chunks), int(lengths.max(initial=0))
    ids, mask = np.zeros(shape, np.int64), np.arange(shape[1]) < lengths[:, None]
    ids[mask] = np.concatenate([np.empty(0, np.int32), *chunks])
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    one_hot = np.arange(len(documents))[:, None] == owners
    return Chunks(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask.astype(np.int64)).to(device),
        torch.from_numpy(one_hot.astype(np.float32)).to(device),
    )


def zero_head(width: int, heads: int) -> nn.Linear:
    """A head that says 0, the mean of the labels: the best that is known before the first step. It draws no numbers."""
    head: nn.Linear = nn.utils.skip_init(nn.Linear, width, heads)  # type: ignore[no-untyped-call]
    for p in head.parameters():
        nn.init.zeros_(p)
    return head


class Pooled(nn.Module):
    """`head(dropout(mean of the encoder's last states over the real tokens of all chunks))`."""

    encoder: Any

    def __init__(self, encoder: nn.Module, heads: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        if getattr(encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # of the first token alone: nothing here asks for it
        self.dropout = nn.Dropout(dropout)
        self.head = zero_head(self.encoder.config.hidden_size, heads)

    def embed(self, chunks: Chunks) -> Tensor:
        """(D, d) float32 means; 0 for a document without tokens."""
        if not chunks.ids.numel():
            return self.head.weight.new_zeros(len(chunks.owners), self.head.in_features)
        states = self.encoder(input_ids=chunks.ids, attention_mask=chunks.mask).last_hidden_state.float()
        with torch.autocast(states.device.type, enabled=False):
            sums = chunks.owners @ (states * chunks.mask[:, :, None]).sum(1)
            counts = chunks.owners @ chunks.mask.sum(1).float()
            means: Tensor = sums / counts.clamp(min=1)[:, None]
            return means

    def forward(self, chunks: Chunks) -> Tensor:
        """(D, R) z-scores, float32."""
        pooled = self.dropout(self.embed(chunks))
        with torch.autocast(pooled.device.type, enabled=False):
            scores: Tensor = self.head(pooled)
            return scores
