"""Generation, chat, scoring and timing with a checkpoint: a Hugging Face directory, a native one or a training workdir.

python infer.py --checkpoint=DIR --mode=generate --prompt="def fibonacci(n):"
python infer.py --checkpoint=DIR --mode=chat
python infer.py --checkpoint=DIR --mode=score --input=lines.jsonl --logits_npz=logits.npz
python infer.py --preset=v2_lite --mode=bench --grid=64x1024x256
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
from jax.sharding import Mesh

from dsv2_jax import cli, config, prompts
from dsv2_jax import model as model_lib
from dsv2_jax.bench import bench, parse_load
from dsv2_jax.cache import FORMATS
from dsv2_jax.completion import complete
from dsv2_jax.config import ModelConfig
from dsv2_jax.convert import WEIGHTS_DTYPES, open_checkpoint
from dsv2_jax.engine import Engine, Output
from dsv2_jax.fields import InputError
from dsv2_jax.model import Decoder
from dsv2_jax.prompts import Prompt, check_tokens
from dsv2_jax.sampling import Sampling, check
from dsv2_jax.score import score
from dsv2_jax.tokenizer import TextStream, Tokenizer
from pallas_kernels.latent_pages import PAGE
from sharding.mesh import make_mesh, parse_mesh

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "A Hugging Face directory, a native one, or a training workdir (its latest step).")
flags.DEFINE_string("preset", None, f"Random weights of this size, for bench only: {', '.join(config.PRESETS)}.")
flags.DEFINE_enum("mode", "generate", ["generate", "chat", "score", "bench"], "What to do.")
flags.DEFINE_multi_string("prompt", [], "A prompt; may be given again.")
flags.DEFINE_string("input", None, 'JSONL: {"prompt" | "token_ids" | "messages": ..., "id": ..., and sampling fields}.')
flags.DEFINE_string("output", None, "JSONL file for the results; printed if not given.")
flags.DEFINE_string("logits_npz", None, "score: a file for logits_0, logits_1, ... float32 [n, vocab].")
flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of weights and activations; the checkpoint's if not given.")
flags.DEFINE_enum("weights_dtype", None, WEIGHTS_DTYPES, "fp8: the layers' matrices multiply in 8 bits; --dtype's if not given.")
flags.DEFINE_string("mesh", None, "As data=1,expert=2; default: the routed experts split over all devices.")
flags.DEFINE_enum("cache_dtype", None, list(FORMATS), "Of the latent cache; --dtype's if not given.")
flags.DEFINE_integer(
    "cache_tokens", None, "Tokens that each device's cache holds; as many as fit if not given.", lower_bound=PAGE
)
flags.DEFINE_integer("max_batch", 256, "Answers that each device works on at a time.", lower_bound=1)
flags.DEFINE_multi_string("grid", [], "bench: BATCHxPROMPTxNEW, requests and their tokens; may be given again.")
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
        own, tokenizer = "bfloat16", None
        cfg = config.preset(FLAGS.preset)
    elif FLAGS.preset or not FLAGS.checkpoint:
        raise InputError("--checkpoint is missing" if not FLAGS.preset else "--preset has random weights, for --mode=bench only")
    else:
        weights = open_checkpoint(FLAGS.checkpoint)
        cfg, tokenizer = weights.config, Tokenizer.load(weights.directory)
        own = weights.dtype
    dtype, fp8 = _dtypes(own)
    fields = {name: getattr(FLAGS, name) for name in prompts.SAMPLING_FIELDS}
    sampling = prompts.to_sampling(fields | {"logit_bias": prompts.parse_biases(FLAGS.logit_bias)}, Sampling())
    check(sampling, cfg.vocab_size, "flags")
    requests = _requests(tokenizer, sampling)
    for request in requests:
        check_tokens(cfg, request.name, request.token_ids, room=0 if FLAGS.mode == "score" else 1)
        check(request.sampling, cfg.vocab_size, request.name)
    if FLAGS.output and FLAGS.logits_npz and os.path.realpath(FLAGS.output) == os.path.realpath(FLAGS.logits_npz):
        raise InputError(f"--output and --logits_npz: both are {FLAGS.output}, expected two files")
    loads = [parse_load(text) for text in FLAGS.grid or ["1x128x64", "8x128x64"]]
    eos_id = cfg.eos_token_id if cfg.eos_token_id is not None or tokenizer is None else tokenizer.eos_id
    with jax.set_mesh(_mesh(cfg)), _fresh("output") as output, _fresh("logits_npz") as logits_npz:
        if FLAGS.preset:
            model = model_lib.init(cfg, FLAGS.seed, jnp.dtype(dtype), fp8)
        else:
            model = model_lib.load(weights, dtype, fp8=fp8)
        if FLAGS.mode == "score":
            return run_score(model, requests, output, logits_npz)
        how = {"cache_dtype": FLAGS.cache_dtype, "cache_tokens": FLAGS.cache_tokens, "max_batch": FLAGS.max_batch}
        if FLAGS.mode == "bench":
            return bench(Engine(model, **how), loads, output)
        engine = Engine(model, eos_id=eos_id, **how)
        print(engine.describe(), file=sys.stderr)
        if FLAGS.mode == "chat":
            run_chat(engine, tokenizer, sampling)
        else:
            run_generate(engine, tokenizer, requests, output)


def _mesh(cfg: ModelConfig) -> Mesh:
    experts, devices = cfg.n_routed_experts or 0, jax.device_count()
    try:
        data, expert = parse_mesh(FLAGS.mesh) if FLAGS.mesh else (1, devices)
        mesh = make_mesh(data, expert)
    except ValueError as error:
        raise InputError(f"--mesh={FLAGS.mesh}: {error}") from None
    if experts % expert:
        raise InputError(
            f"--mesh: {expert} devices on the expert axis, expected a divisor of the model's {experts} routed experts"
        )
    return mesh


def _dtypes(own: str) -> tuple[str, bool]:
    """The dtype of weights and activations, `own` being the checkpoint's, and whether the layers' matrices are 8-bit floats."""
    wanted = FLAGS.weights_dtype
    if wanted == "fp8":
        wanted = None
    elif wanted and FLAGS.dtype not in (None, wanted):
        raise InputError(f"--weights_dtype={wanted}: expected fp8, or what --dtype is, {FLAGS.dtype}")
    # float16 overflows in this model; float32 holds the same values.
    return FLAGS.dtype or wanted or ("float32" if own == "float16" else own), FLAGS.weights_dtype == "fp8"


def _requests(tokenizer: Tokenizer | None, sampling: Sampling) -> list[Prompt]:
    if FLAGS.grid and FLAGS.mode != "bench":
        raise InputError(f"--grid: --mode={FLAGS.mode} has no loads to time, expected --mode=bench")
    if FLAGS.mode == "bench" and (FLAGS.prompt or FLAGS.input):
        raise InputError("--mode=bench: makes prompts of its own, expected --grid and neither --prompt nor --input")
    if FLAGS.logits_npz is not None and FLAGS.mode != "score":
        raise InputError(f"--logits_npz: --mode={FLAGS.mode} has no logits to write, expected --mode=score")
    if FLAGS.output is not None and FLAGS.mode == "chat":
        raise InputError("--output: --mode=chat writes no lines, expected --mode=generate, score or bench")
    if FLAGS.mode in ("generate", "score") and bool(FLAGS.prompt) == bool(FLAGS.input):
        raise InputError(f"--mode={FLAGS.mode}: expected --prompt or --input, and not both")
    if FLAGS.mode == "chat":
        if tokenizer is None:
            raise InputError("--mode=chat: the checkpoint has no tokenizer.json")
        if FLAGS.input:
            raise InputError(
                "--mode=chat: reads --prompt or the terminal; batches of messages go through --mode=generate --input"
            )
        for name, only in (("n", 1), ("logprobs", 0)):
            if getattr(sampling, name) != only:
                raise InputError(f"--mode=chat: {name} is {getattr(sampling, name)}, expected {only}")
        return []
    if FLAGS.input:
        return prompts.from_jsonl(FLAGS.input, tokenizer, sampling)
    return prompts.from_texts(FLAGS.prompt, tokenizer, sampling)


def run_generate(engine: Engine, tokenizer: Tokenizer | None, requests: list[Prompt], output: IO[bytes] | None) -> None:
    """Writes a JSON line for each answer, in the requests' order; on a terminal, the answer to a single --prompt is streamed as text."""
    streaming = output is None and len(FLAGS.prompt) == 1 and requests[0].sampling.n == 1 and sys.stdout.isatty()
    streams = [[TextStream(tokenizer, r.sampling.stop) if tokenizer else None for _ in range(r.sampling.n)] for r in requests]
    texts = [[""] * r.sampling.n for r in requests]

    def show(index: int, answer: int, piece: str) -> None:
        texts[index][answer] += piece
        if streaming:
            print(piece, end="", flush=True)

    def on_output(index: int, output: Output) -> bool:
        stream = streams[index][output.answer]
        if stream is None:
            return False
        show(index, output.answer, stream.feed(output.token))
        return stream.stopped is not None

    completed = complete(engine, [(r.token_ids, r.sampling) for r in requests], on_output)
    for index, (request, answers) in enumerate(zip(requests, completed)):
        for number, done in enumerate(answers):
            line = {"id": request.id, "prompt": request.given, "token_ids": done.token_ids}
            if tokenizer:
                show(index, number, streams[index][number].flush())
                line["text"] = texts[index][number]
            line |= {"finish_reason": done.finish_reason, "logprobs": done.logprobs}
            if request.sampling.logprobs:
                line["top_logprobs"] = [[{"id": id, "logprob": logprob} for id, logprob in top] for top in done.top_logprobs]
            if request.sampling.n > 1:
                line["index"] = number
            if not streaming:
                _line(line, output)
    if streaming:
        print()


def run_chat(engine: Engine, tokenizer: Tokenizer, sampling: Sampling) -> None:
    """A conversation: each --prompt, or else each line of standard input, is what the user says next."""
    messages: list[dict[str, str]] = []
    for said in FLAGS.prompt or _lines():
        messages.append({"role": "user", "content": said})
        token_ids = tokenizer.render_chat(messages)
        stream = TextStream(tokenizer, sampling.stop)
        answer = ""

        def show(piece: str) -> None:
            nonlocal answer
            piece = piece if answer else piece.removeprefix(" ")  # the model begins with the space the template leaves out
            answer += piece
            print(piece, end="", flush=True)

        request = engine.add_request(token_ids, sampling, name=f"turn {len(messages) // 2 + 1}")
        for output in engine.stream(request):
            show(stream.feed(output.token))
            if stream.stopped is not None:
                engine.abort(request)
                break
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
