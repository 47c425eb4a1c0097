"""PAD: dataset distillation by masked trajectory matching, with difficulty-aligned data."""
