# One command each on a fresh clone, with Python 3.11 or newer and a network for pip:
#   make demo   the main job: erase a concept from Emoji World, print the table, write the report
#   make test   everything the continuous integration runs
#   make gpu-check   for whoever has a GPU: every architecture on it, times and peak memory as JSON, under 8 minutes
# The environment is made once; the stamps in .venv say what is in it, so running again is quick.
# Another interpreter: make demo PYTHON=python3.12

SHELL  := /bin/bash
PYTHON ?= python3.11
BIN    := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
FILES  := $(shell find erasure pipelines eval -type f -not -path '*/__pycache__/*')

# Bytecode is written by the first process and read by all others, whatever the environment says: compiling what they
# import would be more than half of their start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test others lint types pytest notebooks docs wheel gpu-check clean $(NOTEBOOKS)
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/erasure demo

test: others pytest

# Two at a time: most of these keep one core busy. What they all need is made before.
others: .venv/installed-test build/installed
	printf '%s\n' lint types docs wheel $(NOTEBOOKS) | xargs -P 2 -n 1 $(MAKE) --no-print-directory

# torch and torchvision come out of one plain command, from one place, so that they fit each other. Most of the twenty
# thousand files that come along are never imported, so none is compiled before it is.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --editable

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/installed: setup.cfg | $(BIN)/python
	$(INSTALL) .
	touch $@

.venv/installed-test: setup.cfg | $(BIN)/python
	$(INSTALL) ".[test]"
	touch .venv/installed $@

lint: .venv/installed-test
	$(BIN)/ruff check .

# A process a core, each with one thread: two threads that wait for one another on a busy core crawl.
pytest: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

# In their tiny form, and not written back.
notebooks: $(NOTEBOOKS)

$(NOTEBOOKS): .venv/installed-test
	OMP_NUM_THREADS=1 ERASURE_TINY=1 $(BIN)/jupyter-execute --kernel_name=python3 --timeout=900 $@

# The site, in build/site; a dead link or a name that is not there is an error. The three folders are laid out as they are
# installed, where the reference pages read them; nothing is imported.
docs: .venv/installed-test
	rm -rf build/api
	mkdir -p build/api
	cp -r erasure build/api/erasure
	cp -r pipelines eval build/api/erasure/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel, in an environment of its own. The packages it needs are lent by .venv: a plain path in a .pth file brings
# them in without the editable install beside them, whose own .pth file is then not read.
build/installed: .venv/installed-test $(FILES) pyproject.toml LICENSE NOTICE
	rm -rf build dist  # old files in build/lib would go into the new wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(BIN)/python -m venv --without-pip build/clean
	$(BIN)/python -m pip --python build/clean/bin/python install --quiet --no-deps --no-index dist/*.whl
	cd .venv/lib/python3*/site-packages && pwd > $(CURDIR)/build/lent.pth
	mv build/lent.pth build/clean/lib/python3*/site-packages/
	touch $@

# Imported from /, where the working tree cannot help.
wheel: build/installed
	cd / && $(CURDIR)/build/clean/bin/python $(CURDIR)/tests/import_everything.py --installed

# Beside the installed wheel: in the working tree mypy cannot see erasure.eval.
types: build/installed
	cd build/clean/lib/python3*/site-packages && $(CURDIR)/$(BIN)/mypy -p erasure \
	    --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	    --python-executable $(CURDIR)/$(BIN)/python

# On a machine without one: make gpu-check DEVICE=cpu
DEVICE ?= cuda
gpu-check: .venv/installed-test
	$(BIN)/python -m benchmarks.gpu_check --device $(DEVICE) $(if $(filter cpu,$(DEVICE)),--tiny) --out runs/gpu-check.json

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
