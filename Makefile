# make reproduce   runs the paper's tables and figures on the embedded data set
# make test        everything CI checks
# make docs        the documentation site, in _site/
PYTHON  ?= python3
DATASET ?= pbmc68k_reduced
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MPLBACKEND := Agg

.PHONY: reproduce test readme docs clean

reproduce: .venv/installed
	papermill nbs/reproduce.ipynb runs/$(notdir $(basename $(DATASET))).ipynb -p dataset $(DATASET) </dev/null
	@echo; echo "executed notebook: runs/$(notdir $(basename $(DATASET))).ipynb"
	@echo "tables and pictures:"; ls -1 results/$(notdir $(basename $(DATASET)))/*.csv results/$(notdir $(basename $(DATASET)))/*.png

test: .venv/installed
	pip check
	nbdev_clean
	nbdev_export
	$(MAKE) --no-print-directory readme
	git diff --exit-code -- nbs scld_nb README.md
	mypy
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile --ignore tests/test_distributed.py --cov=scld_nb --cov-report=
	# forks processes, which is safe only from one that has no threads of its own
	OMP_NUM_THREADS=1 pytest -q tests/test_distributed.py --cov=scld_nb --cov-append --cov-report=term --cov-fail-under=90
	papermill nbs/reproduce.ipynb -p dataset pbmc68k_reduced </dev/null >out.ipynb
	@ls results/pbmc68k_reduced/table2.csv results/pbmc68k_reduced/table3.csv results/pbmc68k_reduced/table4.csv results/pbmc68k_reduced/table5.csv results/pbmc68k_reduced/figure4.png results/pbmc68k_reduced/figure5.csv results/pbmc68k_reduced/figure5.png
	@echo "all checks passed"

# README.md is nbs/index.ipynb as markdown, with links seen from the top folder
readme: .venv/installed
	@jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed -e 's#](\.\./#](#g' -e 's#src="\.\./#src="#g' > README.md.tmp && mv README.md.tmp README.md

docs: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	OMP_NUM_THREADS=1 .venv/bin/python docs/build.py --quiet

.venv/installed: constraints.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info out.ipynb _site docs/_build
