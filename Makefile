PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Every supported minor version. Other than 2.13.0 these are CUDA builds: 3 GB each to download.
TORCH_VERSIONS ?= 2.11.0 2.12.1 2.13.0 2.14.1

.PHONY: demo test test-matrix lint clean chromium
.PRECIOUS: $(VENV)-%/.installed

demo: $(STAMP)
	$(BIN)/contig-pass demo

test: $(STAMP) chromium
	$(BIN)/python -m pytest -n 2 --dist worksteal

CHROMIUM_NAMES := chromium chromium-browser google-chrome google-chrome-stable

# For the tests of HTML reports; where it is not and cannot be installed they are left out.
chromium:
	@if [ -z "$$CHROMIUM" ] && ! which $(CHROMIUM_NAMES) 2>/dev/null | grep -q .; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing chromium for the browser tests"; \
			{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
				--no-install-recommends chromium; } >/dev/null || true; \
		fi; \
		which $(CHROMIUM_NAMES) 2>/dev/null | grep -q . || echo \
			"NO BROWSER TEST WILL RUN: there is no Chromium and it cannot be installed here"; \
	fi

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
