# Everything one does with this repository, each by one command. `make` alone lists them.
#
#   TORCH    the version of torch (2.11.0); of `wheel`, one or more: TORCH="2.11 2.12"
#   PYTHON   the interpreter that .venv is made from (python3)      VENV   where the environment is (.venv, or .venv-TORCH)
#   ARGS     more arguments for what the target runs                NSA_CUDA=0/1   never / always build the CUDA parts
#   TRANSFORMERS  the version of transformers that a new environment gets, such as 5.23 (the newest)
#   MAX_JOBS compile jobs at once (2: one with templates takes up to 2 GB)
#   V=1      show every command, of pip and of the compilers too
#
# Stamps under $(VENV)/stamps say what is installed and built, so that a second run starts at once. build/settings says for
# what: environments share the libraries, and where one builds them otherwise, the others' stamps are out of date.

TORCH ?=
PYTHON ?= python3
# Each version of torch that is asked for has an environment of its own; several at once are built from the usual one.
VENV ?= .venv$(if $(filter 1,$(words $(TORCH))),-$(strip $(TORCH)))
INSTALLED_TORCH := $(if $(filter 1,$(words $(TORCH))),$(strip $(TORCH)),2.11.0)
ARGS ?=
MAX_JOBS ?= 2
V ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
SANITIZED := build/sanitize

# What stands behind $(Q) is shown by V=1 alone; $(call say,...) says in a line what goes on instead.
Q := $(if $(filter 1,$(V)),,@)
PIP := $(BIN)/python -m pip $(if $(filter 1,$(V)),,--quiet)
say = @echo 'nsa_torch: $(1)'

export MAX_JOBS
export V
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The environment's ninja and cmake; and ccache, where it is installed: its results serve every checkout, wherever it lies.
export PATH := $(abspath $(BIN)):$(if $(wildcard /usr/lib/ccache),/usr/lib/ccache:)$(PATH)
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1

SOURCES := $(shell find csrc cmake -type f 2>/dev/null)
# What a build depends on besides files: another value builds again.
SETTINGS := NSA_CUDA=$(NSA_CUDA) NSA_TORCHES=$(NSA_TORCHES) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST)

.PHONY: help demo test lint format bench tables study study-small docs wheel environment build sanitize sanitize-gpu clean distclean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

demo: $(STAMPS)/build $(STAMPS)/test  ## install, build, train on real text with NSA and with dense attention
	$(Q)$(BIN)/python examples/train.py $(ARGS)

test: $(STAMPS)/build $(STAMPS)/test  ## install, build, run every test: with another torch by TORCH=2.15.0
	$(Q)$(BIN)/python -m pytest $(ARGS)

lint: $(STAMPS)/lint $(STAMPS)/test  ## check layout, types and likely bugs; changes nothing
	$(Q)$(BIN)/python tools/lint.py $(ARGS)

format: $(STAMPS)/lint  ## lay out C++ and Python
	$(Q)$(BIN)/python tools/lint.py --fix clang-format ruff-check ruff-format

bench: $(STAMPS)/build $(STAMPS)/test  ## measure speed and memory: on the GPU, or on the CPU where there is none
	$(Q)if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then $(BIN)/python benchmarks/gpu.py $(ARGS); else $(BIN)/python benchmarks/speed.py $(ARGS); fi

tables: $(STAMPS)/venv  ## write the tables of figures from what `make bench` measured
	$(Q)$(BIN)/python benchmarks/table.py --write

STUDY := cd benchmarks && $(abspath $(BIN))/python -m study

study-small: $(STAMPS)/build $(STAMPS)/test  ## train every model of the study on a small task: minutes on a CPU
	$(STUDY) plan small --device cpu --out ../runs/study $(ARGS)

study: $(STAMPS)/build $(STAMPS)/test  ## make all runs of the study that do not exist yet, on a GPU: docs/study.md
	test -e runs/texts/manifest.json || { $(STUDY) texts; }
	for task in recall needle language language-32k; do \
	  test -e benchmarks/results/study/_steps_$$task.json || ( $(STUDY) steps --task $$task --device cuda ) || exit 1; done
	$(STUDY) plan all --dry-run
	$(STUDY) plan all --device cuda $(ARGS)
	$(STUDY) report

docs: $(STAMPS)/venv  ## write docs/api from the docstrings
	$(Q)$(BIN)/python docs/generate_api.py

environment: $(STAMPS)/test  ## make the environment for the tests, and compile nothing

build: $(STAMPS)/build  ## compile, and install the package editable in .venv

