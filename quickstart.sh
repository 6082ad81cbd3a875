#!/usr/bin/env bash
# From a fresh machine to a model that learns: sets up what is missing, trains, and writes some text with the result.
# Without a CUDA GPU: a 0.7M-parameter model, about 3 minutes on two cores. With one: the 1B shape for 300 steps.
# Arguments are passed on to run_1b_launch.py, where they win.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'echo "stopped" >&2; exit 130' INT

source scripts/setup_env.sh
setup_env requirements_runtime.txt
SHOWN_PYTHON=${PYTHON#"$PWD/"}
NANO=(--device auto --size nano --data demo --tag quickstart --train-seq-len 256 --batch-size 8 --grad-accum 1
    --optimizer adamw --lr 5e-3 --steps 900 --warmup-steps 100 --eval-every 300 --log-every 25)
BILLION=(--device cuda --tag quickstart --train-seq-len 1024 --grad-accum 32 --steps 300
    --warmup-steps 50 --eval-every 100 --log-every 5)
DATA=fineweb_20m.npy

main() {
    local run prompt
    choose_run "$@"
    echo
    # A dry run first: it checks every option in a moment, and says where the run will be.
    run=$("$PYTHON" run_1b_launch.py "${ARGS[@]}" | sed -n 's/^\[plan\] run_directory=//p' | sed 's/ ([^(]*)$//')
    "$PYTHON" run_1b_launch.py "${ARGS[@]}" --run
    echo
    echo "== Text from the trained model"
    "$PYTHON" -m oneb sample --ckpt "$run/last.pt" --prompt "$PROMPT" --tokens 200
    show_next "$run"
}

# ARGS and PROMPT: what this machine can train in minutes.
choose_run() {
    PROMPT="def "
    if [[ $HAS_CUDA == 0 ]]; then
        if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then
            echo "warning: this machine has an NVIDIA GPU, but torch $TORCH_VERSION does not reach it: it is a build" >&2
            echo "without CUDA, or for a newer driver. Training goes on without the GPU." >&2
        fi
        echo "== No CUDA GPU: a small model (--size nano) on the source of Python's standard library"
        ARGS=("${NANO[@]}" "$@")
        return
    fi
    echo "== CUDA GPU found: 300 steps of the 1B shape"
    ARGS=("${BILLION[@]}" --data demo "$@")
    if [[ -e $DATA ]] || "$PYTHON" prepare_fineweb.py --tokens 20M --output "$DATA"; then
        PROMPT="The history of"
        ARGS=("${BILLION[@]}" --data "$DATA" "$@")
    else
        echo "warning: FineWeb could not be downloaded (see above); training on --data demo instead" >&2
    fi
}

# show_next RUN: where everything is, and the lines to paste after this.
show_next() {
    cat << END

== Done. The run is in $1
  summary.md     what was trained and how it went; loss.png draws it
  train.jsonl    every logged step
  last.pt        the model; more text from it:
                 $SHOWN_PYTHON -m oneb sample --ckpt $1/last.pt --prompt "$PROMPT"

== The real run, on a machine with a CUDA GPU (it fits itself to 8 GB and more; docs/LAUNCH_1B.md):
  $SHOWN_PYTHON run_1b_launch.py --device cuda --data fineweb-edu:1B --run
END
}

main "$@"
