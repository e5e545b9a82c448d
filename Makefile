# `make` lists the targets. Each sets up what it needs: a virtual environment in .venv, pinned.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo second-paper second-paper-fashioniq test test-slow test-gpu check lint types bench clean

help:
	@echo "make demo       the whole way on the icons, ends with a table and a report"
	@echo "make second-paper  zero-shot, Q-Former, DPO and listwise on the icons; ends with a table"
	@echo "make second-paper-fashioniq  the same on the icons in FashionIQ's layout"
	@echo "make test       the tests"
	@echo "make check      lint, types, tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make bench      performance gates, as ratios"
	@echo "make clean      remove the virtual environment and caches, keep runs/"

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/dafm demo

# Each training and store goes on where it stopped.
STUDY := runs/second-paper
FUSED := image text sum oti searle qformer dpo-paper dpo-corrected listwise
comma := ,
second-paper: $(READY)
	for job in icons_clip icons_searle qformer_icons dpo_icons_paper dpo_icons_corrected listwise_icons; do \
		$(BIN)/dafm finetune --config configs/$$job.yaml || exit; done
	$(BIN)/dafm precompute --config configs/second_paper.yaml
	$(BIN)/dafm precompute --config configs/second_paper.yaml --set dataset.split=val --set store=$(STUDY)/val
	$(BIN)/dafm evaluate $(STUDY)/test --out $(STUDY)/report --fusion mean@zscore --start sum=image \
		searle=searle-start qformer=qformer-start dpo-paper=hidden dpo-corrected=sum-half listwise=sum-half
	$(BIN)/dafm evaluate $(STUDY)/test --out $(STUDY)/fused --models $(FUSED) --tune-on $(STUDY)/val

LIKE := runs/fashioniq-like
CATEGORIES := dress shirt toptee
categories = [$(foreach c,$(CATEGORIES),{name: fashioniq, root: $(LIKE), split: $(1), category: $(c)},)]
second-paper-fashioniq: second-paper
	test -d $(LIKE) || $(BIN)/dafm data make fashioniq-like --out $(LIKE)
	for job in dpo_icons_paper dpo_icons_corrected listwise_icons qformer_icons; do \
		$(BIN)/dafm finetune --config configs/$$job.yaml --set out=$(STUDY)/fashioniq/$$job \
		--set train='$(call categories,train)' --set validation='$(call categories,val)' || exit; done
	for category in $(CATEGORIES); do $(BIN)/dafm precompute --config configs/second_paper_fashioniq.yaml \
		--set dataset.category=$$category --set store=$(STUDY)/fashioniq/$$category || exit; done
	$(BIN)/dafm evaluate $(addprefix $(STUDY)/fashioniq/,$(CATEGORIES)) --out $(STUDY)/fashioniq/report \
		--fusion mean@zscore --start sum=image qformer=qformer-start dpo-paper=hidden \
		dpo-corrected=sum-half listwise=sum-half
	$(BIN)/dafm fuse train --config configs/fusion.yaml --set out=$(STUDY)/fashioniq/fused \
		--set store='[$(foreach c,$(CATEGORIES),$(STUDY)/fashioniq/$c,)]' \
		--set models='[$(foreach m,$(FUSED),$(m)$(comma))]'

test: $(READY)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/pytest -m slow --timeout 1800

test-gpu: $(READY)
	$(BIN)/pytest -m gpu --timeout 1800

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
