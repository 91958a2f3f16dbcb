.PHONY: test lint format mini

test:
	python -m pytest

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

mini:
	bash lab/recipe.sh
