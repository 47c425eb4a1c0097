"""What is neither a picture's model nor a language model of Hugging Face as it comes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks import Checkpointable, Experts, GatedBlock, LoRA
from zoo.entry import CLASSES, VOCABULARY, WIDTH, Entry, real, text
from zoo.language import LLAMA, OURS, hugging_face


class MLP(Checkpointable):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(7, 16), nn.LayerNorm(16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.enter(x))
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


class GatedDecoder(Checkpointable):
    """A decoder with learned positions of all samples at once, torch's RMSNorm, fused attention and SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList([GatedBlock(WIDTH, 2), GatedBlock(WIDTH, 2)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(self.norm(x))


class ModuleExperts(Checkpointable):
    """A mixture of experts that are nn.Linear, as models had it before experts were one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList([Experts(WIDTH, 3), Experts(WIDTH, 3)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = self.run(block, x)
        return self.head(x)


class TorchEncoder(Checkpointable):
    """nn.TransformerEncoder's layers, whose MultiheadAttention keeps its projections as bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True, norm_first=first)
            for first in (False, True)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.tokens(input_ids)
        for layer in self.layers:
            padding = () if attention_mask is None else (None, attention_mask == 0)
            x = self.run(layer, x, *padding)
        return self.head(x[:, 0])


class CrossAttention(nn.Module):
    """Learned queries, a bare parameter, attend to tokens; keys and values have other widths than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 12)
        self.queries = nn.Parameter(torch.randn(3, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=12, vdim=12, add_bias_kv=True, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        mixed, _ = self.attention(self.queries.expand(len(x), -1, -1), x, x)
        return self.head(mixed.mean(1))


class BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean", padding_idx=3)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(input_ids)))


class TextCNN(nn.Module):
    """Convolutions of three widths over words, each with its maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, 8, width, padding=width // 2) for width in (2, 3, 4))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).amax(2) for conv in self.convs], 1))


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 12)
        self.recurrent = layer(12, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.words(input_ids))[0])


class Normalised(nn.Module):
    """Weights computed from other parameters: weight normalisation, and a Linear used by its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(7, 12))
        self.second = nn.Linear(12, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(F.linear(x, self.second.weight.T, self.second.bias)))


def lora() -> nn.Module:
    """Llama with updates of low rank beside its frozen query and down projections."""
    model = hugging_face("LlamaForCausalLM", **OURS, **LLAMA)().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj, 2, 0.5)
        layer.mlp.down_proj = LoRA(layer.mlp.down_proj, 3, 2.0)
    return model


def peft_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = hugging_face("LlamaForCausalLM", **OURS, **LLAMA)()
    targets = ["q_proj", "v_proj", "up_proj", "lm_head", "embed_tokens"]
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=targets))


LSTM_REFUSES = (
    {}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else {"bfloat16 autocast": "torch has no bfloat16 LSTM for a processor without AVX-512"}
)

ENTRIES = [
    Entry("MLP", MLP, real("x", 7), batch_4d=real("x", 2, 3, 7, labels=(2, 3))),
    Entry("gated decoder", GatedDecoder, text()),
    Entry("experts of nn.Linear", ModuleExperts, text()),
    Entry("nn.TransformerEncoderLayer", TorchEncoder, text(labels=None, classes=CLASSES)),
    Entry("nn.MultiheadAttention", CrossAttention, text(labels=None, classes=CLASSES)),
    Entry("bag of words", BagOfWords, text(labels=None, classes=CLASSES)),
    Entry("text CNN", TextCNN, text(labels=None, classes=CLASSES)),
    Entry("LSTM", lambda: Recurrent(nn.LSTM), text(), refuses=LSTM_REFUSES),
    Entry("GRU", lambda: Recurrent(nn.GRU), text()),
    Entry("weight norm", Normalised, real("x", 7)),
    Entry("LoRA on Llama", lora, text()),
    Entry("peft on Llama", peft_lora, text(), refuses={"tied": "peft keeps the weights of its layers in others"}),
]
