"""What the influence model costs and tells, on real text: n-gram ridge, and an encoder fine-tuned on the same labels.

    python benchmarks/algorithms/bench_mates_influence.py                      # all parts: minutes
    python benchmarks/algorithms/bench_mates_influence.py ngram shuffled curve encoder      # or some of them
    python benchmarks/algorithms/bench_mates_influence.py encoder --encoder FOLDER          # of transformers

Times are of a core. The documents are pieces of Python code and of its documentation. No model is in training here, so
the label is a stand-in that can be had at once for any number of documents: by how many nats a byte a piece is likelier
under a byte model (order 2) of one half of the documentation than under one of half of everything. Correlations are
comparable with each other, and say nothing of influences.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ghostgram.algorithms.mates.influence.curve import learning_curve
from ghostgram.algorithms.mates.influence.encoder import HFEncoder
from ghostgram.algorithms.mates.influence.hashing import ngrams
from ghostgram.algorithms.mates.influence.model import fit
from ghostgram.algorithms.mates.influence.ngram import HashedNgramRidge
from ghostgram.algorithms.mates.influence.targets import prepare
from ghostgram.data import load_text

LENGTH, LABELS, ENCODER_LABELS, SHUFFLES = 500, 8000, 200, 20


def pieces(documents: list[str]) -> list[str]:
    return [text[i : i + LENGTH] for text in documents for i in range(0, len(text) - LENGTH, LENGTH)]


class ByteModel:
    """p(byte | the two before it) by counts, add-.05."""

    def __init__(self, texts: list[str]) -> None:
        counts = sum(np.bincount(self.contexts(text), minlength=2**21) for text in texts).reshape(-1, 128) + 0.05
        self.log = np.log(counts / counts.sum(1, keepdims=True)).ravel()

    @staticmethod
    def contexts(text: str) -> np.ndarray:
        data = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64)
        return data[:-2] << 14 | data[1:-1] << 7 | data[2:]

    def nats(self, text: str) -> float:
        return float(self.log[self.contexts(text)].mean())


def labelled() -> tuple[list[str], np.ndarray, list[bytes]]:
    code, docs = load_text("python_code"), load_text("tech_docs")
    near, all_of_it = ByteModel(docs[::2]), ByteModel([*code[::2], *docs[::2]])
    texts = list(dict.fromkeys(pieces([*code[1::2], *docs[1::2]])))
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:LABELS]]
    labels = np.array([[near.nats(text) - all_of_it.nats(text)] for text in texts])
    return texts, labels, [blake2b(text.encode(), digest_size=16).digest() for text in texts]


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Seconds of a core: of all threads together, whatever else the machine does."""
    started = time.process_time()
    yield
    seconds.append(time.process_time() - started)


