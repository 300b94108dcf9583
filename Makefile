PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Every supported minor version. Other than 2.13.0 these are CUDA builds: 3 GB each to download.
TORCH_VERSIONS ?= 2.11.0 2.12.1 2.13.0 2.14.1

.PHONY: demo test test-matrix lint clean
.PRECIOUS: $(VENV)-%/.installed

demo: $(STAMP)
	$(BIN)/contig-pass demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The CPU tests on each version of torch in turn, each in an environment of its own.
test-matrix: $(TORCH_VERSIONS:%=test-torch-%)

test-torch-%: $(VENV)-%/.installed
	CUDA_VISIBLE_DEVICES= $(VENV)-$*/bin/python -m pytest -n 2 --dist worksteal

$(VENV)-%/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		'torch==$*' --editable '.[dev]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .

$(STAMP): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints-dev.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(VENV)-* .pytest_cache .ruff_cache .hypothesis
