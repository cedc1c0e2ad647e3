#!/usr/bin/env bash
# FoX (Pro) 360M on four GPUs of one machine, by the papers' recipe.
#
#   model    fox-pro-360m: 419M parameters (366M in products), 24 layers, 16 heads, T = 16,384
#   tokens   7.5e9 in steps of 524,288: 14,305 steps
#   FLOPs    6 * 366e6 + 7 * 16,384 * 1,024 * 24 * kept a token: 2.3e9 to 5.0e9 with 5% to all of attention kept; 1.9e19 in
#            all when 13% is kept, as in a trained model
#   traffic  each GPU sends 2.0 GB a step (-z 1)
#   ms/step  not measured on four GPUs. One H200 alone, with pruning: 140,002 tokens/s (docs/results/gpu.md), 3.7 s for such a step
#
#   scripts/run_4gpu.sh DATA OUT [options of train_fox]       GPUS=4, MODEL=fox-pro-360m
#
# Run scripts/launch.sh 4 ./nccl_bandwidth first: on NVLink it shows hundreds of GB/s. SIGTERM or Ctrl-C to this script saves a
# checkpoint and ends with 0; the same command goes on from it (-y). mpirun starts the ranks where it is installed.
set -u
if [ $# -lt 2 ]; then
    echo 'usage: scripts/run_4gpu.sh DATA OUT [options of train_fox]' >&2
    exit 1
fi
# shellcheck source=scripts/scaling_lib.sh
. "$(dirname "$0")/scaling_lib.sh"
data=$(absolute "$1")
out=$(absolute "$2")
shift 2
cd "$(dirname "$0")/.." || exit 1
command=(./train_fox -i "$data" -o "$out" -e "${MODEL:-fox-pro-360m}" -T 16384 -b 2 -d 524288 -n 500 -y "$@")
if ! command -v mpirun >/dev/null; then
    exec scripts/launch.sh "${GPUS:-4}" "${command[@]}"
fi
# Where the program is built without MPI, this is how the ranks that mpirun starts meet.
export MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-$((20000 + $$ % 12000))}"
# A signal goes to the ranks, mpirun's children: then mpirun ends with their code. SIGTERM it would answer itself by killing them a second
# later, and not every build passes SIGUSR1 on. Ranks are not bound to one core each: they have threads that read data, write checkpoints
# and serve the GPU.
mpirun -np "${GPUS:-4}" --bind-to none "${command[@]}" &
ranks=$!
trap 'kill -TERM $(cat /proc/$ranks/task/$ranks/children) 2>/dev/null' TERM INT
while kill -0 $ranks 2>/dev/null; do
    wait $ranks
    code=$?
done
exit "${code:-1}"
