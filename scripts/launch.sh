#!/usr/bin/env bash
# Starts N ranks on this machine, without MPI:
#
#   scripts/launch.sh 4 ./train_fox -i data/ -T 16384
#
# The ranks find each other at MASTER_ADDR (127.0.0.1) and MASTER_PORT (a free-looking one). SIGTERM, SIGINT, SIGUSR1 and SIGHUP go
# to all of them: they finish the step, save, and end with 0. When one ends with an error, what is left 10 seconds later is
# killed. Exit code: 0 when all ended with 0, otherwise the first other one.
set -u
if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
    echo 'usage: scripts/launch.sh N PROGRAM ARGUMENTS...' >&2
    exit 1
fi
size=$1
shift
export WORLD_SIZE=$size MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-$((20000 + ($$ * 7919 + RANDOM) % 12000))}"

pids=()
for ((rank = 0; rank < size; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT USR1 HUP

# Waits for each; once one has failed, the others have 10 seconds.
status=0
killer=
running=("${pids[@]}")
while [ ${#running[@]} -gt 0 ]; do
    wait -n "${running[@]}"
    left=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            left+=("$pid")
        else
            wait "$pid"
            code=$?
            [ $status -ne 0 ] || status=$code
        fi
    done
    running=("${left[@]}")
    if [ $status -ne 0 ] && [ -z "$killer" ] && [ ${#running[@]} -gt 0 ]; then
        (
            trap 'kill $! 2>/dev/null; exit' TERM
            trap '' INT USR1 HUP
            sleep 10 &
            wait $!
            kill -KILL "${running[@]}" 2>/dev/null
        ) &
        killer=$!
    fi
done
[ -z "$killer" ] || kill -TERM "$killer" 2>/dev/null
exit $status
