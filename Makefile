# make demo   set up, make a small data set, train, evaluate, separate a real excerpt
# make test   set up, run all tests
# make lint   set up, ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: setup ffmpeg demo test lint clean

setup: $(VENV)/.installed ffmpeg

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-r requirements.txt -r requirements-dev.txt
	touch $@

# musdb, museval and stempeg call ffmpeg and ffprobe.
ffmpeg:
	@command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null && exit 0; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq ffmpeg >/dev/null; \
	else \
		echo "error: ffmpeg is missing; install it (apt install ffmpeg, brew install ffmpeg)" >&2; \
		exit 2; \
	fi

test: setup
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
