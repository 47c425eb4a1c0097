"""A BERT of one small layer with random weights, and a tokenizer of the planted words, neither of them downloaded."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from algorithms.mates.planted import WORDS

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def bert(seed=0, width=32, layers=1, positions=64):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + len(SPECIAL), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=positions,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)
