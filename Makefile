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

# Fresh machine to sound in about ten minutes on two cores; demo/ can be deleted at any time.
demo: setup
	rm -rf $(DEMO)
	$(BIN)/python -m training.data.synthetic $(DEMO)/data --tracks 40 --seconds 10
	$(BIN)/python -m training.data.excerpt $(DEMO)/excerpt
	$(BIN)/python -m training.train --config configs/demo.yaml
	$(BIN)/python -m separation.separate $(DEMO)/excerpt/test/*/mixture.wav \
		--checkpoint $(DEMO)/run/checkpoints/best.pt --output $(DEMO)/separated
	$(BIN)/python -m training.pictures $(DEMO)/excerpt/test/*/mixture.wav \
		$(DEMO)/separated/mixture/vocals.wav $(DEMO)/excerpt/test/*/vocals.wav \
		$(DEMO)/separated/spectrograms.png
	$(BIN)/python -m evaluation.evaluate --checkpoint $(DEMO)/run/checkpoints/best.pt \
		--data $(DEMO)/excerpt --scorer museval --json $(DEMO)/scores_excerpt.json
	$(BIN)/python -m evaluation.evaluate --checkpoint $(DEMO)/run/checkpoints/best.pt \
		--data $(DEMO)/data --scorer museval --json $(DEMO)/scores_synthetic.json \
		--output $(DEMO)/evaluation
	$(BIN)/python -m evaluation.report $(DEMO)/evaluation --output $(DEMO)/report.html
	@echo
	@echo "Data:     $(DEMO)/data (synthetic), $(DEMO)/excerpt (a real excerpt, from stempeg)"
	@echo "Scores:   $(DEMO)/scores_synthetic.json, $(DEMO)/scores_excerpt.json (tables above)"
	@echo "Report:   $(DEMO)/report.html (scores, spectrograms and sound, in a browser)"
	@echo "Sound:    $(DEMO)/separated/mixture/vocals.wav and instrumental.wav"
	@echo "Picture:  $(DEMO)/separated/spectrograms.png (mixture, estimate, truth)"
	@echo "Training: $(BIN)/tensorboard --logdir $(DEMO)/run"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
