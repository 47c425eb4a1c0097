"""The Trainer's callback gives the values of a plain loop over the same batches, and leaves training alone."""

import contextlib
import copy
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pyarrow")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install 'ghostgram[hf]'")
from torch import nn  # noqa: E402

import ghostgram as gg  # noqa: E402
from algorithms.models import VOCABULARY, language_model  # noqa: E402
from algorithms.ranks import on_ranks  # noqa: E402
from ghostgram.integrations.hf import InRunShapleyCallback, causal_lm_losses  # noqa: E402
from integrations.runs import as_launched, assert_same_values, column, together  # noqa: E402

SAMPLES, LENGTH, LR, MAX_NORM = 20, 11, 3e-3, 0.7


def samples(count=SAMPLES, seed=0):
    """Sequences of which some positions are not trained on, so that no two microbatches weigh the same."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, (count, LENGTH))
    labels = np.where(generator.random((count, LENGTH)) < 0.3, -100, tokens)
    labels[:, 0] = -100  # versions differ in whether they count the first label, which nothing predicts
    return [
        {"input_ids": t.tolist(), "labels": label.tolist(), "id": 1000 + 3 * i, "note": "not for the model"}
        for i, (t, label) in enumerate(zip(tokens, labels, strict=True))
    ]


def batch_of(chosen):
    return {name: torch.tensor([sample[name] for sample in chosen]) for name in ("input_ids", "labels")}


HELD_OUT = batch_of(samples(4, seed=1))


def validation(model):
    return model(**HELD_OUT).loss.float()


def make_trainer(folder, model, **arguments):
    """transformers' Trainer on the CPU, with 4 samples in a microbatch and 2 microbatches in a step."""
    given = {
        "output_dir": str(folder / "checkpoints"), "use_cpu": True, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "num_train_epochs": 2, "learning_rate": LR, "max_grad_norm": MAX_NORM,
        "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
        "eval_strategy": "no", "per_device_eval_batch_size": 4, "optim": "adamw_torch",
    } | arguments  # fmt: skip
    arguments = transformers.TrainingArguments(**given)
    return transformers.Trainer(model, arguments, train_dataset=samples(), eval_dataset=samples(6, seed=2))


@pytest.fixture
def trainer(tmp_path):
    """`make_trainer` in a folder of the test's own."""
    return functools.partial(make_trainer, tmp_path)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", torch.float32)


def plain_loop(model, log, optim="adamw_torch", bf16=False, **settings):
    """The same run, written out: the batches of a Trainer's log, its denominators, clipping and schedule."""
    by_id = {sample["id"]: sample for sample in samples()}
    kind = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
    optimizer = kind(model.parameters(), lr=LR, weight_decay=0.0)
    steps = int(log["step"].to_numpy().max()) + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()  # noqa: E731

    def held_out(model):
        with autocast():
            return validation(model)

    def loss(batch, count):
        with autocast():
            return model(**batch, num_items_in_batch=count).loss

    shapley = gg.InRunShapley(model, optimizer, held_out, **settings)
    model.train()
    for step in range(steps):
        rows = [row for row in log.to_pylist() if row["step"] == step]
        microbatches = [
            [row["sample_id"] for row in rows if row["microbatch"] == m]
            for m in sorted({r["microbatch"] for r in rows})
        ]
        batches = [batch_of([by_id[i] for i in ids]) for ids in microbatches]
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        with shapley.step():
            for ids, batch in zip(microbatches, batches, strict=True):
                with shapley.samples(ids, lambda batch=batch: loss(batch, count)):  # noqa: B023
                    loss(batch, count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    shapley.close()
    return shapley


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    ("settings", "optim"), [({}, "sgd"), ({"v_state": "post"}, "adamw_torch"), ({"order": 2}, "adamw_torch")]
)
def test_values_are_those_of_a_plain_loop(model, trainer, settings, optim, bf16):
    """With accumulation, a last step of one microbatch, clipping, a schedule, and evaluation between steps."""
    trained, twin, untouched = (copy.deepcopy(model) for _ in range(3))
    shapley = InRunShapleyCallback(validation, **settings)
    valued = trainer(trained, optim=optim, bf16=bf16, eval_strategy="steps", eval_steps=1)
    shapley.attach(valued)
    valued.train()
    log = shapley.engine.step_log()
    assert sorted(log["sample_id"].to_pylist()) == sorted([sample["id"] for sample in samples()] * 2)
    assert log["microbatch"].to_pylist().count(1) == 16
    assert 0 < min(log["clip"].to_pylist()) < 1
    assert_same_values(shapley.engine, plain_loop(twin, log, optim, bf16, **settings))
    trainer(untouched, optim=optim, bf16=bf16).train()
    for p, q in zip(trained.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5 if not bf16 else 2e-3)


def test_without_accumulation(model, trainer):
    trained, twin = copy.deepcopy(model), copy.deepcopy(model)
    shapley = InRunShapleyCallback(validation, order=2)  # and so late="stored", where replays would round otherwise
    valued = trainer(trained, gradient_accumulation_steps=1)
    shapley.attach(valued)
    valued.train()
    assert shapley.engine.step_log()["microbatch"].to_pylist() == [0] * (2 * SAMPLES)
    assert_same_values(shapley.engine, plain_loop(twin, shapley.engine.step_log(), order=2, late="stored"))


