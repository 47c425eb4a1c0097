"""Velocitune in one call: training data whose domains are weighted by how fast the model learns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from torch import nn
from torch.utils.data import Dataset

from ghostgram.algorithms.velocitune.controller import MixtureController
from ghostgram.algorithms.velocitune.domain_sampler import DomainSampler
from ghostgram.algorithms.velocitune.evaluate import Loss, evaluate_domains
from ghostgram.algorithms.velocitune.loader import DynamicMixture
from ghostgram.algorithms.velocitune.mixed import Collate
from ghostgram.algorithms.velocitune.rules.base import Reweighter
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune
from ghostgram.algorithms.velocitune.targets import Targets
from ghostgram.training.ranks import rank_and_size


def velocitune(
    domains: Mapping[str, Dataset[Any]],
    model: nn.Module,
    eval_sets: Mapping[str, Sequence[Any]],
    targets: Targets | str | Path | None = None,
    *,
    tokens: float,
    global_batch: int,
    preset: str = "robust",
    rule: Reweighter | None = None,
    interval: float = 0.01,
    prior: str | float | ArrayLike = "proportional",
    lengths: ArrayLike | None = None,
    loss: Loss | None = None,
    eval_batch: int = 8,
    rank: int | None = None,
    world: int | None = None,
    accumulation: int = 1,
    lookahead: int = 0,
    seed: int = 0,
    parameters: int | None = None,
    log: str | Path | None = None,
    collate_fn: Collate | None = None,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
) -> DomainSampler:
    """Batches of several domains, whose weights follow how far each still is from the loss it is predicted to reach.

    Every `interval` of the tokens the model is evaluated on held-out sequences of each domain, and

        w_i <- w_i exp(eta V_i) / sum_j w_j exp(eta V_j),    V_i = clamp((l_i - target_i) / (l0_i - target_i), 0, 1).

    Which samples a batch holds depends on the seed and on the weights alone: not on ranks, workers or restarts.

    Examples:
        >>> sampler = gg.velocitune(domains, model, held_out, "targets.json", tokens=10**9, global_batch=64)
        ... # doctest: +SKIP
        >>> for batch in sampler:  # ends when the tokens are spent
        ...     loss(model, batch.data).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     save(model, optimizer, sampler.state_dict())
        >>> sampler.weights, sampler.export().mean

    Args:
        domains: Map-style datasets by name; the order is part of the run. Samples are rows of token numbers or mappings
            with `input_ids`, or `lengths` are given.
        model: The model in training, as in `NextTokenLoss` if `loss` is None.
        eval_sets: Held-out sequences by domain, of the same names in the same order.
        targets: As `estimate_targets` makes them, or the file that they were saved to; None if `rule` is given.
        tokens: Of the whole run, over all ranks; after them the iteration ends.
        global_batch: Samples of an optimizer step, over all ranks and micro-batches.
        preset: "robust" or "paper", see `Velocitune`.
        rule: Another rule than Velocitune by its preset; its guards go with it.
        interval: Share of the tokens between updates. Of no meaning for rules that are updated after every step.
        prior: w_0: "proportional", "uniform", a temperature, or numbers.
        lengths: (K,) mean tokens of a sample; None where equal.
        loss: From sequences to their `Sums`, for models that are no causal language models.
        eval_batch: Sequences that are evaluated at once.
        rank: This process's; None to ask torch.distributed.
        world: Number of processes; None to ask torch.distributed.
        accumulation: Micro-batches of an optimizer step.
        lookahead: Batches that a loop fetches before it trains on them: 1 in Lightning.
        seed: Of orders and draws.
        parameters: Weights of the model, embeddings aside, to log FLOPs by.
        log: A folder for the rows of every update.
        collate_fn: From a list of samples to what the model takes; None for torch's default.
        num_workers: Worker processes that read samples.
        prefetch_factor: Batches that each of them has in hand.

    Returns:
        The sampler, to be iterated over once; `weights`, `export()` and `state_dict()` are its own.

    Raises:
        ValueError: Names differ, numbers are out of range, or the rule reads what this loop does not observe.

    Cost:
        An evaluation is 2 N T FLOPs of a model of N weights on T tokens: all together should take less than 2 % of
        the training's 6 N D FLOPs, or an alarm says so. The rest is microseconds a batch.

    Source:
        arXiv 2411.14318, section 3. It is silent about repetition, noise and degenerate gaps: `docs/algorithms/
        velocitune.md` says what is ours.
    """
    names = list(domains)
    if list(eval_sets) != names:
        raise ValueError(f"eval_sets: expected sequences of {names} in this order, got {list(eval_sets)}")
    if not tokens > 0 or not 0 < interval <= 1:
        raise ValueError(
            f"tokens, interval: expected a positive number and a share in (0, 1], got {tokens}, {interval}"
        )
    if rule is None:
        if targets is None:
            raise ValueError("targets: expected them, or a rule that needs none, got neither")
        loaded = targets if isinstance(targets, Targets) else Targets.load(targets)
        rule = Velocitune(loaded, preset, budget=tokens)
    elif targets is not None:
        raise ValueError("targets: expected None beside a rule, which has its own")
    this, every = rank_and_size()
    sizes = {name: len(dataset) for name, dataset in domains.items()}  # type: ignore[arg-type]
    controller = MixtureController(
        sizes,
        rule,
        prior=prior,
        interval_tokens=interval * tokens if rule.cadence == "tokens" else None,
        lengths=lengths,
        budget=tokens,
        parameters=parameters,
        log=log,
    )
    mixture = DynamicMixture(
        domains,
        controller,
        global_batch,
        rank=this if rank is None else rank,
        world=every if world is None else world,
        seed=seed,
        cap=rule.guards.max_epochs,
        lengths=lengths,
        accumulation=accumulation,
        lookahead=lookahead,
    )
    evaluate = partial(evaluate_domains, eval_sets=eval_sets, loss=loss, batch=eval_batch)
    reading = {"collate_fn": collate_fn, "num_workers": num_workers, "prefetch_factor": prefetch_factor}
    return DomainSampler(controller, mixture, model, evaluate, tokens, reading)
