#!/usr/bin/env bash
# The throughput table of the ACP paper, on the GPU at hand: tokens/s of whole training steps by model, context and pruning.
#
#   scripts/throughput_table.sh                                        FoX (Pro) 125M at 4k, 8k, 16k; weights with spread gates
#   scripts/throughput_table.sh --official DIR                         the official PyTorch program beside it, same weights and tokens
#   scripts/throughput_table.sh --models fox-pro-360m fox-llama-360m   other presets
#   scripts/throughput_table.sh -T 32768 65536 --merge build/throughput.json
#   scripts/throughput_table.sh --checkpoint out/step_00005000 --data data/    a trained model on its own data
#
# Writes build/throughput.txt, .json and .png (--out PREFIX: elsewhere); --help explains columns and options, the last lines say how
# long each model took. On an H100 (b095510) FoX (Pro) 125M took 106 s beside the official program, 54 of them for that one; both
# models of 125M 181 s, of 360M 341 s, of 760M 506 s. 760M at 16k needs 72 GB, or --recompute 2.
set -u
cd "$(dirname "$0")/.." || exit 1
fail() {
    echo "throughput_table.sh: error: $*" >&2
    exit 1
}
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is missing; PYTHON names another one"
"$python" -c 'import numpy, safetensors' 2>/dev/null ||
    fail "Python packages are missing: $python -m pip install -r scripts/requirements.txt"
[ -x train_fox ] || fail 'train_fox is missing: run make first'
exec "$python" dev/throughput.py "$@"
