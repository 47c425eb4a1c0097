"""Influence from any encoder of Hugging Face: chunks of a text through it, the mean over tokens, one linear head."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ghostgram.algorithms.mates.influence.finetune import Recipe, Training, run
from ghostgram.algorithms.mates.influence.pooling import Document, Pooled, tokenised, zero_head
from ghostgram.algorithms.mates.influence.targets import Job

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_OF_THE_FILE = {"transformers_version", "dtype", "torch_dtype", "architectures"}  # not of what the model computes


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, and no warning that a pooler, which none of ours has, is not in the file."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _loaded(name: str | Path) -> nn.Module:
    from transformers import AutoModel

    with torch.random.fork_rng([]):  # numbers are drawn for weights that are not in the file
        model: nn.Module = AutoModel.from_pretrained(name).float()
    return model


class HFEncoder:
    """An encoder of Hugging Face with a regression head, fine-tuned on influence.

    A text is cut into at most `chunks` chunks of `chunk_len` tokens; each goes through the encoder by itself, the last
    states of all real tokens of all chunks are averaged, and `Linear(d, R)` after a dropout gives z-scores. Trained by
    AdamW on the mean squared error over labels, with the gradient's norm clipped to 1 and a learning rate that decays
    linearly to 0; the weights that ranked the held-out documents best are kept.

    Args:
        model: A name or folder that `AutoModel.from_pretrained` knows, or a model to copy.
        tokenizer: A fast tokenizer. None: the one of that name.
        chunks: Of a text, at most. For encoders with long contexts, 1.
        chunk_len: Tokens of a chunk, special ones with them.
        dropout: Before the head; inside the encoder its own counts.
        device: "auto": CUDA where there is one.
        recipe: Fields of `Recipe`: epochs, batch, lr, weight_decay, evaluations, tokens_at_once, dtype,
            checkpoint_seconds.

    Raises:
        ValueError: Sizes below 1, chunks longer than the encoder's positions, an unknown dtype.
        TypeError: A model object without a tokenizer, or a tokenizer that is not fast.

    Cost:
        With P weights: 6 P FLOPs a token and epoch, 2 P for each of the held-out share's evaluations, 2 P to score.

    Source:
        arXiv 2406.06046, Section 3.2.
    """

    kind: ClassVar[str] = "hf"

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        chunks: int = 2,
        chunk_len: int = 512,
        dropout: float = 0.1,
        device: str = "auto",
        **recipe: Any,
    ) -> None:
        self.name = model if isinstance(model, str) else None
        self.model = None if isinstance(model, str) else model
        if tokenizer is None:
            if self.name is None:
                raise TypeError("tokenizer: expected one beside a model object, got None")
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.name)
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(f"tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self.chunks, self.chunk_len, self.dropout = chunks, chunk_len, dropout
        self.recipe = Recipe(**recipe)
        for name, size in {"chunks": chunks, "chunk_len": chunk_len, **asdict(self.recipe)}.items():
            if isinstance(size, int) and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.recipe.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {self.recipe.dtype!r}")
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.net: Pooled | None = None
        self.notes: dict[str, Any] = {}

    def fit(self, job: Job, start: HFEncoder | None = None) -> HFEncoder:
        """Fine-tunes a copy, from the pre-trained weights or from `start`."""
        fitted = copy.copy(self)
        if start is None:
            net = Pooled(self._pretrained(), job.train.targets.shape[1], self.dropout)
        else:
            net = copy.deepcopy(start._fitted())
        positions = getattr(net.encoder.config, "max_position_embeddings", self.chunk_len)
        if isinstance(positions, int) and positions < self.chunk_len:
            raise ValueError(f"chunk_len: expected at most the encoder's {positions} positions, got {self.chunk_len}")
        fitted.net = net.to(self.device)
        path = job.folder and job.folder / "fit.pt"
        training = Training(
            fitted.net,
            self.recipe,
            job.seed,
            self._documents(job.train.texts),
            job.train.targets,
            self._documents(job.held_out.texts),
            job.held_out.targets,
            fitted._key(job) if path else "",
            path,
        )
        training.run(start is not None, job.progress)
        fitted.notes = {"evaluations": training.history, "kept_step": training.best["step"], "steps": training.steps}
        return fitted

    def predict(self, texts: Sequence[str]) -> F32:
        """(n, R) z-scores. Texts scored together change each other's by roundings at most, 1e-5 in float32."""
        net = self._fitted()
        return run(net, net.head.out_features, self._documents(texts), self.recipe, net)

    def embed(self, texts: Sequence[str]) -> F32:
        """(n, d) mean states, of the fine-tuned encoder or else of the pre-trained: features for `EmbeddingRidge`."""
        net = self.net or Pooled(self._pretrained(), 1, self.dropout).to(self.device)
        return run(net, net.head.in_features, self._documents(texts), self.recipe, net.embed)

    def rebased(self, heads: Sequence[int | None], scale: F64, offset: F64) -> HFEncoder:
        """With head r predicting `scale_r * (old head heads[r]) + offset_r`; a new head, which says 0, where None."""
        rebased, net = copy.copy(self), copy.deepcopy(self._fitted())
        rebased.net, old = net, net.head
        net.head = zero_head(old.in_features, len(heads)).to(old.weight)
        with torch.no_grad():
            for r, head in enumerate(heads):
                if head is not None:
                    net.head.weight[r] = old.weight[head] * float(scale[r])
                    net.head.bias[r] = old.bias[head] * float(scale[r]) + float(offset[r])
        return rebased

    def settings(self) -> dict[str, Any]:
        """What the model was built with, as JSON has it."""
        ours = {"model": self.name, "chunks": self.chunks, "chunk_len": self.chunk_len, "dropout": self.dropout}
        return ours | asdict(self.recipe)

    def digest(self) -> bytes:
        """Of weights, architecture and tokenizer."""
        net = self._fitted()
        config = net.encoder.config.to_dict()
        tokens = json.loads(self.tokenizer.backend_tokenizer.to_str())
        about = {key: value for key, value in config.items() if key[0] != "_" and key not in _OF_THE_FILE}
        about |= {"tokenizer": {key: value for key, value in tokens.items() if key not in ("truncation", "padding")}}
        digest = blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=16)
        for name, value in sorted(net.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.digest()

    def save(self, folder: Path) -> None:
        """Writes encoder and tokenizer as transformers does, and the head."""
        net = self._fitted()
        with _quiet():
            net.encoder.save_pretrained(folder / "encoder")
        self.tokenizer.save_pretrained(folder / "encoder")
        torch.save(net.head.state_dict(), folder / "head.pt")

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> HFEncoder:
        """Reads what `save` wrote."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
        with _quiet():
            encoder = _loaded(folder / "encoder")
        name, rest = settings["model"], {key: value for key, value in settings.items() if key != "model"}
        loaded = cls(name or encoder, tokenizer, **rest)
        head = torch.load(folder / "head.pt", map_location="cpu", weights_only=True)
        net = Pooled(encoder, len(head["bias"]), loaded.dropout)
        net.head.load_state_dict(head)
        loaded.model, loaded.net = None, net.to(loaded.device)
        return loaded

    def _documents(self, texts: Sequence[str]) -> list[Document]:
        return tokenised(self.tokenizer, texts, self.chunks, self.chunk_len)

    def _pretrained(self) -> nn.Module:
        if self.model is not None:
            return copy.deepcopy(self.model).float()
        if self.name is None:
            raise ValueError("encoder: expected one with a name or a model to start cold from, got a loaded one")
        return _loaded(self.name)

    def _fitted(self) -> Pooled:
        if self.net is None:
            raise ValueError("HFEncoder: expected a fitted model, got one that was not")
        return self.net

    def _key(self, job: Job) -> str:
        """Of all that a fit depends on: what a checkpoint must be of to be gone on with."""
        key = blake2b(json.dumps([self.settings(), job.seed]).encode() + self.digest(), digest_size=16)
        for split in (job.train, job.held_out):
            key.update(split.targets.tobytes())
            for text in split.texts:
                key.update(blake2b(text.encode("utf-8", "replace"), digest_size=16).digest())
        return key.hexdigest()
