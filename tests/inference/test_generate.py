"""The generating command, and the object that `lowrank.load` gives: the published text of a real model, to the id."""

import dataclasses
import json
import re
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import running
import safetensors.numpy

import lowrank
from lowrank.data.prompts import ALPACA
from lowrank.errors import UserError
from lowrank.generation.decode import Sampling, generate_ids

PROMPTS = ["One morning Flora had a feast.", "One", "One morning Oscar met Maya at the fair. Oscar carries", ""]


@pytest.fixture(scope="module")
def base(demo_base):
    return demo_base


@pytest.fixture(scope="module")
def stories(shared_data):
    """A base of somebody else's, whose text and logits are published."""
    return shared_data / "stories260k" / "hf"


@pytest.fixture(scope="module")
def expected(shared_data):
    return json.loads((shared_data / "stories260k" / "expected.json").read_text())


@pytest.fixture(scope="module")
def model(base):
    return lowrank.load(base)


def generate(base, *arguments, **options):
    finished = running.run("generate", f"--base={base}", *arguments, **options)
    assert finished.code == 0, finished.err
    return finished


def test_greedy_ids_are_the_published_ones(stories, expected):
    model = lowrank.load(stories)
    ids = [1]
    for tokens in generate_ids(model.model, model.variables, [[1]], len(expected["greedy_ids"]) - 1, Sampling()):
        ids.append(int(tokens[0]))
    assert ids == expected["greedy_ids"]


def test_logits_are_the_published_ones(stories, expected):
    model = lowrank.load(stories)
    logits = np.asarray(model.logits([expected["prompt_ids"]]))
    assert logits.shape == (1, 16, 512) and logits.dtype == np.float32
    # Float32 on both sides; PyTorch's sums are taken in another order.
    np.testing.assert_allclose(logits[0, -1], expected["logits_last_token"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits.mean(), expected["logits_mean"], atol=1e-4, rtol=0)


def test_the_command_prints_the_published_text_and_nothing_else(stories, expected):
    tokens = len(expected["greedy_ids"]) - 1
    finished = generate(stories, "--prompt=", f"--max_new_tokens={tokens}")
    assert finished.out == expected["greedy_text"] + "\n" and finished.err == ""


def test_cached_generation_is_the_argmax_of_the_full_logits(model):
    """Step by step: the cache holds what a forward pass over the whole text computes."""
    prompt = model.encode("Once upon a time, Tom")
    made = [int(tokens[0]) for tokens in generate_ids(model.model, model.variables, [prompt], 40, Sampling())]
    logits = np.asarray(model.logits([prompt + made]))[0]
    assert made == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_batch_of_unequal_prompts_is_each_alone(model):
    together = model.generate(PROMPTS, max_new_tokens=24)
    assert together == [model.generate(prompt, max_new_tokens=24)[0] for prompt in PROMPTS]
    assert len(set(together)) == 4


def test_streamed_pieces_join_to_the_whole(model):
    pieces = list(model.stream(PROMPTS, max_new_tokens=24))
    joined = ["".join(piece for row, piece in pieces if row == i) for i in range(len(PROMPTS))]
    assert joined == model.generate(PROMPTS, max_new_tokens=24)
    assert len(pieces) > 40 and all(piece for _, piece in pieces)


def test_sampling_is_decided_by_the_seed(model):
    def sampled(**sampling):
        return model.generate(PROMPTS, max_new_tokens=24, **({"temperature": 1.0} | sampling))

    assert sampled(seed=1) == sampled(seed=1)
    assert sampled(seed=1) != sampled(seed=2)
    greedy = model.generate(PROMPTS, max_new_tokens=24)
    assert sampled(seed=1) != greedy
    # Where only one token is left to draw from, it is the likeliest.
    assert sampled(top_k=1, seed=1) == greedy
    assert sampled(top_p=1e-6, seed=1) == greedy
    assert sampled(temperature=1e-4, seed=1) == greedy


def test_what_is_drawn_depends_on_a_prompts_number_and_on_no_batch(model):
    sampling = {"max_new_tokens": 16, "temperature": 1.0, "seed": 1}
    together, later = (model.generate(["Once"] * 4, first=first, **sampling) for first in (0, 2))
    assert len(set(together)) == 4
    assert together[2:] == later[:2]
    assert together[2:3] == model.generate(["Once"], first=2, **sampling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0, "top_k": -5}, "temperature=-1.0 must be 0 or more; top_k=-5 must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be 0 or more and below"),
        ({"stop": [""]}, "stop holds an empty text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be 1 or more"),
    ],
)
def test_options_that_would_give_wrong_texts_are_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        model.generate("Once", **options)


def test_a_stop_may_be_one_text(model):
    (text,) = model.generate("Once upon a time, Tom", max_new_tokens=24)
    word = text.split()[2]
    assert model.generate("Once upon a time, Tom", max_new_tokens=24, stop=word) == [text.partition(word)[0]]


def test_a_sampled_row_does_not_depend_on_the_length_of_its_neighbour(model):
    short, long = PROMPTS[0], "Once upon a time " * 20  # more than 64 tokens: another width of the padded prompts
    sampling = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3}
    among = model.generate([short, long, short, short], **sampling)
    assert among[0] == model.generate([short] * 4, **sampling)[0]


