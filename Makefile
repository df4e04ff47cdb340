# Everything runs in .venv, made on first use with the versions that were tested (constraints.txt).
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE = 1

.PHONY: demo quick paper-mini test faults lint format bench clean

demo: .venv/ready  ## the whole pipeline in minutes on 2 CPU cores: runs/demo/report.html
	$(BIN)/striate demo --out runs/demo

quick: .venv/ready  ## the demo, smaller: under 90 s
	rm -rf runs/quick
	$(BIN)/striate demo --out runs/quick --quick

paper-mini: .venv/ready  ## the paper's experiments in small: hours, can be stopped; runs/paper-mini/report.html
	$(BIN)/python examples/paper_mini/run.py --workers 2

test: .venv/ready  ## all tests
	$(BIN)/python -m pytest

faults: .venv/ready  ## kills, full disks, broken and hostile input, all of it: the table of docs/reliability.md
	$(BIN)/python -m pytest tests/faults --full --table docs/reliability.md

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