# Of each torch only headers and libraries are needed. What the wheel links is torch's to bring, and stays outside it.
TORCHES := $(if $(filter-out 0 1,$(words $(TORCH))),$(TORCH:%=build/torches/%))
empty :=
wheel: export NSA_TORCHES = $(subst $(empty) $(empty),:,$(strip $(TORCHES)))
# A wheel goes to other machines: not for the GPU of this one alone.
wheel: export TORCH_CUDA_ARCH_LIST := $(or $(TORCH_CUDA_ARCH_LIST),8.0+PTX;9.0a)
wheel: $(STAMPS)/wheel $(TORCHES:=/torch/version.py)  ## build a wheel into dist/, for the torch of .venv or for those in TORCH="2.11 2.12"
	$(call say,building a wheel into dist/)
	$(Q)rm -rf build/wheel
	$(Q)$(BIN)/python -m pip wheel . --no-build-isolation --no-deps --wheel-dir build/wheel
	$(Q)$(BIN)/python -m auditwheel repair build/wheel/*.whl --wheel-dir dist --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*'
	$(Q)$(BIN)/python -m twine check --strict dist/*.whl

build/torches/%/torch/version.py: | $(STAMPS)/venv
	$(call say,fetching torch $* without what it requires)
	$(Q)$(PIP) install --progress-bar off --no-deps --upgrade --target build/torches/$* 'torch==$*.*'

sanitize: $(STAMPS)/sanitize $(STAMPS)/test  ## run the tests of the ops under the address and the undefined-behaviour sanitizer
	$(Q)$(BIN)/python tools/sanitize.py $(SANITIZED) $(ARGS)

sanitize-gpu: $(STAMPS)/build $(STAMPS)/test  ## run every CUDA kernel under compute-sanitizer
	$(Q)$(BIN)/python tools/sanitize_gpu.py $(ARGS)

clean:  ## remove what was built; the environment stays
	rm -rf build dist *.egg-info compile_commands.json $(patsubst %,.venv*/stamps/%,build install sanitize)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/cpp/build
	find nsa_torch -name '*.so' -delete
	rm -f nsa_torch/build_info.json
	find . -path './.venv*' -prune -o -name __pycache__ -print0 | xargs -0 rm -rf

distclean: clean  ## remove the environment as well
	rm -rf $(VENV) .venv-*

# --- the environment, in the order in which it grows ---------------------------------------------------------------------

$(STAMPS)/venv:
	$(Q)$(PYTHON) tools/check_host.py
	$(call say,making the environment $(VENV))
	$(Q)test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/requirements: requirements/build.txt | $(STAMPS)/venv
	$(call say,installing what the build needs: $<)
	$(Q)$(PIP) install --upgrade pip
	$(Q)$(PIP) install --progress-bar off 'torch==$(INSTALLED_TORCH).*' -r $<
	@touch $@

$(STAMPS)/wheel: requirements/wheel.txt $(STAMPS)/requirements
	$(call say,installing what makes a wheel: $<)
	$(Q)$(PIP) install --progress-bar off -r $<
	@touch $@

$(STAMPS)/test: requirements/test.txt $(STAMPS)/requirements
	$(call say,installing what the tests and examples need: $<)
	$(Q)$(PIP) install --progress-bar off -r $< $(if $(TRANSFORMERS),'transformers==$(TRANSFORMERS).*')
	@touch $@

$(STAMPS)/lint: requirements/lint.txt $(STAMPS)/requirements
	$(call say,installing what the checks need: $<)
	$(Q)$(PIP) install --progress-bar off -r $<
	@touch $@

# Rewritten only when a setting changes, so that what depends on it is rebuilt only then: in every environment. A build that
# drops the libraries of another touches it too (tools/build_command.py); one that broke off has left no build_info.json.
build/settings: force
	@mkdir -p build
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@
.PHONY: force

# Metadata and the link from site-packages to this folder: again only when the packaging changes.
$(STAMPS)/install: setup.py pyproject.toml $(wildcard tools/*build*.py) tools/layers.py tools/torches.py $(STAMPS)/requirements
	$(call say,linking this folder into $(VENV))
	$(Q)NSA_BUILD=0 $(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

# Compiling in place afterwards is incremental.
$(STAMPS)/build: $(SOURCES) $(STAMPS)/install build/settings $(if $(wildcard nsa_torch/build_info.json),,force)
	$(Q)$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(STAMPS)/sanitize: $(SOURCES) setup.py tools/layers.py $(STAMPS)/requirements
	$(Q)$(BIN)/python tools/sanitize.py --build $(SANITIZED)
	@touch $@
