# make reproduce   runs the paper's tables and figures on the embedded data set
# make test        everything CI checks
# make docs        the documentation site, in _site/
# make unlocked    installs the wheel with the newest versions that settings.ini allows, and makes cells with it
# make lock        writes requirements.lock anew, from settings.ini and constraints.txt
PYTHON  ?= python3
DATASET ?= pbmc68k_reduced
LONG    := $(addprefix tests/test_,reproduce.py docs.py jupyterlab.py faults.py experiments.py)
# any name but /bin/sh: older makes, such as that of macOS, would look for simple commands in the PATH they were started with
SHELL := /bin//sh
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MPLBACKEND := Agg
PIP := .venv/bin/python -m pip --quiet --disable-pip-version-check
PIP_UNLOCKED := .venv-unlocked/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: reproduce test literal notebooks processes readme docs unlocked lock clean

# the embedded set on one thread: a fifth to a third slower than two on an idle machine, but where another process wants a core
# two threads wait for one another (a training of 22 s took 84 s, one thread 25 s), and the figures depend on no number of cores
reproduce: .venv/installed
	$(if $(filter pbmc68k_reduced,$(DATASET)),OMP_NUM_THREADS=1 )papermill nbs/reproduce.ipynb runs/$(notdir $(basename $(DATASET))).ipynb -p dataset $(DATASET) </dev/null
	@echo; echo "executed notebook: runs/$(notdir $(basename $(DATASET))).ipynb"
	@echo "tables and pictures:"; ls -1 results/$(notdir $(basename $(DATASET)))/*.csv results/$(notdir $(basename $(DATASET)))/*.png

test: .venv/installed
	pip check
	nbdev_clean
	nbdev_export
	$(MAKE) --no-print-directory readme
	git diff --exit-code -- nbs scld_nb README.md
	mypy
	# two cores, two lanes that take about as long
	$(MAKE) --no-print-directory -j2 literal notebooks
	# files with few and long tests first, so that neither core waits for them at the end
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(LONG) $(filter-out $(LONG) tests/test_distributed.py,$(wildcard tests/test_*.py)) \
		--cov=scld_nb --cov-report=
	# the one mostly waits, the other mostly downloads
	$(MAKE) --no-print-directory -j2 processes unlocked
	@echo "all checks passed"

notebooks: .venv/installed
	OMP_NUM_THREADS=1 nbdev_test --n_workers 1

# forks processes, which is safe only from one that has no threads of its own
processes: .venv/installed
	OMP_NUM_THREADS=1 pytest -q tests/test_distributed.py --cov=scld_nb --cov-append --cov-report=term --cov-fail-under=90

# the command of the README, word for word, and the files it promises
literal: .venv/installed
	# one thread, for the notebooks run beside it (see reproduce)
	OMP_NUM_THREADS=1 papermill nbs/reproduce.ipynb -p dataset pbmc68k_reduced </dev/null >out.ipynb
	@ls $(addprefix results/pbmc68k_reduced/,table2.csv table3.csv table4.csv table5.csv figure4.png figure5.csv figure5.png)

# README.md is nbs/index.ipynb as markdown, with links seen from the top folder
readme: .venv/installed
	@jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed -e 's#](\.\./#](#g' -e 's#src="\.\./#src="#g' > README.md.tmp && mv README.md.tmp README.md

docs: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/python docs/build.py --quiet

.venv/installed: requirements.lock constraints.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	# everything but torch and what its build brings, each file checked against its hash; other Pythons go by constraints.txt
	.venv/bin/python -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 14))' || touch .venv/no_lock
	test -e .venv/no_lock || $(PIP) install --no-deps --require-hashes -r requirements.lock
	$(PIP) install -c constraints.txt -e '.[dev,docs]'
	touch $@

unlocked:
	rm -rf .venv-unlocked && $(PYTHON) -m venv .venv-unlocked
	# any build of torch will do: the pinned one saves a download of gigabytes where it is at hand
	$(PIP_UNLOCKED) install "$$(grep ^torch== constraints.txt)"
	$(PIP_UNLOCKED) install '.[notebook]' 'nbdev>=3' pot
	.venv-unlocked/bin/python -m pip check
	cd .venv-unlocked && export OMP_NUM_THREADS=1 PATH=$(CURDIR)/.venv-unlocked/bin:$$PATH && \
		scld train pbmc68k_reduced -o model --steps 200 --ae-steps 200 && \
		scld sample model -n 50 -o cells.h5ad && \
		scld evaluate model/test.h5ad cells.h5ad --train model/train.h5ad --quick --n-trees 50 -o report
	# this nbdev has its commands with hyphens
	cd nbs && OMP_NUM_THREADS=1 PATH=$(CURDIR)/.venv-unlocked/bin:$$PATH nbdev-test 02_schedules.ipynb

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lock/bin/uv pip compile --quiet --no-cache --universal --python-version 3.11.5 --generate-hashes --no-header --no-annotate --no-emit-index-url \
		-c constraints.txt --extra dev --extra docs setup.py -o .venv-lock/all
	# torch comes in many builds, with many packages for CUDA: those are the user's choice
	awk '/^[^ ]/ { keep = !/^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==/ } keep' .venv-lock/all > requirements.lock

clean:
	rm -rf .venv .venv-unlocked .venv-lock build dist *.egg-info out.ipynb _site docs/_build