def test_top_k_and_top_p_leave_out_what_they_say(model):
    """64 rows, in fours, draw a first token each; all of them are among the kept ones, and more than one is drawn."""
    prompt = model.encode("One morning")
    logits = np.asarray(model.logits([prompt]))[0, -1]
    ranked = np.argsort(-logits)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    nucleus = ranked[: 1 + int(np.searchsorted(np.cumsum(probabilities[ranked]), 0.8))]
    for sampling, kept in ((Sampling(2.0, top_k=3), ranked[:3]), (Sampling(1.0, top_p=0.8), nucleus)):
        seeds = [dataclasses.replace(sampling, seed=seed) for seed in range(16)]
        rows = [next(generate_ids(model.model, model.variables, [prompt] * 4, 1, each)) for each in seeds]
        drawn = np.concatenate(rows).tolist()
        assert set(drawn) <= set(kept.tolist()) and len(set(drawn)) > 1


@pytest.mark.parametrize("stop", [" in the barn", "frog", "barns", "oin"])
def test_a_stop_string_ends_the_text_and_is_left_out(model, stop):
    """Also where it is split over tokens, and where its beginning turns up first without the rest."""
    whole = model.generate(PROMPTS[0], max_new_tokens=40)[0]
    begins = whole.find(stop)
    wanted = whole if begins < 0 else whole[:begins]
    pieces = [piece for _, piece in model.stream(PROMPTS[:1], max_new_tokens=40, stop=["never in the", stop])]
    assert "".join(pieces) == wanted
    assert stop not in "".join(pieces)


def test_stop_strings_are_found_in_the_published_text(stories):
    assert (
        generate(stories, "--prompt=Once upon a time", "--stop=girl", "--stop=zebra").out == ", there was a little \n"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "One morning\n\nLily\n"),
        ("p.jsonl", '{"prompt": "One morning"}\n{"instruction": "Lily", "output": "ignored"}\n'),
    ],
)
def test_prompts_come_from_a_file(base, model, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    out = generate(base, f"--prompts={tmp_path / name}", "--max_new_tokens=8").out
    first, second = model.generate(["One morning", "Lily"], max_new_tokens=8)
    assert out == f"=== 1\n{first}\n=== 2\n{second}\n"
    assert generate(base, f"--prompts={tmp_path / name}", "--max_new_tokens=8", "--batch_size=1").out == out


def test_an_alpaca_prompt_with_its_input(base, model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"instruction": "Add.", "input": "1 and 2"}\n')
    by_file = generate(base, f"--prompts={tmp_path / 'p.jsonl'}", "--format=alpaca", "--max_new_tokens=8").out
    by_flags = generate(base, "--prompt=Add.", "--input=1 and 2", "--format=alpaca", "--max_new_tokens=8").out
    assert by_file == by_flags
    without = generate(base, "--prompt=Add.", "--format=alpaca", "--max_new_tokens=8").out
    assert without == model.generate(ALPACA.format(instruction="Add."), max_new_tokens=8)[0] + "\n"


def test_chat_sees_the_turns_before_until_it_is_reset(base):
    said = generate(base, "--chat", "--max_new_tokens=8", stdin="Hello\nHello\n/reset\nHello\n\n/exit\nnever\n")
    first, second, third = said.out.splitlines()
    assert first == third != second
    assert said.err == "/reset begins anew, /exit or Ctrl-D ends.\n"
    ended = generate(base, "--chat", "--max_new_tokens=8", stdin="Hello\n")  # by Ctrl-D
    assert ended.out.splitlines()[0] == first


def test_chat_outlives_a_turn_that_is_too_long(base):
    said = generate(base, "--chat", "--max_new_tokens=8", stdin=f"{'long ' * 400}\nHello\n/exit\n")
    assert len(said.out.splitlines()) == 1
    assert re.search(r"error: a prompt of \d+ tokens leaves no room: the model reads 512.*/reset", said.err)


def test_an_adapter_is_loaded_from_a_workdir_and_from_a_peft_folder(base, model, trained, tmp_path):
    peft = tmp_path / "peft"
    assert running.run("export", f"--workdir={trained}", "--format=peft", f"--to={peft}").code == 0
    ids = [model.encode("Once upon a time")]
    adapted = np.asarray(lowrank.load(base, trained).logits(ids))
    assert np.array_equal(adapted, lowrank.load(base, peft).logits(ids))
    assert not np.allclose(adapted, model.logits(ids))
    by_workdir = generate(base, f"--adapter={trained}", "--prompt=Name a colour.", "--max_new_tokens=1")
    assert "prompts are put into the adapter's format: completion" in by_workdir.err
    by_peft = generate(base, f"--adapter={peft}", "--prompt=Name a colour.", "--max_new_tokens=1")
    assert by_workdir.out == by_peft.out and by_peft.err == ""


def test_bfloat16_is_asked_for(base):
    model = lowrank.load(base, dtype="bfloat16")
    assert model.variables["params"]["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    assert model.logits([[1, 2]]).dtype == jnp.float32


def test_a_text_ends_where_the_model_can_read_no_further(model):
    prompt = "One morning " * 220
    count = len(model.encode(prompt))
    assert 400 < count < 512
    made = [piece for _, piece in model.stream([prompt], max_new_tokens=200)]
    assert 0 < len(made) <= 512 - count


def test_an_adapter_over_other_weights_is_warned_of(base, trained, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowrank.load(base, trained)
    other = shutil.copytree(base, tmp_path / "other")
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    (other / "model.safetensors").chmod(0o644)
    safetensors.numpy.save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="trained over other weights"):
        lowrank.load(other, trained)


def test_chat_says_if_the_adapter_was_not_trained_for_it(base, trained):
    finished = running.run("generate", f"--base={base}", f"--adapter={trained}", "--chat", stdin="/exit\n")
    assert finished.code == 0
    assert "trained in the completion format, not for chat" in finished.err
    refused = running.run("generate", f"--base={base}", "--chat", "--format=text")
    assert refused.code == 1 and "--format=text does not go with --chat" in refused.err
