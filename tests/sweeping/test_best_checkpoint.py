"""A member keeps its best checkpoint beside its last one, as the same run alone does."""

import numpy as np
import pytest
import running


@pytest.mark.slow
def test_a_member_that_gets_worse_keeps_the_checkpoint_of_its_best_evaluation(tiny, tmp_path):
    own = (
        "--config.eval.every=1",
        "--config.sample.every=0",
        "--config.checkpoint.every=0",
        "--config.optim.clip_norm=0",
    )
    rates = "--config.sweep.optim.learning_rate=(1e-3,0.07)"
    finished = running.run("sweep", tiny, f"--workdir={tmp_path / 'sweep'}", *own, rates)
    assert finished.code == 0, finished.err
    best = {}
    for rate in ("0.001", "0.07"):
        member = tmp_path / "sweep" / "members" / f"learning_rate={rate}"
        losses = {line["step"]: line["eval/loss"] for line in running.metrics(member) if "eval/loss" in line}
        best[rate] = min(losses, key=losses.get)
        kept = {int(folder.name) for folder in (member / "checkpoints").iterdir()}
        assert kept == {best[rate], 6} - {0}
    assert best["0.07"] not in (0, 6), "the member does not get worse: the test shows nothing"

    alone = tmp_path / "alone"
    assert running.run("train", tiny, f"--workdir={alone}", *own, "--config.optim.learning_rate=0.07").code == 0
    step = best["0.07"]
    member = tmp_path / "sweep" / "members" / "learning_rate=0.07"
    found, expected = (running.arrays(folder, step, "adapter") for folder in (member, alone))
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)
    moments, expected = (running.arrays(folder, step, "opt_state") for folder in (member, alone))
    assert moments.keys() == expected.keys()
