"""Hugging Face's language models, by random tiny configurations: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from zoo.entry import VOCABULARY, WIDTH, Entry, text

OURS = {
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
"""The names that Llama's configuration gave to sizes and that most models have kept."""
BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def hugging_face(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Makes a model of transformers with some sizes, without any dropout."""

    def make() -> nn.Module:
        model_class = getattr(transformers, name)
        config = model_class.config_class(**sizes)
        for option in vars(config):
            if "drop" in option and isinstance(getattr(config, option), float):
                setattr(config, option, 0.0)
        config.use_cache = False
        return model_class(config)

    return make


def language(entry: str, model: str, no_forward: str = "", **sizes: Any) -> Entry:
    refuses = {"late, forward": no_forward} if no_forward else {}
    return Entry(entry, hugging_face(model, **OURS | sizes), text(), refuses=refuses)


ENTRIES = [
    language("GPT-2", "GPT2LMHeadModel", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16),
    language(
        "GPT-Neo",
        "GPTNeoForCausalLM",
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=16,
    ),
    language(
        "OPT",
        "OPTForCausalLM",
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=16,
        word_embed_proj_dim=12,
    ),
    language("Llama", "LlamaForCausalLM", **LLAMA),
    language("Mistral", "MistralForCausalLM", sliding_window=4, **LLAMA),
    language("Qwen2", "Qwen2ForCausalLM", **LLAMA),
    language("Qwen3", "Qwen3ForCausalLM", head_dim=8, **LLAMA),
    language("Gemma", "GemmaForCausalLM", head_dim=8, **LLAMA),
    language("Gemma 2", "Gemma2ForCausalLM", head_dim=8, sliding_window=4, **LLAMA),
    language("Phi", "PhiForCausalLM", **LLAMA),
    language("Phi-3", "Phi3ForCausalLM", **LLAMA),
    language("GPT-NeoX", "GPTNeoXForCausalLM", **LLAMA),
    language("Falcon", "FalconForCausalLM", **LLAMA),
    language(
        "Bloom",
        "BloomForCausalLM",
        no_forward="its GeLU is an autograd.Function without forward mode",
        hidden_size=WIDTH,
        n_layer=2,
        n_head=2,
    ),
    language("BERT", "BertForMaskedLM", **BERT),
    language("RoBERTa", "RobertaForMaskedLM", max_position_embeddings=16, **BERT),
    language("DistilBERT", "DistilBertForMaskedLM", dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24),
    language("ALBERT", "AlbertForMaskedLM", embedding_size=12, **BERT),
    Entry(
        "T5",
        hugging_face("T5ForConditionalGeneration", **OURS, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
        text(labels=5, decoder_input_ids=5),
    ),
    Entry(
        "BART",
        hugging_face(
            "BartForConditionalGeneration",
            **OURS,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=16,
        ),
        text(labels=5, decoder_input_ids=5),
    ),
    language("Mamba", "MambaForCausalLM", hidden_size=WIDTH, num_hidden_layers=2, state_size=4, time_step_rank=2),
    language("Mixtral", "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, **LLAMA),
    # One attention for forward and forward mode: in 16 bits, another one's rounding sends a token to other experts.
    language("Qwen3 MoE", "Qwen3MoeForCausalLM", head_dim=8, attn_implementation="eager", **LLAMA, **EXPERTS),
    language("gpt-oss", "GptOssForCausalLM", head_dim=8, num_local_experts=4, num_experts_per_tok=2, **LLAMA),
    language(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        **LLAMA | {"num_key_value_heads": 2},
    ),
]
