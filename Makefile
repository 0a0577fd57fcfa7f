# demo: the main job from nothing. test: the suite. parity: against live PyTorch. campaign: the long counted runs.

# $(PYTHON) is used as it is where it imports jax; else .venv is made.
PYTHON ?= python3
ifeq ($(shell $(PYTHON) -c 'import jax' 2>/dev/null && echo yes),yes)
  PY := $(PYTHON)
else
  PY := .venv/bin/python
  VENV := .venv/made
endif
# PyTorch lives in an environment of its own; TORCH_PYTHON names another that has torch and transformers.
ifdef TORCH_PYTHON
  export TORCH_PYTHON
else
  REFERENCE := .venv-reference/made
endif
EXTRAS := test,plot,train$(shell nvidia-smi >/dev/null 2>&1 && echo ,cuda13)

.PHONY: demo test parity campaign

demo: $(VENV)
	rm -rf demo && mkdir demo
	$(PY) train.py --preset=tiny --workdir=demo/run
	$(PY) -m dsv2_jax.plot demo/run
	$(PY) -m dsv2_jax.convert --input=demo/run --output=demo/huggingface --to=hf
	$(PY) infer.py --checkpoint=demo/huggingface --mode=generate --prompt='def __init__(self' --max_new_tokens=96 --temperature=0.5 \
	  --output=demo/answer.jsonl
	@printf '\n-- loaded from demo/huggingface, the model continues "def __init__(self":\n\n'
	@$(PY) -c 'import json; answer = json.load(open("demo/answer.jsonl")); print(answer["prompt"] + answer["text"])'
	@printf '\n-- what lies where\n'
	@echo 'demo/run/checkpoints      training state; run the train.py line again with a higher --steps to go on'
	@echo 'demo/run/metrics.jsonl    a line a step'
	@echo 'demo/run/metrics.png      the curves'
	@echo 'demo/run/expert_load.png  how much each expert is used'
	@echo 'demo/huggingface          the model for transformers, vLLM, or infer.py'

test: $(VENV)
	$(PY) -m pytest

parity: $(VENV) $(REFERENCE)
	$(PY) -m dsv2_jax.parity

campaign: $(VENV)
	$(PY) tests/campaign_resume.py
	$(PY) tests/campaign_corruption.py 1000
	$(PY) tests/campaign_signals.py 20
	PYTHONPATH=. $(PY) tests/campaign_engine.py 10
	PAGES_SEEDS=50 $(PY) -m pytest tests/test_pages.py
	KILLS=10 FUZZ_CASES=20000 $(PY) -m pytest tests/test_convert.py tests/test_tensor_files.py -k "kill or accept_only"

.venv/made: setup.py constraints.txt
	$$(command -v python3.12 || command -v $(PYTHON)) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

.venv-reference/made: tests/reference_requirements.txt
	$$(command -v python3.11 || command -v $(PYTHON)) -m venv .venv-reference
	.venv-reference/bin/python -m pip install --quiet --disable-pip-version-check -r tests/reference_requirements.txt
	touch $@
