# Each target first makes .venv with all that it needs. Two to remember: make demo, make test.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
NNUNET := .venv-nnunet
# One pair that belongs together; without the pin, pip would fetch the newest CUDA build.
TORCH := torch==2.13.0 "triton==3.7.1; sys_platform == 'linux' and platform_machine == 'x86_64'"
# nnU-Net's networks, for tests. They need torch alone; what the package asks for besides would bring a CUDA build of torchvision.
NETWORKS := dynamic-network-architectures==0.4.4

.PHONY: install demo test test-nnunet test-report bench bench-quick check-triton check-cuda check-sanitize check-mutations check-package check-gpu lint clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py Makefile $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --upgrade "setuptools>=77" wheel ninja $(TORCH)
	$(RUN)/pip install --quiet --no-build-isolation --editable ".[test]"
	$(RUN)/pip install --quiet --no-deps $(NETWORKS)
	touch $@

# Simulates a small cohort at 2 mm, trains a narrow RSANet, predicts patients that it never saw, and draws them. With the
# published attention scale of 1 the maps of so short a run pick single slices; the smaller one keeps them graded. So
# short a run has no time for augmentation either.
demo: install
	rm -rf demo
	$(RUN)/rsanet simulate demo/train --subjects 12 --spacing 2 --seed 1
	$(RUN)/rsanet simulate demo/test --subjects 3 --spacing 2 --seed 1000
	$(RUN)/rsanet train demo/train -o demo/run --channels 8 16 32 64 --patch 48 --steps 300 --lr 4e-3 --dropout 0 \
		--attention-scale 0.005 --no-augment
	$(RUN)/rsanet predict demo/run --data demo/test -o demo/predictions
	$(RUN)/rsanet evaluate demo/predictions demo/test --csv demo/scores.csv
	$(RUN)/rsanet report demo/report.png --data demo/test --pred demo/predictions --model demo/run
	$(RUN)/rsanet report demo/report --data demo/test --pred demo/predictions --model demo/run

# The tests of the C++ kernels count threads, and want the machine for themselves. Triton's kernels run in its interpreter,
# which a process has from its start or not at all. Threads that wait for work would take the cores from those that have
# some, of this process or another: a policy of passive makes them sleep. The interpreter has no work for a second one.
test test-nnunet test-report: export OMP_WAIT_POLICY = passive
test: install
	$(RUN)/python -m pytest -n 2 --dist loadfile --ignore tests/cpp
	$(RUN)/python -m pytest tests/cpp
ifeq ($(shell uname -sm),Linux x86_64)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN)/python -m pytest -n 2 tests/rsa_kernels tests/triton -k triton
endif

# Runs the tutorial on nnU-Net, and what else needs nnU-Net, in an environment of its own: nnU-Net's torchvision does not
# load beside a CPU build of torch, and others would stumble over it. The package is installed there as a user's is.
test-nnunet: $(NNUNET)/installed
	$(NNUNET)/bin/pip install --quiet --force-reinstall --no-deps .
	$(NNUNET)/bin/pytest -o pythonpath= tests/nnunet

$(NNUNET)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(NNUNET)
	$(NNUNET)/bin/pip install --quiet $(TORCH) ".[nnunet]" pytest
	touch $@

# Opens the HTML report in a headless Chromium, which it installs on Debian and Ubuntu where there is none: under a minute.
test-report: install
	$(RUN)/pip install --quiet "selenium>=4.20"
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
		|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null \
		|| { echo "The tests of the HTML report need chromium and chromedriver, and apt-get cannot install them: install both and try again."; exit 1; }
	$(RUN)/python -m pytest tests/browser/report.py

# Measures the block beside what a user would pick instead, on this machine when it is quiet, and draws the results. The
# first takes hours on two cores, the second minutes.
bench: install
	$(RUN)/python -m benchmarks
	THP_MEM_ALLOC_ENABLE=1 $(RUN)/python -m benchmarks network
	$(RUN)/python -m benchmarks plot

bench-quick: install
	$(RUN)/python -m benchmarks --quick
	THP_MEM_ALLOC_ENABLE=1 $(RUN)/python -m benchmarks network --quick
	$(RUN)/python -m benchmarks plot

# Compiles all that the launch table can choose for GPUs that need not be here, with the oldest Triton too: half an hour.
check-triton: install
	$(RUN)/python tests/triton/ahead_of_time.py
	$(RUN)/pip install --quiet --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	PYTHONPATH=$(VENV)/triton-3.6 $(RUN)/python tests/triton/ahead_of_time.py

# Compiles the CUDA extension for GPUs that need not be here: a spill or a symbol that nothing provides is an error.
check-cuda: install
	$(RUN)/python tests/cuda/check.py

# Runs the C++ kernels under the address, undefined-behaviour and thread sanitizers, which g++ and clang++ bring along.
check-sanitize: install
	$(RUN)/python tests/cpp/sanitize.py

# Breaks the kernels in some seventy ways, and proves that the tests see each.
check-mutations: install
	$(RUN)/python tests/triton/mutations.py
	$(RUN)/python tests/cuda/mutations.py
	$(RUN)/python tests/cpp/mutations.py

# Builds the source distribution and the wheels from it, in pure Python and compiled, and installs one as a user would.
check-package: install
	$(RUN)/python tests/packaging/check.py $(TORCH)

# On a machine with a GPU, in an environment with a CUDA build of torch: the extensions, the tests, then the measurements.
check-gpu:
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m benchmarks gpu

lint: install
	$(RUN)/ruff check
	$(RUN)/ruff format --check

clean:
	rm -rf $(VENV) $(NNUNET) demo build dist *.egg-info rsa_kernels/_*.so rsa_kernels/_built.json .pytest_cache .ruff_cache .hypothesis
