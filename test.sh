#!/usr/bin/env bash
# Sets up what is missing, then runs every test. Arguments go to pytest; --slow adds the tests that take minutes.
# Tests marked `gpu` run where there is a CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
setup_env requirements_runtime.txt requirements_test.txt
setup_env requirements_triton.txt
exec "$PYTHON" -m pytest "$@"
