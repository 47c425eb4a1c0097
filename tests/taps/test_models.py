"""Whole models of Hugging Face: what of them is covered, and that dots are those of a single sample's gradient."""

import pytest
import torch

from ghostgram.taps import Taps, cover

transformers = pytest.importorskip("transformers")

B, T, V = 3, 8, 50
ids = torch.randint(4, V, (B, T), generator=torch.Generator().manual_seed(0))
text = {"input_ids": ids}
pairs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
images = {"pixel_values": torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
heads = {"num_attention_heads": 2, "num_hidden_layers": 1}

MODELS = {  # model, configuration, input, names of what no tap covers
    "BertForMaskedLM": ({"hidden_size": 16, "intermediate_size": 20, "vocab_size": V, **heads}, text, []),
    "FalconForCausalLM": ({"hidden_size": 16, "vocab_size": V, **heads}, text, []),
    "CohereForCausalLM": (
        {"hidden_size": 16, "intermediate_size": 20, "vocab_size": V, "use_qk_norm": True, **heads}, text, []
    ),
    "T5ForConditionalGeneration": (
        {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2, "vocab_size": V},
        pairs,
        [f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in ("encoder", "decoder")],
    ),
    "BartForConditionalGeneration": (
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "vocab_size": V,
         "max_position_embeddings": 16},
        pairs,
        [],
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [8] * 4, "depths": [1] * 4},
        images,
        [f"convnext.encoder.stages.{stage}.layers.0.layer_scale_parameter" for stage in range(4)],
    ),
    "BitForImageClassification": ({"embedding_size": 32, "hidden_sizes": [128, 128], "depths": [1, 1]}, images, []),
    "Dinov2ForImageClassification": (
        {"hidden_size": 16, "image_size": 32, "patch_size": 8, **heads},
        images,
        [f"dinov2.embeddings.{name}" for name in ("cls_token", "mask_token", "position_embeddings")],
    ),
}  # fmt: skip


def loss_of(model, inputs):
    logits = model(**inputs).logits.flatten(1)
    return (logits * torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)).sum(1).tanh().sum()


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    options, inputs, uncovered = MODELS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**options)).double().eval()
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    coverage = cover(model, model.parameters(), fallback="jvp")
    assert list(coverage.fallback) == uncovered
    directions = {p: torch.randn(2, *p.shape, dtype=p.dtype) for p in coverage.scored.values()}
    taps = Taps(coverage, list(directions))
    with taps.samples(B, directions):
        loss_of(model, inputs).backward()
    whole = {p: p.grad for p in directions}
    model.zero_grad()
    loss_of(model, {key: x[:1] for key, x in inputs.items()}).backward()
    largest = max(gradient.norm() for gradient in whole.values())
    for p, D in directions.items():
        scale = 1e-6 * largest * D.norm()  # norms that compute in float32
        dots = taps.dots()[p]
        assert (dots.sum(0) - (D * whole[p]).flatten(1).sum(1)).abs().max() < scale
        assert (dots[0] - (D * p.grad).flatten(1).sum(1)).abs().max() < scale
