"""The oracle is the derivative of per-sample losses: what a loop over single samples gives, for any model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ghostgram.training.oracle import directional_derivatives

VOCABULARY, LENGTH, BATCH, PADDING = 31, 9, 5, 3
IDS = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
IDS[1, 5:] = PADDING
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4}
DIFFERENCE = {torch.float64: 1e-8, torch.float32: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def gpt2(attention="sdpa", **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def llama(attention="sdpa"):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=PADDING, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)
    for layer in model.model.layers:  # transformers' own RMSNorm computes in float32 always: no test of 1e-9
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(16, 1e-6), nn.RMSNorm(16, 1e-6)
    model.model.norm = nn.RMSNorm(16, 1e-6)
    return model


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, groups=2, stride=2), nn.PReLU(),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def perceptron():
    return nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Dropout(0.4), nn.Linear(10, 10), nn.Dropout(0.2), nn.Linear(10, 3)
    )


class Recurrent(nn.Module):
    """Weights that a module keeps references to, a bare parameter, and a parametrized weight."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gate = nn.LSTM(6, 5, batch_first=True), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)
        nn.utils.parametrize.register_parametrization(self.head, "weight", nn.Tanh())

    def forward(self, x):
        return self.head((self.lstm(x.unsqueeze(1))[0] * self.gate).sum(1))


def token_shares(model):
    """Shares of a token mean that ignores padding."""
    labels = IDS[:, 1:]
    losses = F.cross_entropy(model(IDS).logits[:, :-1].mT, labels, ignore_index=PADDING, reduction="none")
    return losses.sum(1) / (labels != PADDING).sum()


def class_shares(shape):
    x = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(2))

    def shares(model):
        dtype = next(model.parameters()).dtype
        return F.cross_entropy(model(x.to(dtype)), torch.arange(BATCH) % 3, reduction="none") / BATCH

    return shares


MODELS = {
    "gpt2, sdpa, dropout": (gpt2, token_shares),
    "gpt2, eager": (lambda: gpt2("eager", attn_pdrop=0), token_shares),
    "llama, sdpa, padded, tied": (llama, token_shares),
    "llama, eager": (lambda: llama("eager"), token_shares),
    "convolutions": (convolutions, class_shares((1, 9, 9))),
    "dropout": (perceptron, class_shares((6,))),
    "lstm": (Recurrent, class_shares((6,))),
}


def built(kind, dtype):
    torch.manual_seed(0)
    make, shares = MODELS[kind]
    model = make()
    with torch.no_grad():
        shares(model)  # a lazy layer learns its size
    return model.to(dtype).train(), shares


def some_directions(model, count=2, size=1.0):
    g = torch.Generator().manual_seed(3)
    return {p: size * torch.randn(count, *p.shape, generator=g).to(p.dtype) for p in model.parameters()}


def by_single_samples(model, shares, directions):
    """<g_i, D_k>, and the scale |g_i| |D_k| of its rounding."""
    parameters = list(directions)
    with torch.random.fork_rng(devices=[]):
        losses = shares(model)
    dots, scales = [], []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        g = torch.cat([each.flatten() for each in gradients]).double()
        D = torch.cat([directions[p].flatten(1) for p in parameters], 1).double()
        dots.append(D @ g)
        scales.append(D.norm(dim=1) * g.norm())
    return torch.stack(dots), torch.stack(scales)


@DTYPES
@pytest.mark.parametrize("kind", MODELS)
def test_jvp_equals_a_loop_over_single_samples(kind, dtype):
    model, shares = built(kind, dtype)
    directions = some_directions(model)
    truth, scale = by_single_samples(model, shares, directions)
    found = directional_derivatives(model, lambda: shares(model), directions)
    assert found.dtype == torch.float64
    assert found.shape == (BATCH, 2)
    assert ((found - truth).abs() / scale).max() <= EXACT[dtype]


@DTYPES
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "llama, eager"])  # whose softmax is in float32
def test_difference_equals_a_loop_over_single_samples(kind, dtype):
    model, shares = built(kind, dtype)
    directions = some_directions(model)
    truth, scale = by_single_samples(model, shares, directions)
    found = directional_derivatives(model, lambda: shares(model), directions, "difference")
    assert ((found - truth).abs() / scale).max() <= DIFFERENCE[dtype]


