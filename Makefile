# `make` alone lists the targets. Everything that is made lies under .venv/ and .local/.
PYTHON ?= python3
PORT ?= 8080
RUN = .venv/bin/python
AT_ONCE = -n 2 --dist loadgroup --no-loadscope-reorder -m "not alone"
COVERAGE = COVERAGE_FILE=$(CURDIR)/.local/coverage $(RUN) -m coverage
REQUIREMENTS = requirements.txt training/requirements.txt tests/requirements.txt

.DEFAULT_GOAL := help
.PHONY: help install demo release serve try status test coverage soak bench story check lint types fast lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: .venv/.installed ## make .venv and install what everything needs

.venv/.installed: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python: expected 3.11 or newer, found " + sys.version.split()[0] + "; name one with make PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --require-hashes -r requirements.txt
	$(RUN) -m pip install --quiet $(patsubst %,-r %,$(filter-out requirements.txt,$(REQUIREMENTS)))
	touch $@

demo: install ## train a small model on a part of the data, release, serve and ask
	$(RUN) -m build.local demo --set _ROWS=3500 --set _LAYERS=6 --set _STUDENT_LAYERS=0

release: install ## the best model on all of the data: about two hours
	$(RUN) -m build.local demo

serve: install ## serve the current release: make serve PORT=8080
	$(RUN) -m build.local serve --port $(PORT)

try: install ## ask the current release: make try TEXT="요즘 너무 불안해"
	@$(RUN) -m build.local try "$(TEXT)"

status: install ## what is served, was served, was refused: make status MODEL_URI=gs://… PROJECT=… for the cloud's
	@$(RUN) -m build.$(if $(MODEL_URI),status --model-uri $(MODEL_URI) $(if $(PROJECT),--project $(PROJECT)) $(if $(REGION),--region $(REGION)),local status)

test coverage check: export OMP_NUM_THREADS = 1  # of torch: two tests at a time share the cores

test: install ## all tests, two at a time; what measures times comes last, alone
	$(RUN) -m pytest $(AT_ONCE)
	$(RUN) -m pytest -m alone

coverage: install ## all tests once more, and which branches of function and build they take
	$(COVERAGE) run -m pytest $(AT_ONCE)
	$(COVERAGE) run -m pytest -m alone
	$(COVERAGE) combine --quiet
	$(COVERAGE) report

soak: install ## load, refreshes, hostile requests, cold start at full length: about 20 minutes, into .local/soak.json
	PYTHONPATH=. $(RUN) tests/soak.py

bench: install ## our engine beside others, and the whole function beside a torch one: make bench PEERS=1
	$(RUN) -m build.bench $(if $(PEERS),--peers)
	PYTHONPATH=. $(RUN) tests/soak.py --only cold_start --share 0.34

story: install ## deploy, build, refresh, refusal, rollback: the real gcloud against a loopback stand-in
	$(RUN) -m pytest -s tests/test_story.py

check: install ## lint, types and the fast tests
	@$(MAKE) --no-print-directory -j 2 lint types fast

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: install
	$(RUN) -m mypy

fast: install
	$(RUN) -m pytest -m "not slow"

lock: install ## write requirements.txt anew, with hashes, for Python 3.11 to 3.13
	$(RUN) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
		--custom-compile-command "make lock" pyproject.toml --output-file requirements.txt

clean: ## remove all that was made
	rm -rf .venv .local
