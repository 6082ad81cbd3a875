#!/usr/bin/env bash
# Sets up what is missing, then runs every test. Arguments go to pytest; --slow adds the tests that take minutes.
# Tests marked `gpu` run where there is a CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup_env.sh
setup_env requirements_runtime.txt requirements_test.txt
setup_env requirements_triton.txt
workers=()
# Many tests wait for other processes: one worker more than there are cores. On a GPU they would share its memory.
if [[ " $* " != *" -n"* ]] && ! command -v nvidia-smi > /dev/null; then
    workers=(-n "$("$PYTHON" -c 'import os; print((os.cpu_count() or 1) + 1)')")
fi
exec "$PYTHON" -m pytest ${workers[@]+"${workers[@]}"} "$@"