def train_on_a_rank(_rank, folder):
    as_launched()
    shapley = InRunShapleyCallback(validation, order=2)
    run = make_trainer(
        folder, language_model("gpt2", torch.float32), per_device_train_batch_size=2, ddp_backend="gloo",
        save_strategy="steps", save_steps=4, optim="sgd",
    )  # fmt: skip
    shapley.attach(run)
    run.train()
    return shapley.engine.step_log(), shapley.engine.ledger()


def test_two_processes_find_what_one_finds(model, tmp_path):
    """Under DistributedDataParallel, accumulated, with tokens counted over both, and a checkpoint by each."""
    found = together(on_ranks(2, train_on_a_rank, tmp_path))
    assert sorted(found.step_log()["sample_id"].to_pylist()) == sorted([sample["id"] for sample in samples()] * 2)
    assert_same_values(found, plain_loop(copy.deepcopy(model), found.step_log(), "sgd", order=2))
    assert len(list(tmp_path.glob("checkpoints/checkpoint-4/in_run_shapley_*.pt"))) == 2


@pytest.mark.parametrize("late", ["forward", "auto"])
def test_shares_of_the_loss_serve_forward_mode_and_audits(model, trainer, late):
    trained, twin = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"order": 2, "late": late, "audit_every": 2}
    shapley = InRunShapleyCallback(validation, losses=causal_lm_losses, **settings)
    valued = trainer(trained, num_train_epochs=1)
    shapley.attach(valued)
    valued.train()
    audits = shapley.engine.ledger()["audit"].to_pylist()
    assert [audit is not None for audit in audits] == [True, False, True]
    assert all(audit < 1e-4 for audit in audits if audit is not None)
    assert_same_values(shapley.engine, plain_loop(twin, shapley.engine.step_log(), order=2), tolerance=1e-4)


def test_goes_on_from_a_checkpoint_with_every_step_once(model, trainer, tmp_path):
    whole = InRunShapleyCallback(validation, log=tmp_path / "whole")
    run = trainer(copy.deepcopy(model), save_strategy="steps", save_steps=2)
    whole.attach(run)
    run.train()

    stopped = InRunShapleyCallback(validation, log=tmp_path / "stopped", flush_every=1)
    interrupted = trainer(copy.deepcopy(model), save_strategy="steps", save_steps=2)
    stopped.attach(interrupted)
    interrupted.add_callback(StopAt(5))
    interrupted.train()
    assert set(stopped.engine.step_log()["step"].to_pylist()) == set(range(5))

    resumed = InRunShapleyCallback(validation, log=tmp_path / "stopped")
    again = trainer(copy.deepcopy(model), save_strategy="steps", save_steps=2)
    resumed.attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-4"))
    assert resumed.engine.step_log()["step"].to_pylist() == whole.engine.step_log()["step"].to_pylist()
    assert_same_values(resumed.engine, whole.engine)
    a, b = (column(each.engine.ledger(), "cumulative_residual") for each in (resumed, whole))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


class StopAt(transformers.TrainerCallback):
    """Stops after a step, or, with a half, after the first microbatch of the next."""

    def __init__(self, step, half=False):
        self.step, self.half = step, half

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= not self.half and state.global_step == self.step

    def on_substep_end(self, args, state, control, **_):
        control.should_training_stop |= self.half and state.global_step == self.step


def test_a_step_that_is_stopped_half_way_is_dropped(model, trainer):
    shapley = InRunShapleyCallback(validation)
    run = trainer(copy.deepcopy(model))
    shapley.attach(run)
    run.add_callback(StopAt(1, half=True))
    run.train()
    assert set(shapley.engine.step_log()["step"].to_pylist()) == {0}
    assert shapley.engine.ledger()["step"].to_pylist() == [0]


def test_the_last_step_is_measured_before_the_best_model_is_loaded(model, trainer):
    trained, twin = copy.deepcopy(model), copy.deepcopy(model)
    shapley = InRunShapleyCallback(validation)
    run = trainer(
        trained, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False,  # it rises
    )  # fmt: skip
    shapley.attach(run)
    run.train()
    assert run.state.best_global_step == 3
    assert_same_values(shapley.engine, plain_loop(twin, shapley.engine.step_log()))


def test_a_checkpoint_without_values_is_said_aloud(model, trainer, caplog):
    run = trainer(copy.deepcopy(model), save_strategy="steps", save_steps=4)
    run.add_callback(StopAt(4))
    run.train()
    shapley = InRunShapleyCallback(validation)
    late = trainer(copy.deepcopy(model))
    shapley.attach(late)
    late.train(resume_from_checkpoint=True)
    assert "checkpoint-4/in_run_shapley.pt: no such file: valuing starts at step 4" in caplog.text
    assert set(shapley.engine.step_log()["step"].to_pylist()) == {0, 1}


def test_what_cannot_be_is_refused(model, trainer):
    with pytest.raises(TypeError, match="resume"):
        InRunShapleyCallback(validation, resume=True)
    shapley = InRunShapleyCallback(validation)
    with pytest.raises(RuntimeError, match="training has not begun"):
        _ = shapley.engine
    run = trainer(copy.deepcopy(model))
    run.add_callback(shapley)
    with pytest.raises(RuntimeError, match=r"call attach\(trainer\)"):
        run.train()
    shapley.attach(trainer(copy.deepcopy(model)))
    with pytest.raises(RuntimeError, match="it has a trainer already"):
        shapley.attach(run)
    nameless = InRunShapleyCallback(validation, ids="number")
    run = trainer(copy.deepcopy(model))
    nameless.attach(run)
    with pytest.raises(KeyError, match="no column 'number', only input_ids, labels"):
        run.train()