@pytest.mark.parametrize("method", ["jvp", "difference"])
@pytest.mark.parametrize("tied", [False, True])
def test_no_gradient_goes_to_the_padding_row_of_a_table(tied, method):
    """Alone, or tied to a head that does have gradients there; scaled by a subclass, as some models do."""

    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 7

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = Scaled(VOCABULARY, 8, padding_idx=PADDING), nn.Linear(8, VOCABULARY, bias=False)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.table(ids))).mean((1, 2)).sin()

    torch.manual_seed(0)
    model = Tied().double()
    directions = some_directions(model)
    truth, scale = by_single_samples(model, lambda m: m(IDS), directions)
    found = directional_derivatives(model, lambda: model(IDS), directions, method)
    assert ((found - truth).abs() / scale).max() <= 1e-9
    assert not tied or model.head.weight is model.table.weight


def test_parameters_without_a_direction_stay():
    model, shares = built("dropout", torch.float64)
    directions = {model[3].weight: some_directions(model)[model[3].weight]}
    truth, scale = by_single_samples(model, shares, directions)
    for method, tolerance in (("jvp", 1e-9), ("difference", 1e-8)):
        found = directional_derivatives(model, lambda: shares(model), directions, method)
        assert ((found - truth).abs() / scale).max() <= tolerance


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_do_not_lose_tangents(reentrant):
    """Of weights inside a checkpoint whose own input has none."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.checkpointing = nn.Linear(6, 6), perceptron(), False

        def forward(self, x):
            x = self.first(x)
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.checkpointing else self.body(x)

    torch.manual_seed(0)
    model, shares = Checkpointed().double(), class_shares((6,))
    directions = some_directions(model.body)
    truth, scale = by_single_samples(model, shares, directions)
    model.checkpointing = True
    found = directional_derivatives(model, lambda: shares(model), directions)
    assert ((found - truth).abs() / scale).max() <= 1e-9
    shares(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_does_not_keep_casts_of_moved_weights():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3, bias=False), torch.randn(BATCH, 6)
    direction = {model.weight: torch.ones(1, 3, 6)}

    def shares():
        return model(x).float().sum(1)

    with torch.autocast("cpu", torch.bfloat16):
        shares()
        found = directional_derivatives(model, shares, direction)
        assert torch.is_autocast_cache_enabled()
    assert (found[:, 0] - 3 * x.sum(1)).abs().max() <= 2e-2 * 3 * x.abs().sum(1).max()


def test_tangents_too_small_for_half_precision_count():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3, bias=False).to(torch.float16), torch.randn(BATCH, 6, dtype=torch.float16)
    found = directional_derivatives(model, lambda: model(x).float().sum(1), {model.weight: torch.full((1, 3, 6), 1e-9)})
    assert (1e9 * found[:, 0] - 3 * x.double().sum(1)).abs().max() <= 2e-3 * 3 * x.abs().sum(1).max()


def test_compiled_models_are_run_eagerly():
    model, shares = built("dropout", torch.float64)
    directions = some_directions(model)
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(BATCH, 6, dtype=torch.float64))
    truth, scale = by_single_samples(model, shares, directions)
    found = directional_derivatives(compiled, lambda: shares(compiled), directions)
    assert ((found - truth).abs() / scale).max() <= 1e-9


def left_behind(model):
    """Everything of a model that a caller could miss, and the random state."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [*(t.detach().clone() for t in tensors), torch.get_rng_state()], [id(t) for t in tensors]


