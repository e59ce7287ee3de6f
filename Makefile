# `make` alone prints the targets. PYTHON is the active virtual environment's, else .venv's, else python3.
ifdef VIRTUAL_ENV
PYTHON ?= $(VIRTUAL_ENV)/bin/python
else
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
endif

.DEFAULT_GOAL := help
.PHONY: help check test test-all sim bench failover exactly-once operations soak mutants fuzz chaos chaos-smoke crash-points power-loss

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

check:  ## formatting, lint and types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

test:  ## the fast tests: no server processes
	$(PYTHON) -m pytest -m "not slow and not cluster"

test-all:  ## every test, on real processes too
	$(PYTHON) -m pytest

mutants:  ## stores that are broken on purpose: does every one get caught?
	$(PYTHON) -m tests.mutants

SECONDS ?= 300
fuzz:  ## changed bytes at every door, for five minutes or SECONDS=60
	$(PYTHON) -m tests.fuzz --seconds $(SECONDS)

chaos:  ## real nodes while everything around them fails: each class of faults for a minute
	$(PYTHON) -m tests.chaos --class all --seconds 60

chaos-smoke:  ## the five classes that tell most, ten seconds each
	$(PYTHON) -m tests.chaos --class kill,pause,partition,snapshot,transfer --seconds 10

crash-points:  ## a node dies at every step between two things it does to its disk, with power lost there; full disks
	KV_TEST_EVERY_POINT=1 $(PYTHON) -m pytest tests/test_crash_points.py tests/test_disk_trouble.py tests/test_power_loss.py -v

ROUNDS ?= 100
power-loss:  ## real nodes lose what was not synced, ROUNDS=100 times
	KV_TEST_ROUNDS=$(ROUNDS) $(PYTHON) -m pytest tests/test_power_loss.py -v --timeout 0

sim:  ## the simulation: 1,000 seeds of 20,000 steps on all cores, and what of the core they took
	$(PYTHON) -m tests.sim_batch

bench:  ## this cluster, etcd and Redis under the same load
	$(PYTHON) -m benchmarks.compare --json benchmarks/results/compare.json --plot docs/benchmarks.svg

failover:  ## how long writes stop when the primary is killed, 20 times
	$(PYTHON) -m benchmarks.failover --json benchmarks/results/failover.json

exactly-once:  ## what it costs to write in a session
	$(PYTHON) -m benchmarks.session_load --rounds 50 --json benchmarks/results/session_load.json

operations:  ## a million keys: load, restarts, lost disks, hand-overs, idleness, backups
	$(PYTHON) -m benchmarks.operations --json benchmarks/results/operations.json

soak:  ## half an hour of mixed load: does anything grow?
	$(PYTHON) -m benchmarks.soak --json benchmarks/results/soak.json --plot docs/soak.svg
