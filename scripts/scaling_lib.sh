# shellcheck shell=bash
# What shell scripts share: functions.

# absolute PATH: as seen from the folder that this is called in; nothing for nothing
absolute() {
    case $1 in
    '' | /*) echo "$1" ;;
    *) echo "$PWD/$1" ;;
    esac
}

# launch N PROGRAM ...: on N GPUs; one needs no launcher.
launch() {
    local n=$1
    shift
    if [ "$n" = 1 ]; then
        "$@"
    else
        ${LAUNCH:-scripts/launch.sh} "$n" "$@"
    fi
}

# make_data DIR: shards of GPT-2's tokens from text of this machine (Python and C sources), where there are none yet.
make_data() {
    local folders='' folder vocab=${VOCAB:-tests/data/gpt2/gpt2.tiktoken}
    mkdir -p "$1"
    [ ! -e "$1/done" ] || return 0
    for folder in $(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2>/dev/null) /usr/lib/python3* /usr/local/cuda/include \
        /usr/include; do
        [ ! -d "$folder" ] || folders="$folders $folder"
    done
    # shellcheck disable=SC2086
    ./make_shards -o "$1" --vocab "$vocab" --extensions .py,.h,.cuh,.hpp,.txt,.md --max-bytes "${DATA_BYTES:-150000000}" $folders . >"$1.log" 2>&1 ||
        { tail -n 3 "$1.log" && exit 1; }
    tail -n 2 "$1.log"
    touch "$1/done"
}

# step_field FILE KEY SKIP: a key of every step after SKIP, one a line; 0 where it is missing.
step_field() {
    grep '"kind": "step"' "$1" | tail -n +$(($3 + 1)) | awk -v key="\"$2\": " '{ at = index($0, key); if (at == 0) { print 0; next }
        rest = substr($0, at + length(key)); sub(/[,}].*/, "", rest); print rest == "null" ? 0 : rest }'
}

median() {
    sort -g | awk '{ v[NR] = $1 } END { print NR == 0 ? 0 : NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'
}

# step_medians FILE SKIP: ms, tokens/s, exchange ms, exposed ms, GB sent, bus GB/s, memory GiB, pruned; over the steps after SKIP.
step_medians() {
    local ms speed exchange exposed bytes memory pruned
    ms=$(step_field "$1" step_ms "$2" | median)
    speed=$(step_field "$1" tokens_per_s "$2" | median)
    exchange=$(step_field "$1" exchange_ms "$2" | median)
    exposed=$(step_field "$1" exposed_ms "$2" | median)
    bytes=$(step_field "$1" exchanged_bytes "$2" | median)
    memory=$(step_field "$1" gpu_mem_bytes "$2" | median)
    pruned=$(step_field "$1" pruned "$2" | median)
    awk -v ms="$ms" -v speed="$speed" -v x="$exchange" -v e="$exposed" -v b="$bytes" -v m="$memory" -v p="$pruned" 'BEGIN {
        printf "%.3f %.1f %.3f %.3f %.4f %.1f %.3f %.4f\n", ms, speed, x, e, b / 1e9, (x > 0 ? b / x / 1e6 : 0), m / 1073741824, p }'
}
