#!/usr/bin/env bash
# Makes .venv with the package in it and runs every check: ruff, mypy, our tests, and timm's own tests on our models
# and optimizers. Arguments go to pytest, for our own tests alone: scripts/test.sh -k optimizers
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh test
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
ruff check .
mypy
export OMP_NUM_THREADS=1  # of each of two processes: more would wait for each other
python -m pytest -q -n 2 --junitxml build/tests.xml
# The slow cases of timm's test_optim.py stand together: dealt one by one, both processes get their share.
python scripts/timm_conformance.py -n 2 --maxschedchunk 1 --junitxml "$PWD/build/timm.xml"
