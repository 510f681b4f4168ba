#!/usr/bin/env bash
# Runs our tests and timm's own on the oldest release of each dependency that pyproject.toml allows, in .venv-lowest.
# PYTHON names the interpreter: the oldest torch has no build for the newest Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV=.venv-lowest PIP_CONSTRAINT="$PWD/build/lowest.txt"
mkdir -p build
sed -n 's/^ *"\([a-z_]*\)>=\([0-9.]*\)",$/\1==\2/p' pyproject.toml > "$PIP_CONSTRAINT"
. scripts/venv.sh test
export OMP_NUM_THREADS=1  # this and --maxschedchunk as in test.sh
python -m pytest -q -n 2 --junitxml build/tests-lowest.xml
python scripts/timm_conformance.py -n 2 --maxschedchunk 1 --junitxml "$PWD/build/timm-lowest.xml"
