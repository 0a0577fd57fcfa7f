"""The shape of the project: imports go one way, the commands have the contract's flags and no other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "pallas_kernels": {"pallas_kernels"},
    "sharding": {"pallas_kernels", "sharding"},
    "dsv2_jax": {"pallas_kernels", "sharding", "dsv2_jax"},
}
# The contract: other programs call these. A new flag is a decision, written here and in the README.
FLAGS = {
    "train.py": "preset workdir steps seed set data eval_data init_from recipe mesh zero dispatch coordinator num_processes process_id "
    "profile_steps dry_run gpus gpu",
    "infer.py": "checkpoint preset mode prompt input output logits_npz dtype weights_dtype mesh cache_dtype cache_tokens max_batch grid max_new_tokens temperature top_p top_k min_p "
    "repetition_penalty presence_penalty frequency_penalty logit_bias seed n stop stop_token_ids ignore_eos logprobs",
    "dsv2_jax/convert.py": "input output to weights_dtype",
    "dsv2_jax/parity.py": "hf",
    "dsv2_jax/plot.py": "",
    "dsv2_jax/checkpoint.py": "",
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    ours = set(MAY_IMPORT) | {"train", "infer", "tests", "benchmarks"}
    for path in (ROOT / package).rglob("*.py"):
        assert imported(path) & ours <= MAY_IMPORT[package], path


@pytest.mark.parametrize("script", FLAGS)
def test_flags_are_the_contracts(script):
    defined = re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", (ROOT / script).read_text())
    assert set(defined) <= set(FLAGS[script].split())


def test_only_one_file_knows_hugging_face_names():
    for path in (ROOT / "dsv2_jax").glob("*.py"):
        if path.name not in ("hugging_face.py", "parity_reference.py"):
            assert not re.search(r"q_a_proj|kv_b_proj|self_attn|model\.layers|lm_head", path.read_text()), path


def test_no_torch_outside_the_reference():
    for path in [*ROOT.glob("*.py"), *(ROOT / "dsv2_jax").glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        if path.name != "parity_reference.py":
            assert not imported(path) & {"torch", "transformers"}, path


@pytest.mark.parametrize(
    "command, told",
    [
        (["infer.py", "--checkpont=x"], "checkpoint"),
        (["infer.py", "--mode=generate"], "--checkpoint is missing"),
        (["infer.py", "stray"], "unexpected argument 'stray'"),
        (["infer.py", "--top_k=many", "--checkpoint=x"], "top_k"),
        (["infer.py", "--checkpoint=/nowhere", "--prompt=x"], "/nowhere"),
        (["infer.py", "--preset=tiny", "--mode=bench", "--logit_bias=7"], "--logit_bias=7: expected ID:NUMBER"),
        (["infer.py", "--preset=v2_lit", "--mode=bench"], "did you mean 'v2_lite'"),
    ],
)
def test_bad_arguments_end_in_one_line_and_code_2(command, told):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and told in done.stderr
