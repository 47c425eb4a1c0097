"""Every model of the zoo, every condition: our dots are those of a loop over single samples, .grad is autograd's."""

import pytest

pytest.importorskip("transformers")

from zoo.conditions import CONDITIONS
from zoo.ours import Setting, shapley_dots
from zoo.registry import ZOO

WHOLLY_TAPPED = {
    *("GPT-2", "GPT-Neo", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma 2", "Phi", "Phi-3", "GPT-NeoX"),
    *("Falcon", "Bloom", "DistilBERT", "BART", "ResNet with GroupNorm", "U-Net", "3-D convolutions", "style transfer"),
    *("MLP-Mixer", "MLP", "gated decoder", "nn.TransformerEncoderLayer", "bag of words", "text CNN", "LoRA on Llama"),
}
"""Models whose dots all come from taps. The others leave some parameters to forward mode, exactly."""


@pytest.fixture(scope="module")
def setting():
    """One setting with its truth, kept for the tests that ask for it in turn."""
    last = {}

    def make(entry, condition):
        if entry == "peft on Llama":
            pytest.importorskip("peft")
        if (entry, condition) not in last:
            last.clear()
            made = Setting(ZOO[entry], CONDITIONS[condition])
            last[entry, condition] = made, None if made.why_not else made.truth()
        return last[entry, condition]

    return make


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("entry", ZOO)
@pytest.mark.filterwarnings("ignore:.*scored by forward mode from now on")
def test_dots_are_those_of_a_loop_over_single_samples(entry, condition, setting):
    made, truth = setting(entry, condition)
    if made.why_not:
        pytest.skip(made.why_not)
    rules = CONDITIONS[condition]
    assert truth.additive() < max(1e-5, rules.gradient_tolerance), "the zoo's own loop over samples is wrong"
    try:
        found = shapley_dots(made, truth)
    except RuntimeError as error:
        if "_embedding_bag" in str(error):
            pytest.skip("torch's EmbeddingBag has no forward mode")
        raise
    assert found.error <= rules.tolerance
    assert found.gradient_error <= rules.gradient_tolerance
    assert found.covered == found.trainable
    if entry in WHOLLY_TAPPED and (entry, condition) != ("gated decoder", "T = B"):  # positions (T,) are ambiguous
        assert found.tapped == found.trainable


def test_a_sample_exchanged_for_another_is_seen(setting):
    """The zoo can fail: dots of two samples exchanged are far outside of its tolerance."""
    _, truth = setting("Llama", "plain")
    right = truth.terms().sum(0)
    assert truth.error(right) == 0
    assert truth.error(right[[1, 0, 2, 3]]) > 1e-2
