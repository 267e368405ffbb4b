"""`--profile` of a sweep traces steps of the first wave that trains."""

import running

SHORT = ("--config.eval.every=3", "--config.sample.every=0", "--config.checkpoint.every=0", "--config.train.steps=3")


def test_a_sweep_is_traced_and_says_where(tiny, tmp_path):
    rates = "--config.sweep.optim.learning_rate=(1e-3,3e-3)"
    finished = running.run("sweep", tiny, f"--workdir={tmp_path / 'sweep'}", *SHORT, rates, "--profile=2:3")
    assert finished.code == 0, finished.err
    assert f"profile of steps 2 to 3 in {tmp_path / 'sweep' / 'profile'}" in finished.out
    assert list((tmp_path / "sweep" / "profile").rglob("*.xplane.pb"))


def test_steps_that_no_wave_has_are_refused_before_there_is_a_workdir(tiny, tmp_path):
    rates = "--config.sweep.optim.learning_rate=(1e-3,3e-3)"
    finished = running.run("sweep", tiny, f"--workdir={tmp_path / 'sweep'}", *SHORT, rates, "--profile=2:9")
    assert finished.code == 1 and "this run ends at step 3" in finished.err
    assert not (tmp_path / "sweep").exists()
