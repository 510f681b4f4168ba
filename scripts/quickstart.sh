#!/usr/bin/env bash
# Makes .venv with the package in it and shows the main job: a weight-standardized network trained with aws_sgd.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/venv.sh quickstart
python scripts/quickstart.py
