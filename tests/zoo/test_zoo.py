"""Every model of the zoo, every condition: our dots are those of a loop over single samples, .grad is autograd's."""

import pytest

pytest.importorskip("transformers")

from ghostgram.taps import UncoveredParameterError
from zoo.conditions import CONDITIONS
from zoo.ours import Setting, shapley_dots
from zoo.registry import ZOO


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
def test_dots_are_those_of_a_loop_over_single_samples(entry, condition, setting):
    made, truth = setting(entry, condition)
    if made.why_not:
        pytest.skip(made.why_not)
    rules = CONDITIONS[condition]
    assert truth.additive() < max(1e-5, rules.gradient_tolerance), "the zoo's own loop over samples is wrong"
    try:
        found = shapley_dots(made, truth)
    except UncoveredParameterError as refused:
        pytest.skip(f"refused by name: {refused}")
    assert found.error <= rules.tolerance
    assert found.gradient_error <= rules.gradient_tolerance
    assert found.covered == found.trainable