def random_bert(texts: list[str]) -> HFEncoder:
    """Four layers of width 128, a byte-level BPE of 4096 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=["[PAD]"], show_progress=False))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4096, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="[PAD]")
    return HFEncoder(BertModel(config), tokenizer, chunk_len=256, batch=32, lr=3e-4, epochs=1, device="cpu")


def ngram_model(texts: list[str], labels: np.ndarray, ids: list[bytes], console: Console) -> None:
    table = Table(title="HashedNgramRidge")
    for name in (
        "labels",
        "hash, docs/s",
        "fit, s",
        "fit, docs/s",
        "score, docs/s",
        "iterations",
        "lambda",
        "Spearman",
    ):
        table.add_column(name, justify="right")
    for count in (LABELS // 8, LABELS // 2, LABELS):
        some = texts[:count]
        hashing, fitting, scoring = [], [], []
        for _ in range(2):
            with timed(hashing):
                ngrams(some)
            with timed(fitting):
                model = fit(some, labels[:count], ids[:count], ["docs"])
            with timed(scoring):
                model.score(some)
        head, notes = model.report.heads[0], model.report.notes
        rates = (f"{count / min(hashing):.0f}", f"{min(fitting):.2f}", f"{count / min(fitting):.0f}")
        chosen = (f"{notes['iterations'][0]}", f"{notes['strength'][0]:g}")
        rho = f"{head.spearman:.3f} ({head.low:.3f} to {head.high:.3f})"
        table.add_row(f"{count}", *rates, f"{count / min(scoring):.0f}", *chosen, rho)
    console.print(table)


def shuffled(texts: list[str], labels: np.ndarray, ids: list[bytes], console: Console) -> None:
    """Of labels that have nothing to do with their texts: what choosing lambda by the held-out split makes of them."""
    table = Table(title=f"Shuffled labels: held-out Spearman of {SHUFFLES} fits")
    for name in ("held out", "mean", "largest"):
        table.add_column(name, justify="right")
    for count in (LABELS // 8, LABELS // 4):
        data = prepare(texts[:count], labels[:count], ids[:count], ["docs"])
        ridge = HashedNgramRidge()
        train, beside = ridge.features(data.train.texts), ridge.features(data.held_out.texts)
        found = []
        for shuffle in range(SHUFFLES):
            order = np.random.default_rng(shuffle)
            truth = order.permutation(data.held_out.targets)
            fitted = ridge.fit_rows(train, order.permutation(data.train.targets), beside, truth)
            ranks = (np.argsort(np.argsort(x[:, 0])) for x in (fitted.predict_rows(beside), truth))
            found.append(np.corrcoef(*ranks)[0, 1])
        table.add_row(f"{len(beside)}", f"{np.mean(found):+.3f}", f"{np.max(found):+.3f}")
    console.print(table)


def curve(texts: list[str], labels: np.ndarray, ids: list[bytes], console: Console) -> None:
    seconds: list[float] = []
    with timed(seconds):
        found = learning_curve(texts, labels, ids, ["docs"])
    table = Table(title=f"Learning curve, {seconds[0]:.0f} s")
    for name in ("labels", "Spearman", "95 %", "law"):
        table.add_column(name, justify="right")
    for point in found.points:
        table.add_row(
            f"{point.labels}", f"{point.spearman:.3f}", f"{point.low:.3f} to {point.high:.3f}",
            f"{found.law.at(point.labels):.3f}",
        )  # fmt: skip
    console.print(table, f"law {found.law}; {found.gain}; {found.verdict}, enough from {found.enough}")


def trained(encoder: HFEncoder, texts: list[str], labels: np.ndarray, ids: list[bytes], console: Console) -> None:
    fitting, scoring = [], []
    with timed(fitting):
        model = fit(texts, labels, ids, ["docs"], encoder=encoder, progress=True)
    with timed(scoring):
        model.score(texts)
    parameters = sum(p.numel() for p in model.encoder.net.parameters()) / 1e6
    table = Table(title=f"HFEncoder, {parameters:.1f} M weights")
    for name in ("labels", "epochs", "fit, s", "fit, docs/s and epoch", "score, docs/s", "Spearman", "n-gram"):
        table.add_column(name, justify="right")
    head, epochs = model.report.heads[0], encoder.recipe.epochs
    table.add_row(
        f"{len(texts)}", f"{epochs}", f"{fitting[0]:.0f}", f"{len(texts) * epochs / fitting[0]:.0f}",
        f"{len(texts) / scoring[0]:.0f}", f"{head.spearman:.3f} ({head.low:.3f} to {head.high:.3f})",
        f"{model.report.floor[0]:.3f}",
    )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "encoder", []], help="all of them by default")
    parser.add_argument("--encoder", help="a name or folder that AutoModel.from_pretrained knows")
    arguments = parser.parse_args()
    console, data = Console(width=120), labelled()
    for part in arguments.parts or [*PARTS, "encoder"]:
        if part in PARTS:
            PARTS[part](*data, console)
        else:
            name, (texts, labels, ids) = arguments.encoder, (column[:ENCODER_LABELS] for column in data)
            encoder = HFEncoder(name, chunk_len=256, batch=32, epochs=1, device="cpu") if name else random_bert(data[0])
            trained(encoder, texts, labels, ids, console)


PARTS = {"ngram": ngram_model, "shuffled": shuffled, "curve": curve}

if __name__ == "__main__":
    main()
