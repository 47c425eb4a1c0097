"""Whether distilled digits teach more than real ones: a few minutes, so only with -m long."""

import statistics

import pytest
import torch

import ghostgram as gg
from ghostgram.algorithms.pad.state import read_log
from ghostgram.data import DomainUnavailable, load_images


@pytest.mark.long
def test_distilled_digits_teach_more_than_as_many_real_ones(tmp_path):
    try:
        found = load_images("digits")
    except DomainUnavailable as why:
        pytest.skip(str(why))
    made = gg.pad(
        torch.from_numpy(found.train_images), torch.from_numpy(found.train_labels), tmp_path, preset="digits-1",
        test=(found.test_images, found.test_labels), iterations=150, eval_every=0, full_epochs=0, progress=False,
    )  # fmt: skip
    learned = made.results["test"]["distilled"]
    for control in ("random images, hard labels", "random images, experts' labels", "k-centre images, hard labels"):
        other = made.results["test"][control]
        spread = max(statistics.stdev(learned), statistics.stdev(other))
        assert statistics.fmean(learned) - statistics.fmean(other) > 2 * spread, control
    early = [row["losses"][0] for row in read_log(tmp_path) if row["kind"] == "step" and row["bound"] == 12]
    assert len(early) > 40  # after the range of start epochs has stopped to grow, and with it what is asked
    assert statistics.fmean(early[-25:]) < statistics.fmean(early[:25])
