# Every target sets up what it needs on a fresh machine; begin with `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DATA = examples/data/sentiment

.PHONY: demo sweep quality server load test test-torch fuzz test-all test-executorch test-quantised test-trl test-ray families mutation docs package lint types bench gpu clean

# One stamp per set of extras; they share the virtual environment.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/finetune.py

# Sixteen learning rates and ranks in one batch.
sweep: $(VENV)/.demo
	$(BIN)/python examples/sweep.py

# What VeRA is worth: an hour of what docs/quality.jsonl has not yet, then its pages and its picture.
quality: $(VENV)/.test,chart
	$(BIN)/python -m benchmarks.quality --minutes 60
	$(BIN)/python -m benchmarks.quality.page
	$(BIN)/python -m benchmarks.quality.chart

# Four adapters, trained once (ten minutes), and a server for them; `make load` asks it from another terminal,
# as one address, so that there is no bound on its rate.
out/server/accuracy.json: | $(VENV)/.demo,server
	$(BIN)/python -m examples.server.train

server: out/server/accuracy.json
	$(BIN)/python -m examples.server --rate 0

load: $(VENV)/.demo,server
	$(BIN)/python -m examples.server.load

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow"

# The suite under another torch, in a virtual environment of its own. What a registry has for a version may be
# the CUDA build alone: then this fetches 3 GB, and the tests run on the CPU all the same.
VERSION ?= 2.12.1
OTHER = .venv-torch-$(VERSION)

test-torch:
	mkdir -p build
	grep -vE '^(torch|torchvision|timm)==' constraints.txt > build/constraints-other-torch.txt
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c build/constraints-other-torch.txt torch==$(VERSION) -e ".[test]"
	$(OTHER)/bin/python -m pytest -n 2 -m "not slow" $(TESTS)

# Mutated adapters, programs and requests, for hours (FUZZ="--minutes 600"); what is found lies in out/fuzz.
# Then sequences of calls of the public API, another hour.
fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz $(FUZZ)
	VERA_FX_HYPOTHESIS=deep $(BIN)/python -m pytest tests/sequences

test-all: $(VENV)/.test families
	VERA_FX_HYPOTHESIS=deep $(BIN)/python -m pytest -n 2 --ignore tests/families

# ExecuTorch brings packages that nothing else needs: a virtual environment of its own.
test-executorch:
	$(MAKE) VENV=.venv-executorch .venv-executorch/.test,executorch
	.venv-executorch/bin/python -m pytest -m "not slow" tests/export/test_executorch.py

# Quantisation libraries change what transformers, accelerate and PEFT do: an environment of their own.
test-quantised:
	$(MAKE) VENV=.venv-quantised .venv-quantised/.test,quantised
	.venv-quantised/bin/python -m pytest -n 2 -m "not slow" tests/quantised

# TRL's trainers over adapted models. TRL brings datasets and more: a virtual environment of its own.
test-trl:
	$(MAKE) VENV=.venv-trl .venv-trl/.test,trl
	.venv-trl/bin/python -m pytest tests/model/test_trl.py

# Replicas by Ray Serve and predictions by Ray Data, on this machine (seven minutes on two busy cores). Ray brings
# some fifty packages: a virtual environment of its own.
test-ray:
	$(MAKE) VENV=.venv-ray .venv-ray/.test,ray
	.venv-ray/bin/python -m pytest tests/deploy

# The matrix of model families, with its table. timm brings torchvision, which transformers would
# import wherever it is: a virtual environment of its own.
families:
	$(MAKE) VENV=.venv-timm .venv-timm/.test,timm
	.venv-timm/bin/python -m pytest -n 2 -p tests.families.torchvision_on_cpu \
		-p tests.families.table --table docs/families.md tests/families

# Faults in passes, gradients, costs and checkpoints, one at a time: hours. `ARGS="passes/merge_weight.py --sample 20"`.
mutation: $(VENV)/.test
	$(BIN)/python -m tests.mutation $(ARGS)

# The documentation, where every warning is an error, and its notebook as Jupyter runs it. A virtual environment of
# its own; the API pages read the package as it is installed, where passes/ is vera_fx/passes.
docs:
	$(MAKE) VENV=.venv-docs .venv-docs/.docs
	rm -rf build/package && mkdir -p build/package
	cp -r vera_fx build/package/vera_fx && cp -r passes build/package/vera_fx/passes
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	OMP_NUM_THREADS=1 .venv-docs/bin/python -m tests.docs.notebook docs/five_minutes.ipynb build/site/five_minutes.ipynb

# Wheel and sdist into dist/; the wheel is made from the sdist, checked, and used in an environment that has what it
# says it needs and nothing else.
package:
	test -x .venv-package/bin/python || $(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		build twine check-wheel-contents
	rm -rf dist build/installed build/lib build/bdist.* && mkdir -p build
	.venv-package/bin/python -m build --outdir dist . > build/package.log || { cat build/package.log; exit 1; }
	.venv-package/bin/python -m twine check --strict dist/*
	.venv-package/bin/check-wheel-contents dist/*.whl
	$(PYTHON) -m venv build/installed
	build/installed/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build/installed && bin/python -I ../../tests/docs/installed.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright sees the package as it is installed, where passes/ is vera_fx/passes.
types: $(VENV)/.dev
	rm -rf build/types && mkdir -p build/types
	cp -r vera_fx build/types/vera_fx && cp -r passes build/types/vera_fx/passes
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks

# On a machine with a CUDA device: the tests that need one, and the headline figures, in out/.
gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python -m benchmarks --device cuda --rounds 7 --output out/gpu.json
	$(BIN)/python -m benchmarks.host --device cuda --layers 12 --output out/gpu_host.json

clean:
	rm -rf $(VENV) .venv-executorch .venv-quantised .venv-timm .venv-ray .venv-docs .venv-package .venv-torch-* build dist out .pytest_cache .ruff_cache .hypothesis
