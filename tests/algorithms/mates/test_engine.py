"""Engines do every unit once as far as files tell, whoever dies when; and leave nobody behind."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from algorithms.mates import killing, tiny
from algorithms.mates.killing import rows
from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.scoring import score as scoring
from ghostgram.algorithms.mates.scoring.engine import EngineError, run_units
from ghostgram.algorithms.mates.scoring.score import score

TESTS = Path(__file__).parents[2]
SHARDS, DOCUMENTS = 10, 400


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    for shard in range(SHARDS):
        chance = random.Random(shard)
        (folder / f"{shard}.jsonl").write_text("".join(
            f'{{"text": "{shard} {i} {"w " * chance.randrange(200)}", "source": "{chance.choice("ab")}", "n": {i}}}\n'
            for i in range(DOCUMENTS)
        ))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """Every file of a run that nobody disturbed."""
    pool = Pool(f"{texts}/*.jsonl", domain="source", n_tokens="n")
    return files(score(pool, tiny.Tiny(nap=0.004), tmp_path_factory.mktemp("run"), tiny.load, workers=2).folder)


def test_worker_killed_at_every_named_point_costs_nothing(texts, whole, tmp_path, monkeypatch):
    points = [(point, file) for point in killing.POINTS for file in killing.ENDS]
    deadly = dict(zip([f"{unit:06d}" for unit in range(SHARDS)], points, strict=True))
    real = scoring.run_units

    def run(stage, units, make, **named):
        return real(stage, units, partial(tiny.make_deadly, make, tmp_path, deadly), **named)

    monkeypatch.setattr(scoring, "run_units", run)
    pool = Pool(f"{texts}/*.jsonl", domain="source", n_tokens="n")
    stage = score(pool, tiny.Tiny(nap=0.004), tmp_path / "run", tiny.load, workers=3)
    assert {path.name for path in tmp_path.iterdir()} == {"run", *deadly}  # all of them died
    assert files(stage.folder) == whole


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_run_killed_at_random_moments_ends_with_the_same_files(texts, whole, tmp_path):
    chance, kills, workers = random.Random(5), 0, []
    while True:
        command = [sys.executable, tiny.__file__, str(texts), str(tmp_path), "3"]
        run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(TESTS)}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
        try:
            assert run.stdout.readline() == "going\n", run.communicate()[1]
            started = []
            reader = threading.Thread(target=lambda run=run, started=started: started.extend(map(int, run.stdout)))
            reader.start()
            while run.poll() is None and len(started) < 3:
                time.sleep(0.005)
            if kills < 2:
                time.sleep(chance.uniform(0, 0.06))
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(started), signal.SIGKILL)
                time.sleep(chance.uniform(0, 0.06))
                run.kill()
            errors = run.stderr.read()
            run.wait(60)
        finally:
            run.kill()
            reader.join()
        workers += started
        if run.returncode == 0:
            break
        assert kills < 2, errors
        kills += 1
    assert kills >= 1  # else they came too late
    (folder,) = (tmp_path / "stage-1" / "score").iterdir()
    assert files(folder) == whole
    until = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < until:  # those whose parent was killed
        time.sleep(0.01)
    assert not any(map(alive, workers))


def test_three_processes_that_share_the_units_may_each_be_killed_at_any_time(texts, whole, tmp_path):
    script = [sys.executable, str(Path(__file__).parent / "storm.py"), str(texts), str(tmp_path), "50"]
    done = subprocess.run(
        script, env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "50\n"), done.stderr
    (folder,) = (tmp_path / "stage-1" / "score").iterdir()
    assert {name: data for name, data in files(folder).items() if not name.startswith("scorer")} == {
        name: data for name, data in whole.items() if not name.startswith("scorer")
    }


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "run", 1, "label", "abc")


def test_unit_that_always_kills_its_process_ends_the_run_after_three(stage, tmp_path):
    units = dict.fromkeys(["poison"])
    with pytest.raises(EngineError, match="unit poison: its process died 3 times, the last one with exit code -9"):
        run_units(stage, units, partial(tiny.make_poisoned, tmp_path), inputs={"poison": "a"}, workers=2)
    assert len(list(tmp_path.glob("poison-*"))) == 3


def test_unit_that_fails_ends_the_run_with_what_was_wrong(stage):
    with pytest.raises(EngineError, match=r"unit wrong: 1 is wrong\n\nTraceback"):
        run_units(stage, {"wrong": 1}, tiny.make_failing, inputs={"wrong": "a"}, workers=1)
    with pytest.raises(EngineError, match="unit idle: returned without a commit that holds"):
        run_units(stage, {"idle": 2}, tiny.make_failing, inputs={"idle": "a"}, workers=1)


def test_only_what_holds_is_left_alone(stage):
    stage.commit("a", rows(5, 0), input="1")
    stage.commit("b", rows(5, 0), input="2")
    make = partial(tiny.make_commit, stage, rows(9, 1), "1")
    done = run_units(stage, {"a": "x", "b": "y"}, make, inputs={"a": "1", "b": "1"}, workers=1)
    assert [(each.rows, each.sums) for each in done.values()] == [(5, {}), (9, {"described": "y"})]


@pytest.mark.parametrize("wrong", [{"engine": "spark"}, {"workers": 0}, {"gpus": -1}])
def test_what_is_out_of_range_is_refused(stage, wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}.*: expected"):
        run_units(stage, {"a": 1}, tiny.make_failing, inputs={"a": "1"}, **wrong)


def test_without_ray_its_engine_says_what_to_install(stage, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'ghostgram\[ray\]'"):
        run_units(stage, {"a": 1}, tiny.make_failing, inputs={"a": "1"}, engine="ray")


@pytest.mark.parametrize(("visible", "gpus", "seen"), [(None, 2, "0101"), ("4,7", 2, "4747"), (None, 0, ["", ""])])
def test_workers_share_the_gpus(monkeypatch, visible, gpus, seen):
    from ghostgram.algorithms.mates.scoring.engine import _environment

    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for place, device in enumerate(seen):
        with _environment(place, gpus):
            assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]) == (device, "1")
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
        assert "OMP_NUM_THREADS" not in os.environ


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine, of two CPUs."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the Ray engine: ray is not installed")
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))  # its processes inherit it, and find the work that these tests give them
        ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False,
                 logging_level="error")  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture
def two_minutes():
    """Ray waits for ever where it has not what it needs."""

    def stop(*_):
        raise TimeoutError("Ray: more than two minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("cluster", "two_minutes")
def test_ray_gives_the_same_files_though_a_worker_is_killed(texts, whole, tmp_path, monkeypatch):
    deadly = {"000001": ("mid-write", "part")}
    real = scoring.run_units

    def run(stage, units, make, **named):
        return real(stage, units, partial(tiny.make_deadly, make, tmp_path, deadly), **named)

    monkeypatch.setattr(scoring, "run_units", run)
    pool = Pool(f"{texts}/*.jsonl", domain="source", n_tokens="n")
    stage = score(pool, tiny.Tiny(nap=0.004), tmp_path / "run", tiny.load, engine="ray", workers=2)
    assert (tmp_path / "000001").exists()
    assert files(stage.folder) == whole


@pytest.mark.usefixtures("cluster", "two_minutes")
def test_ray_ends_a_run_whose_unit_fails_or_always_kills_its_process(stage, tmp_path):
    with pytest.raises(EngineError, match="1 is wrong"):
        run_units(stage, {"wrong": 1}, tiny.make_failing, inputs={"wrong": "a"}, engine="ray", workers=1)
    with pytest.raises(EngineError, match="unit poison: its process died 3 times"):
        make = partial(tiny.make_poisoned, tmp_path)
        run_units(stage, {"poison": 1}, make, inputs={"poison": "a"}, engine="ray", workers=1)
    assert len(list(tmp_path.glob("poison-*"))) == 3
