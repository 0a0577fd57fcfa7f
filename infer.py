"""Generation, chat, scoring and timing with a checkpoint: a Hugging Face directory, a native one or a training workdir.

python infer.py --checkpoint=DIR --mode=generate --prompt="def fibonacci(n):"
python infer.py --checkpoint=DIR --mode=chat
python infer.py --checkpoint=DIR --mode=score --input=lines.jsonl --logits_npz=logits.npz
python infer.py --preset=v2_lite --mode=bench
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import IO

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dsv2_jax import cli, config, prompts
from dsv2_jax import model as model_lib
from dsv2_jax.bench import bench
from dsv2_jax.config import InputError
from dsv2_jax.convert import open_checkpoint
from dsv2_jax.generate import Request, check_tokens, generate, score
from dsv2_jax.model import Decoder
from dsv2_jax.prompts import Prompt
from dsv2_jax.sampling import Sampling
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
flags.DEFINE_integer("seed", 0, "The same seed, prompt and settings give the same answer in any batch.")
flags.DEFINE_multi_string("stop", [], "Text that ends an answer, and is not part of it; may be given again.")
flags.DEFINE_bool("ignore_eos", False, "Go on to max_new_tokens whatever the model says.")


def main() -> None:
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
    sampling = Sampling(
        **{name: getattr(FLAGS, name) for name in prompts.SAMPLING_FIELDS if name != "stop"}, stop=tuple(FLAGS.stop)
    )
    requests = _requests(tokenizer, sampling)
    for request in requests:
        check_tokens(cfg, request.name, request.token_ids, room=0 if FLAGS.mode == "score" else 1)
    with jax.set_mesh(make_mesh()), _output() as output, _fresh(FLAGS.logits_npz) as logits_npz:
        if FLAGS.preset:
            model = model_lib.init(cfg, FLAGS.seed, jnp.dtype(dtype))
        else:
            model = model_lib.load(weights, dtype)
        if FLAGS.mode == "generate":
            run_generate(model, tokenizer, requests, output)
        elif FLAGS.mode == "chat":
            run_chat(model, tokenizer, sampling)
        elif FLAGS.mode == "score":
            run_score(model, requests, output, logits_npz)
        else:
            default = [[[n % cfg.vocab_size for n in range(128)]] * batch for batch in (1, 8)]
            bench(model, [[r.token_ids for r in requests]] if requests else default, sampling.max_new_tokens)


def _requests(tokenizer: Tokenizer | None, sampling: Sampling) -> list[Prompt]:
    if FLAGS.mode in ("generate", "score") and bool(FLAGS.prompt) == bool(FLAGS.input):
        raise InputError(f"--mode={FLAGS.mode}: expected --prompt or --input, and not both")
    if FLAGS.mode == "chat":
        if tokenizer is None:
            raise InputError("--mode=chat: the checkpoint has no tokenizer.json")
        if FLAGS.input or FLAGS.output:
            raise InputError(
                "--mode=chat: reads --prompt or the terminal; batches of messages go through --mode=generate --input"
            )
        return []
    if FLAGS.logits_npz and FLAGS.mode != "score":
        raise InputError(f"--logits_npz: --mode={FLAGS.mode} has no logits to write, expected --mode=score")
    if FLAGS.input:
        return prompts.from_jsonl(FLAGS.input, tokenizer, sampling)
    return prompts.from_texts(FLAGS.prompt, tokenizer, sampling)


def run_generate(model: Decoder, tokenizer: Tokenizer | None, requests: list[Prompt], output: IO[str] | None) -> None:
    """Writes a JSON line for each request in order; a single --prompt without --output is streamed as text."""
    streaming = output is None and len(FLAGS.prompt) == 1
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

    eos_id = model.cfg.eos_token_id if model.cfg.eos_token_id is not None or tokenizer is None else tokenizer.eos_id
    completions = generate(model, [Request(r.token_ids, r.sampling) for r in requests], eos_id, on_token)
    for index, (request, done) in enumerate(zip(requests, completions)):
        if streams[index] is not None:
            show(index, streams[index].flush())
        line = {"id": request.id, "prompt": request.given, "token_ids": done.token_ids}
        line |= {"text": texts[index]} if tokenizer else {}
        if not streaming:
            print(
                json.dumps(line | {"finish_reason": done.finish_reason, "logprobs": done.logprobs}, ensure_ascii=False),
                file=output,
            )
    if streaming:
        print()


def run_chat(model: Decoder, tokenizer: Tokenizer, sampling: Sampling) -> None:
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

        generate(model, [Request(token_ids, sampling)], model.cfg.eos_token_id, on_token)
        show(stream.flush())
        print()
        messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            if line := input(prompt):
                yield line


def run_score(model: Decoder, requests: list[Prompt], output: IO[str] | None, logits_npz: str | None) -> None:
    """Writes a JSON line for each request: the log-probability of every token but the first, and minus their sum."""
    logits = {}
    for index, (request, scored) in enumerate(
        zip(requests, score(model, [r.token_ids for r in requests], logits_npz is not None))
    ):
        logprobs = [float(x) for x in scored.logprobs]
        print(json.dumps({"id": request.id, "logprobs": logprobs, "nll": -sum(logprobs)}), file=output)
        if logits_npz:
            logits[f"logits_{index}"] = scored.logits
    if logits_npz:
        with open(logits_npz, "wb") as file:
            np.savez(file, **logits)


@contextlib.contextmanager
def _fresh(path: str | None) -> Iterator[str | None]:
    """A temporary file that takes the place of `path` only if all goes well."""
    if path is None:
        yield None
        return
    partial = f"{path}.partial"
    try:
        open(partial, "wb").close()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


@contextlib.contextmanager
def _output() -> Iterator[IO[str] | None]:
    with _fresh(FLAGS.output) as path:
        if path is None:
            yield None
            return
        with open(path, "w", encoding="utf-8") as file:
            yield file


if __name__ == "__main__":
    cli.run(main)
