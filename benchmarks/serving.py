"""vLLM on the loads that `infer.py --mode=bench` times, with the same weights and greedy: where vLLM is installed.

    python -m benchmarks.random_checkpoint --dir=DIR
    python infer.py --checkpoint=DIR --mode=bench --grid=256x1024x256
    python -m benchmarks.serving --checkpoint=DIR --grid=256x1024x256

Prompts are random token ids, no two alike. Prompts alone (one new token each) are timed, then the whole load, each after a run
that warms up; decode is the difference, over the tokens that it leaves. `infer.py` times decode steps themselves, so compare
"whole run tok/s" first.
"""

import time

import numpy as np
from absl import app, flags

from dsv2_jax.bench import Load, parse_load
from dsv2_jax.convert import open_checkpoint

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "A Hugging Face directory.", required=True)
flags.DEFINE_multi_string("grid", ["64x1024x256"], "BATCHxPROMPTxNEW; may be given again.")


def main(_: list[str]) -> None:
    import vllm

    loads = [parse_load(text) for text in FLAGS.grid]
    vocab = open_checkpoint(FLAGS.checkpoint).config.vocab_size
    engine = vllm.LLM(
        FLAGS.checkpoint,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=max(load.prompt + load.new for load in loads),
        max_num_seqs=max(load.batch for load in loads),
    )
    print(f"vLLM {vllm.__version__}\n  batch prompt   new  prompt tok/s  new tok/s  whole run tok/s")
    for load in loads:
        alone, whole = (measure(vllm, engine, vocab, load._replace(new=new)) for new in (1, load.new))
        decode = load.batch * (load.new - 1) / (whole - alone) if load.new > 1 else float("nan")
        print(
            f"{load.batch:7} {load.prompt:6} {load.new:5} {load.batch * load.prompt / alone:13,.0f} {decode:10,.1f}"
            f" {load.batch * load.new / whole:16,.1f}",
            flush=True,
        )


def measure(vllm, engine, vocab: int, load: Load) -> float:
    """Seconds of a load."""
    how = vllm.SamplingParams(temperature=0.0, max_tokens=load.new, ignore_eos=True, detokenize=False)
    for _ in range(2):  # the first warms up
        prompts = np.random.default_rng().integers(0, vocab, (load.batch, load.prompt)).tolist()
        began = time.perf_counter()
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
        seconds = time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    app.run(main)
