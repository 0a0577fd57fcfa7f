"""infer.py as a user runs it: a checkpoint in, JSON lines and arrays out, bad input in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import completion, config, model, score, tokenizer
from dsv2_jax.convert import open_checkpoint
from dsv2_jax.fields import InputError
from dsv2_jax.prompts import check_tokens, from_jsonl, parse_biases, to_sampling
from dsv2_jax.sampling import Sampling, check
from dsv2_jax.weights import write_native
from sharding.mesh import make_mesh

ROOT = Path(__file__).parent.parent
CFG = dataclasses.replace(config.tiny(), num_hidden_layers=2, initializer_range=0.1, vocab_size=300)


class ModelWeights:
    """A model in memory as `Weights`."""

    def __init__(self, m, directory):
        self.config, self.dtype, self.directory = m.cfg, "float32", directory
        self.arrays = {name: np.asarray(leaf) for name, leaf in model.parameters(m).items()}
        self.shapes = {name: (a.shape, a.dtype) for name, a in self.arrays.items()}

    def read(self, path, index=()):
        return self.arrays[path][index]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    with jax.set_mesh(make_mesh()):
        write_native(ModelWeights(model.init(CFG, 0, jnp.float32), directory), directory, lambda n: None)
    tokenizer.train(["the quick brown fox jumps over the lazy dog, " * 20], 300).save(directory)
    return directory


@pytest.fixture(scope="module")
def loaded(checkpoint):
    with jax.set_mesh(make_mesh()):
        return model.load(open_checkpoint(checkpoint), "float32")


def infer(checkpoint, *arguments, stdin=None):
    command = [sys.executable, "infer.py", f"--checkpoint={checkpoint}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=stdin, timeout=300)


def lines(path: Path, *objects) -> Path:
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


def test_generate_answers_every_line_in_order_with_its_own_settings(checkpoint, loaded, tmp_path):
    given = lines(
        tmp_path / "in.jsonl",
        {"id": "a", "token_ids": [5, 6, 7], "max_new_tokens": 4},
        {"prompt": "the quick", "ignore_eos": True},
        {"id": 7, "messages": [{"role": "user", "content": "fox"}], "temperature": 0.7, "seed": 3},
    )
    done = infer(checkpoint, "--max_new_tokens=6", f"--input={given}", f"--output={tmp_path / 'out.jsonl'}")
    assert done.returncode == 0, done.stderr
    first, second, third = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert set(first) == {"id", "prompt", "token_ids", "text", "finish_reason", "logprobs"}
    assert (first["id"], second["id"], third["id"]) == ("a", 1, 7)
    assert first["token_ids"] == completion.greedy(loaded, [[5, 6, 7]], 4)[0]
    tok = tokenizer.Tokenizer.load(checkpoint)
    assert second["token_ids"] == completion.greedy(loaded, [tok.encode("the quick")], 6)[0]
    assert second["text"] == tok.decode(second["token_ids"])
    assert len(third["token_ids"]) == len(third["logprobs"]) <= 6
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_8_bit_weights(checkpoint, tmp_path):
    m = model.load(open_checkpoint(checkpoint), "float32", fp8=True)
    (wanted,) = score.score(m, [[5, 6, 7, 8]])
    given = lines(tmp_path / "in.jsonl", {"token_ids": [5, 6, 7, 8]})
    done = infer(checkpoint, "--weights_dtype=fp8", "--mode=score", f"--input={given}")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout)["logprobs"], wanted.logprobs, atol=1e-4)
    done = infer(checkpoint, "--weights_dtype=float32", "--dtype=bfloat16", f"--input={given}")
    assert done.returncode == 2 and done.stderr == "error: --weights_dtype=float32: expected fp8, or what --dtype is, bfloat16\n"


def test_score_and_logits(checkpoint, loaded, tmp_path):
    ids = [[5, 6, 7, 8], [9, 10]]
    given = lines(tmp_path / "in.jsonl", *({"token_ids": i} for i in ids))
    done = infer(checkpoint, "--mode=score", f"--input={given}", f"--logits_npz={tmp_path / 'logits.npz'}")
    assert done.returncode == 0, done.stderr
    arrays = np.load(tmp_path / "logits.npz")
    for index, (sequence, line) in enumerate(zip(ids, map(json.loads, done.stdout.splitlines()))):
        logits = np.asarray(model.trace(loaded, np.array([sequence], np.int32)).logits[0])
        np.testing.assert_allclose(arrays[f"logits_{index}"], logits, atol=1e-4)
        assert arrays[f"logits_{index}"].dtype == np.float32
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(sequence) - 1), sequence[1:]]
        np.testing.assert_allclose(line["logprobs"], expected, atol=1e-4)
        assert line["nll"] == pytest.approx(-sum(line["logprobs"]))


def test_a_stop_string_ends_the_text_before_it(checkpoint):
    free = infer(checkpoint, "--prompt=the", "--max_new_tokens=12", "--ignore_eos")
    assert free.returncode == 0, free.stderr
    text = json.loads(free.stdout)["text"]
    stopped = json.loads(infer(checkpoint, "--prompt=the", "--max_new_tokens=12", "--ignore_eos", f"--stop={text[3:5]}").stdout)
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(text[3:5])], "stop")


def test_chat_keeps_the_conversation(checkpoint):
    done = infer(checkpoint, "--mode=chat", "--max_new_tokens=5", stdin="fox\ndog\n")
    assert done.returncode == 0, done.stderr
    alone = infer(checkpoint, "--mode=chat", "--max_new_tokens=5", "--prompt=dog")
    assert done.stdout.splitlines()[1] != alone.stdout.splitlines()[0]


def test_bench_prints_its_table_and_writes_what_is_in_it(checkpoint, tmp_path):
    done = infer(checkpoint, "--mode=bench", "--grid=64x4x8", "--max_batch=64", f"--output={tmp_path / 'out.jsonl'}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.jsonl").read_text())
    assert (result["batch"], result["prompt"], result["new"]) == (64, 4, 8) and result["steps_timed"] > 2
    assert f"{result['ms_per_step']:.2f}" in done.stdout and result["experts_per_layer"] > 0.9 * result["experts_if_uniform"]


def test_options_of_the_engine(checkpoint, loaded):
    """Several answers a line each, likeliest tokens, a cache of a given size, told at the start."""
    asked = [
        "--n=2",
        "--logprobs=2",
        "--temperature=1.5",
        "--max_new_tokens=4",
        "--cache_tokens=640",
        "--max_batch=2",
        "--ignore_eos",
    ]
    done = infer(checkpoint, "--prompt=the", *asked)
    assert done.returncode == 0, done.stderr
    assert "cache: 640 tokens (float32, " in done.stderr and "2 answers at a time" in done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["index"], second["index"], first["id"]) == (0, 1, second["id"]) and first["token_ids"] != second["token_ids"]
    assert all(len(top) == 2 and top[0]["logprob"] >= top[1]["logprob"] for top in first["top_logprobs"])
    refused = infer(checkpoint, "--prompt=the", "--cache_dtype=int6")
    assert (
        refused.returncode == 2 and refused.stderr == "error: cache_dtype int6: latent_dim is 64, expected 512 for int6 pages\n"
    )


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"token_ids": [1, 300]}', "in.jsonl line 2: token id 300, expected an integer in [0, 299]"),
        ('{"token_ids": []}', "in.jsonl line 2: the prompt is empty"),
        ('{"token_ids": [1], "temprature": 1}', "unknown key 'temprature', did you mean 'temperature'"),
        ('{"token_ids": [1], "top_p": 0}', "in.jsonl line 2: top_p is 0"),
        ('{"token_ids": [1], "stop": [3]}', "in.jsonl line 2: stop is"),
        ('{"token_ids": [1], "stop": {"a": 1}}', "in.jsonl line 2: stop is {'a': 1}, expected non-empty strings"),
        ('{"token_ids": [1], "stop_token_ids": 3}', "in.jsonl line 2: stop_token_ids is 3, expected a list of integers >= 0"),
        (
            '{"token_ids": [1], "stop_token_ids": [300]}',
            "in.jsonl line 2: stop_token_ids has token id 300, expected an integer in",
        ),
        ('{"token_ids": [1], "logit_bias": {"300": 1}}', "in.jsonl line 2: logit_bias has token id 300, expected an integer in"),
        ('{"token_ids": [1], "logit_bias": {"x": 1}}', "in.jsonl line 2: logit_bias has 'x', expected token ids"),
        ('{"token_ids": [1], "logit_bias": {"01": 1}}', "in.jsonl line 2: logit_bias has '01', expected token ids"),
        (
            '{"token_ids": [1], "logit_bias": {"1": "5"}}',
            "in.jsonl line 2: logit_bias of token id 1 is '5', expected a number in",
        ),
        ('{"token_ids": [1], "logit_bias": [[1, 5]]}', "in.jsonl line 2: logit_bias is [[1, 5]], expected"),
        ('{"token_ids": [1], "n": true}', "in.jsonl line 2: n is True, expected an integer"),
        ('{"token_ids": [1], "min_p": 1e999}', "in.jsonl line 2: min_p is inf, expected a number"),
        ('{"token_ids": [1], "prompt": "x"}', "expected exactly one of"),
        ('{"id": 3}', "expected exactly one of"),
        ('{"token_ids": "x"}', "expected a list of integers"),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "in.jsonl line 2"),
        ("{", "in.jsonl line 2: not valid JSON"),
        ("", "in.jsonl line 2: not valid JSON"),
        ("[1]", "in.jsonl line 2: a JSON list, expected an object"),
        ('{"token_ids": [1], "id": NaN}', "NaN is not an accepted number"),
        ('{"token_ids": [1], "token_ids": [2]}', "'token_ids' stands twice"),
        (json.dumps({"token_ids": [1] * 2048}), "the prompt has 2048 tokens, expected at most 2047"),
    ],
)
def test_bad_lines_are_refused_with_their_number(checkpoint, tmp_path, line, told):
    # In-process: starting Python thirteen times would take longer than all other tests of this file.
    file = tmp_path / "in.jsonl"
    file.write_text('{"token_ids": [1]}\n' + line + '\n{"token_ids": [1]}\n')
    with pytest.raises(InputError) as refused:
        for prompt in from_jsonl(str(file), tokenizer.Tokenizer.load(checkpoint), Sampling()):
            check_tokens(CFG, prompt.name, prompt.token_ids, room=1)
            check(prompt.sampling, CFG.vocab_size, prompt.name)
    assert told in str(refused.value)


def test_a_line_may_have_any_field_of_the_sampling(checkpoint, tmp_path):
    others = Sampling(temperature=0.5, stop=("x",), logit_bias={9: 1})
    asked = {"stop": "end", "stop_token_ids": [4, 5], "logit_bias": {"123": 5, "0": -1.5}, "n": 3, "logprobs": 2, "min_p": 0.1}
    asked |= {"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1}
    given = lines(tmp_path / "in.jsonl", {"token_ids": [1]}, {"token_ids": [1], **asked})
    first, second = from_jsonl(str(given), tokenizer.Tokenizer.load(checkpoint), others)
    assert first.sampling == others
    expected = asked | {"stop": ("end",), "stop_token_ids": (4, 5), "logit_bias": {123: 5, 0: -1.5}}
    assert second.sampling == dataclasses.replace(others, **expected)


def test_biases_as_flags_give_them():
    biases = parse_biases(["7:5", "123:-1.5"])
    assert to_sampling({"logit_bias": biases, "stop_token_ids": [3]}, Sampling()) == Sampling(
        logit_bias={7: 5, 123: -1.5}, stop_token_ids=(3,)
    )
    for bad in (["7"], ["7:"], ["7:x"], [":"], ["7:1", "7:2"], ["-7:1"], ["7 :1"], ["7:nan"], ["7:101"], [":1"]):
        with pytest.raises(InputError, match="logit_bias"):
            to_sampling({"logit_bias": parse_biases(bad)}, Sampling())


def test_nothing_is_written_when_a_line_is_bad(checkpoint, tmp_path):
    given = lines(tmp_path / "in.jsonl", {"token_ids": [1]}, {"token_ids": [300]})
    (tmp_path / "out.jsonl").write_text("what was there")
    done = infer(checkpoint, f"--input={given}", f"--output={tmp_path / 'out.jsonl'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "line 2" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == "what was there"


@pytest.mark.parametrize("output", ["", ".", "missing/out.jsonl"])
def test_an_impossible_output_is_refused_before_any_work(checkpoint, output):
    done = infer(checkpoint, "--prompt=x", f"--output={output}")
    assert done.returncode == 2 and done.stderr.startswith(f"error: --output={output}: expected a file")


def test_a_line_may_hold_any_character(checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a\u2028b\x85c"}\n')
    done = infer(checkpoint, f"--input={tmp_path / 'in.jsonl'}", "--max_new_tokens=1", "--output=/dev/stdout")
    assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == "a\u2028b\x85c"


def test_a_model_may_be_loaded_with_other_settings_but_not_other_shapes(checkpoint, loaded):
    weights, ids = open_checkpoint(checkpoint), np.array([[5, 6, 7]], np.int32)
    louder = model.load(weights, "float32", dataclasses.replace(CFG, routed_scaling_factor=64.0))
    assert np.abs(np.asarray(model.trace(louder, ids).logits - model.trace(loaded, ids).logits)).max() > 0.1
    with pytest.raises(InputError, match=r"wrong shape: .*embed is "):
        model.load(weights, "float32", dataclasses.replace(CFG, hidden_size=64))