@pytest.mark.parametrize("method", ["jvp", "difference"])
@pytest.mark.parametrize("kind", ["gpt2, sdpa, dropout", "llama, sdpa, padded, tied", "convolutions", "lstm"])
def test_everything_is_left_as_found(kind, method):
    """Also when the losses cannot be taken to their end."""
    model, shares = built(kind, torch.float32)
    shares(model).sum().backward()
    directions = some_directions(model)
    before = left_behind(model)

    def broken():
        shares(model)
        raise KeyError("in the middle")

    def same():
        after = left_behind(model)
        return all(map(torch.equal, before[0], after[0])) and before[1] == after[1] and not torch.is_autocast_enabled()

    directional_derivatives(model, lambda: shares(model), directions, method)
    assert same()
    with pytest.raises(KeyError, match="in the middle"):
        directional_derivatives(model, broken, directions, method)
    assert same()
    assert torch.is_grad_enabled()
    shares(model).sum().backward()


def test_operators_without_a_forward_rule_are_named():
    torch.manual_seed(0)
    model, ids = nn.EmbeddingBag(5, 3).double(), torch.randint(5, (BATCH, 4))
    directions = some_directions(model)

    def shares(model):
        return F.cross_entropy(model(ids), torch.arange(BATCH) % 3, reduction="none")

    with pytest.raises(RuntimeError, match=r"_embedding_bag(.|\n)*use method='difference'"):
        directional_derivatives(model, lambda: shares(model), directions)
    truth, scale = by_single_samples(model, shares, directions)
    found = directional_derivatives(model, lambda: shares(model), directions, "difference")
    assert ((found - truth).abs() / scale).max() <= 1e-8


def test_functions_of_the_user_without_a_forward_rule_are_named():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    model, x = nn.Linear(6, 3), torch.randn(BATCH, 6)
    with pytest.raises(RuntimeError, match="use method='difference'"):
        directional_derivatives(model, lambda: Doubled.apply(model(x)).sum(1), some_directions(model))


def test_differences_that_do_not_agree_are_an_error():
    model, x = nn.Linear(6, 1), torch.randn(BATCH, 6)
    with pytest.raises(RuntimeError, match="agrees with that at half its step"):
        directional_derivatives(model, lambda: (1e9 * model(x)).sin().sum(1), some_directions(model), "difference")


def test_differences_of_16_bit_weights_are_refused():
    model = nn.Linear(6, 3).bfloat16()
    with pytest.raises(ValueError, match=r"weight in torch\.bfloat16"):
        directional_derivatives(model, lambda: torch.zeros(3), some_directions(model), "difference")


@pytest.mark.parametrize("method", ["jvp", "difference"])
def test_losses_that_do_not_depend_on_the_weights_and_directions_of_zero(method):
    model, x = nn.Linear(6, 3), torch.randn(BATCH, 6)
    zero = {p: torch.zeros(2, *p.shape) for p in model.parameters()}
    assert not directional_derivatives(model, lambda: model(x).sum(1), zero, method).any()
    assert directional_derivatives(model, lambda: x.sum(1), some_directions(model), method).tolist() == [[0.0] * 2] * 5


@pytest.mark.parametrize(
    "losses", [lambda: torch.zeros(()), lambda: torch.zeros(2, 2), lambda: 1.0, lambda: torch.ones(3).int()]
)
@pytest.mark.parametrize("method", ["jvp", "difference"])
def test_losses_must_be_one_number_per_sample(losses, method):
    model = nn.Linear(6, 3)
    with pytest.raises(ValueError, match=r"losses\(\): expected a floating-point \(B,\) tensor"):
        directional_derivatives(model, losses, some_directions(model), method)


def test_directions_must_fit():
    model, losses = nn.Linear(6, 3), lambda: torch.zeros(2)
    with pytest.raises(ValueError, match=r"directions\[weight\]: expected shape \(K, 3, 6\), got \(\)"):
        directional_derivatives(model, losses, {model.weight: torch.zeros(())})
    with pytest.raises(ValueError, match=r"directions\[bias\]: expected shape \(2, 3\), got \(1, 3\)"):
        directional_derivatives(model, losses, {model.weight: torch.zeros(2, 3, 6), model.bias: torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="does not belong to the model"):
        directional_derivatives(model, losses, {nn.Parameter(torch.zeros(2)): torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="at least one parameter"):
        directional_derivatives(model, losses, {})
    with pytest.raises(ValueError, match="'jvp' or 'difference', got 'vjp'"):
        directional_derivatives(model, losses, some_directions(model), "vjp")
