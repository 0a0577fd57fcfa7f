"""Generation, chat, scoring and timing with a checkpoint: a Hugging Face directory, a native one or a training workdir.

python infer.py --checkpoint=DIR --mode=generate --prompt="def fibonacci(n):"
python infer.py --checkpoint=DIR --mode=chat
python infer.py --checkpoint=DIR --mode=score --input=lines.jsonl --logits_npz=logits.npz
python infer.py --preset=v2_lite --mode=bench
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dsv2_jax import cli, config, prompts
from dsv2_jax import model as model_lib
from dsv2_jax.bench import bench
from dsv2_jax.convert import open_checkpoint
from dsv2_jax.fields import InputError
from dsv2_jax.generate import Request, check_tokens, generate, score
from dsv2_jax.model import Decoder
from dsv2_jax.prompts import Prompt
from dsv2_jax.sampling import Sampling, check
from dsv2_jax.tokenizer import TextStream, Tokenizer
from sharding.mesh import make_mesh

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "A Hugging Face directory, a native one, or a training workdir (its latest step).")
flags.DEFINE_string("preset", None, f"Random weights of this size, for bench only: {', '.join(config.PRESETS)}.")
flags.DEFINE_enum("mode", "generate", ["generate", "chat", "score", "bench"], "What to do.")
flags.DEFINE_multi_string("prompt", [], "A prompt; may be given again.")
flags.DEFINE_string("input", None, 'JSONL: {"prompt" | "token_ids" | "messages": ..., "id": ..., and sampling fields}.')
flags.DEFINE_string("output", None, "JSONL file for the results; printed if not given.")
flags.DEFINE_string("logits_npz", None, "score: a file for logits_0, logits_1, ... float32 [n, vocab].")
flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of weights and activations; the checkpoint's if not given.")
flags.DEFINE_integer("max_new_tokens", 128, "At most so many new tokens.")
flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.")
flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of tokens with this mass.")
flags.DEFINE_integer("top_k", 0, "Sample from so many most likely tokens; 0: all.")
flags.DEFINE_float("min_p", 0.0, "Sample from tokens at least so many times as likely as the most likely one.")
flags.DEFINE_float("repetition_penalty", 1.0, "Divides positive logits of tokens in prompt and answer, multiplies others.")
flags.DEFINE_float("presence_penalty", 0.0, "Taken from the logits of tokens in the answer.")
flags.DEFINE_float("frequency_penalty", 0.0, "The same, for each time the token is there.")
flags.DEFINE_multi_string("logit_bias", [], "ID:NUMBER, added to the logit of this token id; may be given again.")
flags.DEFINE_integer("seed", 0, "The same seed, prompt and settings give the same answer in any batch.")
flags.DEFINE_integer("n", 1, "Answers to each prompt.")
flags.DEFINE_multi_string("stop", [], "Text that ends an answer, and is not part of it; may be given again.")
flags.DEFINE_multi_integer("stop_token_ids", [], "A token id that ends an answer, and is part of it; may be given again.")
flags.DEFINE_bool("ignore_eos", False, "Go on to max_new_tokens whatever the model says.")
flags.DEFINE_integer("logprobs", 0, "Report so many of the most likely tokens at each position.")


def main() -> None:
    cli.cache_compilations()
    if FLAGS.mode == "bench" and FLAGS.preset:
        if FLAGS.checkpoint:
            raise InputError("--preset and --checkpoint: expected one of them")
        dtype, tokenizer = FLAGS.dtype or "bfloat16", None
        cfg = config.preset(FLAGS.preset)
    elif FLAGS.preset or not FLAGS.checkpoint:
        raise InputError("--checkpoint is missing" if not FLAGS.preset else "--preset has random weights, for --mode=bench only")
    else:
        weights = open_checkpoint(FLAGS.checkpoint)
        cfg, tokenizer = weights.config, Tokenizer.load(weights.directory)
        # float16 overflows in this model; float32 holds the same values.
        dtype = FLAGS.dtype or ("float32" if weights.dtype == "float16" else weights.dtype)
    fields = {name: getattr(FLAGS, name) for name in prompts.SAMPLING_FIELDS}
    sampling = prompts.to_sampling(fields | {"logit_bias": prompts.parse_biases(FLAGS.logit_bias)}, Sampling())
    check(sampling, cfg.vocab_size, "flags")
    requests = _requests(tokenizer, sampling)
    for request in requests:
        check_tokens(cfg, request.name, request.token_ids, room=0 if FLAGS.mode == "score" else 1)
        check(request.sampling, cfg.vocab_size, request.name)
    if FLAGS.output and FLAGS.logits_npz and os.path.realpath(FLAGS.output) == os.path.realpath(FLAGS.logits_npz):
        raise InputError(f"--output and --logits_npz: both are {FLAGS.output}, expected two files")
    eos_id = cfg.eos_token_id if cfg.eos_token_id is not None or tokenizer is None else tokenizer.eos_id
    with jax.set_mesh(make_mesh()), _fresh("output") as output, _fresh("logits_npz") as logits_npz:
        if FLAGS.preset:
            model = model_lib.init(cfg, FLAGS.seed, jnp.dtype(dtype))
        else:
            model = model_lib.load(weights, dtype)
        if FLAGS.mode == "generate":
            run_generate(model, tokenizer, requests, eos_id, output)
        elif FLAGS.mode == "chat":
            run_chat(model, tokenizer, sampling, eos_id)
        elif FLAGS.mode == "score":
            run_score(model, requests, output, logits_npz)
        else:
            default = [np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, 128)).tolist() for batch in (1, 8)]
            bench(model, [[r.token_ids for r in requests]] if requests else default, sampling.max_new_tokens)


def _requests(tokenizer: Tokenizer | None, sampling: Sampling) -> list[Prompt]:
    if FLAGS.logits_npz is not None and FLAGS.mode != "score":
        raise InputError(f"--logits_npz: --mode={FLAGS.mode} has no logits to write, expected --mode=score")
    if FLAGS.output is not None and FLAGS.mode in ("chat", "bench"):
        raise InputError(f"--output: --mode={FLAGS.mode} writes no lines, expected --mode=generate or score")
    if FLAGS.mode in ("generate", "score") and bool(FLAGS.prompt) == bool(FLAGS.input):
        raise InputError(f"--mode={FLAGS.mode}: expected --prompt or --input, and not both")
    if FLAGS.mode == "chat":
        if tokenizer is None:
            raise InputError("--mode=chat: the checkpoint has no tokenizer.json")
        if FLAGS.input:
            raise InputError(
                "--mode=chat: reads --prompt or the terminal; batches of messages go through --mode=generate --input"
            )
        return []
    if FLAGS.input:
        return prompts.from_jsonl(FLAGS.input, tokenizer, sampling)
    return prompts.from_texts(FLAGS.prompt, tokenizer, sampling)


def run_generate(
    model: Decoder, tokenizer: Tokenizer | None, requests: list[Prompt], eos_id: int | None, output: IO[bytes] | None
) -> None:
    """Writes a JSON line for each request in order; on a terminal, a single --prompt is streamed as text."""
    streaming = output is None and len(FLAGS.prompt) == 1 and sys.stdout.isatty()
    streams = [TextStream(tokenizer, r.sampling.stop) if tokenizer else None for r in requests]
    texts = [""] * len(requests)

    def show(index: int, piece: str) -> None:
        texts[index] += piece
        if streaming:
            print(piece, end="", flush=True)

    def on_token(index: int, token: int) -> bool:
        if streams[index] is None:
            return False
        show(index, streams[index].feed(token))
        return streams[index].stopped is not None

    completions = generate(model, [Request(r.token_ids, r.sampling) for r in requests], eos_id, on_token)
    for index, (request, done) in enumerate(zip(requests, completions)):
        if streams[index] is not None:
            show(index, streams[index].flush())
        line = {"id": request.id, "prompt": request.given, "token_ids": done.token_ids}
        line |= {"text": texts[index]} if tokenizer else {}
        if not streaming:
            _line(line | {"finish_reason": done.finish_reason, "logprobs": done.logprobs}, output)
    if streaming:
        print()


def run_chat(model: Decoder, tokenizer: Tokenizer, sampling: Sampling, eos_id: int | None) -> None:
    """A conversation: each --prompt, or else each line of standard input, is what the user says next."""
    messages: list[dict[str, str]] = []
    for said in FLAGS.prompt or _lines():
        messages.append({"role": "user", "content": said})
        token_ids = tokenizer.render_chat(messages)
        check_tokens(model.cfg, f"turn {len(messages) // 2 + 1}", token_ids, room=1)
        stream = TextStream(tokenizer, sampling.stop)
        answer = ""

        def show(piece: str) -> None:
            nonlocal answer
            piece = piece if answer else piece.removeprefix(" ")  # the model begins with the space the template leaves out
            answer += piece
            print(piece, end="", flush=True)

        def on_token(_: int, token: int, stream: TextStream = stream, show=show) -> bool:
            show(stream.feed(token))
            return stream.stopped is not None

        generate(model, [Request(token_ids, sampling)], eos_id, on_token)
        show(stream.flush())
        print()
        messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            if line := input(prompt):
                yield line


def run_score(model: Decoder, requests: list[Prompt], output: IO[bytes] | None, logits_npz: IO[bytes] | None) -> None:
    """Writes a JSON line for each request: the log-probability of every token but the first, and minus their sum."""
    arrays = zipfile.ZipFile(logits_npz, "w") if logits_npz else None
    scores = score(model, [r.token_ids for r in requests], arrays is not None)
    for index, (request, scored) in enumerate(zip(requests, scores)):
        logprobs = [float(x) for x in scored.logprobs]
        _line({"id": request.id, "logprobs": logprobs, "nll": -math.fsum(logprobs) + 0.0}, output)
        if arrays:  # an .npz is a zip of .npy files; written one by one, it holds one request's logits at a time
            with arrays.open(f"logits_{index}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, scored.logits)
    if arrays:
        arrays.close()


def _line(record: dict[str, Any], output: IO[bytes] | None) -> None:
    text = json.dumps(record, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        output.write(text.encode())


@contextlib.contextmanager
def _fresh(flag: str) -> Iterator[IO[bytes] | None]:
    """A file that takes the place of the flag's path only if all goes well; a device or pipe is written as it is."""
    path = getattr(FLAGS, flag)
    if path is None:
        yield None
        return
    directory = os.path.dirname(os.path.abspath(path))
    if not path or os.path.isdir(path) or not os.path.isdir(directory):
        raise InputError(f"--{flag}={path}: expected a file in a directory that exists")
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(dir=directory, prefix=os.path.basename(path), delete_on_close=False) as file:
        yield file
        file.close()
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(file.name, 0o666 & ~umask)  # a temporary file is its owner's alone
        os.replace(file.name, path)


if __name__ == "__main__":
    cli.run(main)
