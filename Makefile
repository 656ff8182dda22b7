# `make` lists the targets. PYTHON may name another interpreter than python3, which must be 3.11 or later.

PYTHON ?= python3
# For `make install`, which takes a path of the system's own: the program must not depend on a user's interpreter.
INSTALL_PYTHON ?= /usr/bin/python3
PREFIX ?= /usr/local
DESTDIR ?=
BIN := .venv/bin
PROTOS := $(shell find protos -name '*.proto')
STUBS := src/vmherd/api/descriptors.binpb

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets.
	@sed -n 's/^\([-a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

.PHONY: setup
setup: .venv/.ready $(STUBS) ## Install what is missing: Debian packages, a .venv with pinned packages.

.PHONY: demo
demo: setup ## Boot a machine, talk to its guest agent, and leave nothing behind.
	@$(BIN)/vmherd demo

.PHONY: run
run: setup ## Keep the three processes running in the foreground (./start.sh has options).
	@./start.sh

.PHONY: test
test: lint ## Run every check and every test but the slow ones.
	$(BIN)/pytest

.PHONY: test-slow
test-slow: setup ## Run the tests that take a full Debian guest, which is made on the way.
	$(BIN)/pytest tests/slow

.PHONY: test-systemd
test-systemd: setup ## Run the Debian package in a full Debian guest with systemd: half an hour.
	$(BIN)/pytest --capture=no --exitfirst tests/systemd

.PHONY: deb
deb: setup ## Make a Debian package for hosts of this one's release, in dist.
	@packaging/deb/build

.PHONY: install
install: setup ## Install as root for systemd, and start: PREFIX=/usr/local; with DESTDIR=DIR only put files there.
	@packaging/install "$(DESTDIR)" "$(PREFIX)" "$(INSTALL_PYTHON)"

.PHONY: uninstall
uninstall: ## End what `make install` started and remove its files; disks, records and settings stay.
	@packaging/uninstall "$(DESTDIR)" "$(PREFIX)"

.PHONY: lint
lint: setup ## Check style, types, imports and protos.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint $(STUBS) --config buf.yaml
	packaging/check-breaking

.PHONY: bench
bench: setup ## Measure, against bare QEMU.
	$(BIN)/python -m benchmarks

.PHONY: clean
clean: ## Remove what the other targets made here.
	rm -rf .venv build dist src/vmherd/api
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml hatch_build.py constraints.txt packaging/debian-packages
	@packaging/install-debian-packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "setup: $(PYTHON) is older than 3.11; name another: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setup: making .venv" >&2
	@$(PYTHON) -m venv .venv
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	    $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The editable install has made them once; this is for a change of the protos.
$(STUBS): $(PROTOS) hatch_build.py | .venv/.ready
	@$(BIN)/python hatch_build.py
