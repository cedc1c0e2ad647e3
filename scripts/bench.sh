#!/bin/sh
# Measures attention, every other kernel and whole steps on the GPU of this machine. Results go to build/bench_gpu, as JSON too.
#
#     scripts/bench.sh                                         attention layers profile
#     scripts/bench.sh --official DIR [--fla DIR]              beside the official program: peers steps as well
#     scripts/bench.sh --out FOLDER --official DIR steps       chosen parts
#
#     attention   dev/bench_attention.cu: forward and backward by context, head width and pruning; the gates of a trained model
#     layers      dev/bench_layers.cu: every other kernel, and the matrix products
#     peers       dev/bench_peers.py: attention beside the official kernel, flash-linear-attention, FlexAttention, cuDNN and
#                 FlashAttention on the same tensors; needs --official, a clone of github.com/zhixuan-lin/forgetting-transformer
#                 (--fla: of github.com/fla-org/flash-linear-attention)
#     steps       dev/bench_official.py: whole training steps beside the official program; needs --official. For ours alone:
#                 scripts/throughput_table.sh
#     profile     dev/profile_step.py: where the time of a step goes
#
# $STEPS and $PROFILE name the models and contexts: "fox-pro-125m:16384 fox-pro-760m:16384"; $ACP the kinds of pruning in `steps`
# (paper tight; the official program has paper and off). The parts but `attention` and `layers` need Python with the packages of
# dev/requirements.txt. A GPU that others use, or that was idle for long, gives other figures: compare only what one run
# measured.
set -e
cd "$(dirname "$0")/.."
official='' fla='' out=build/bench_gpu parts=''
while [ $# -gt 0 ]; do
    case $1 in
    --official) official=$2; shift ;;
    --fla) fla=$2; shift ;;
    --out) out=$2; shift ;;
    attention | layers | peers | steps | profile) parts="$parts $1" ;;
    --help) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "bench.sh: error: no option or part $1; see --help" >&2; exit 1 ;;
    esac
    shift
done
parts=${parts:-attention layers ${official:+peers steps} profile}
python=${PYTHON:-python3}
mkdir -p "$out" build
if ! command -v nvidia-smi > /dev/null; then
    echo 'bench.sh: error: no NVIDIA GPU here (nvidia-smi is not found); make bench measures the CPU program' >&2
    exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
chip=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$chip" != 90 ] || chip=90a

build() { # NAME: dev/NAME.cu for the chip of this machine
    nvcc=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
    "$nvcc" -std=c++17 -O3 -I. -gencode "arch=compute_$chip,code=sm_$chip" -o "build/$1" "dev/$1.cu" -lcublasLt
}

attention() {
    build bench_attention
    build/bench_attention > "$out/attention.txt"
    build/bench_attention --gates tests/data/gates/trained_gates_125m.safetensors > "$out/attention_trained.txt"
    cat "$out/attention.txt" "$out/attention_trained.txt"
}

layers() {
    build bench_layers
    build/bench_layers --json "$out/layers.json"
}

need_official() {
    if [ -z "$official" ]; then
        echo 'bench.sh: error: this part needs --official DIR, a clone of github.com/zhixuan-lin/forgetting-transformer' >&2
        exit 1
    fi
}

peers() {
    need_official
    "$python" dev/bench_peers.py --official "$official" ${fla:+--fla "$fla"} --out "$out/peers.json"
}

steps() {
    need_official
    make -s train_fox
    for run in ${STEPS:-fox-pro-125m:16384 fox-pro-125m:65536 fox-pro-360m:16384 fox-pro-760m:4096 fox-pro-760m:16384 fox-pro-760m:32768}; do
        tokens=$([ "${run#*:}" -gt 32768 ] && echo "${run#*:}" || echo 32768)
        "$python" dev/bench_official.py --official "$official" --model "${run%:*}" -T "${run#*:}" --batch-tokens "$tokens" --acp ${ACP:-paper tight} \
            --ours ./train_fox --out "$out/speed-${run%:*}-${run#*:}.json"
    done
}

profile() {
    make -s train_fox
    for run in ${PROFILE:-fox-pro-125m:16384}; do
        "$python" dev/profile_step.py --model "${run%:*}" -T "${run#*:}" ${official:+--official "$official"} --acp paper \
            --out "$out/profile-${run%:*}-${run#*:}.json"
    done
}

for part in $parts; do
    echo "== $part"
    $part
done
