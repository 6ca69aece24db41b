#!/usr/bin/env bash
# Everything there is to run on a machine with a GPU: tests, sanitizers, timings; each part under its own time limit, logs
# under $OUT.
#
#   run.sh FOLDER PART...
#
# FOLDER holds the test binaries (unit, cuda_kernels, cuda_gemm, cuda_grouped_gemm, cuda_layer), the command expertile
# and libexpertile_vllm_gpu.so; a part is one of: arithmetic, kernels, sanitize, tiles, promise, split, rivals, invariant,
# alone, compare, sweep, layer. PEER_DIR names the pieces of the peers, DG_JIT_CACHE_DIR where DeepGEMM keeps what it
# compiles. RIVALS and INVARIANT give options to the parts of these names, LAYER to the last two. tiles: by how much the
# choice of tiles misses the best, on the seeds in SEEDS; promise: what it costs that K is never split by a call's size,
# where experts are few; split: layers whose experts are split among ranks; rivals: beside everything that others run;
# invariant: beside what vLLM offers in its batch-invariant mode.
set -uo pipefail
python=$(cd "$(dirname "$0")" && pwd)
folder=$(cd "$1" && pwd)
shift
export EXPERTILE_LIB=${EXPERTILE_LIB:-$folder/libexpertile_vllm_gpu.so}
out=${OUT:-.}
export EXPERTILE_CACHE=/tmp/expertile-cache RUST_BACKTRACE=0 PYTHONUNBUFFERED=1
nvrtc=$(python3 -c 'import glob, sys; print((glob.glob(sys.prefix + "/lib/python3*/site-packages/nvidia/cu13/lib") or [""])[0])')
[ -n "$nvrtc" ] && export EXPERTILE_NVRTC=$nvrtc

part() {
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    local start=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "exit $code after $((SECONDS - start)) s"
    return $code
}

for name in "$@"; do
    case $name in
    arithmetic)
        part arithmetic 120 "$folder/unit" cuda --nocapture
        grep -E "^test |panicked|skipped|disagree|first is" "$out/arithmetic.log" ;;
    kernels)
        for tests in cuda_kernels cuda_gemm cuda_grouped_gemm cuda_layer; do
            part "$tests" 120 "$folder/$tests" --nocapture --test-threads 6
            grep -E "^test |panicked|skipped| is .*, expected|Resources" "$out/$tests.log" | cut -c1-400
        done ;;
    sanitize)
        # racecheck does not follow an mbarrier at which one lane arrives for its warp, which is how the GEMM's warps meet.
        for check in cuda_kernels:{memcheck,racecheck,initcheck,synccheck} cuda_{gemm,grouped_gemm}:{memcheck,initcheck,synccheck}; do
            tests=${check%%:*} tool=${check##*:}
            part "$tests-$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/$tests" --test-threads 1 sanitizer
            tail -n 3 "$out/$tests-$tool.log"
        done ;;
    tiles)
        for seed in ${SEEDS:-1}; do
            part "tiles-$seed" 250 "$folder/expertile" bench tiles --device cuda:0 --seed "$seed" --json "$out/tiles-$seed.json" ${TILES:-}
            grep -E "^[0-9t]|%" "$out/tiles-$seed.log" | tr -d '│┆' | tr -s ' '
        done ;;
    promise)
        for experts in 1 2 4; do
            part "promise-$experts" 60 "$folder/expertile" bench tiles --device cuda:0 --experts "$experts" --draws 24 \
                --json "$out/promise-$experts.json"
            tail -n 2 "$out/promise-$experts.log"
        done ;;
    split)
        for shape in deepseek-v3:256 qwen3-235b-a22b:384; do
            part "split-${shape%%:*}" 120 "$folder/expertile" bench layer --device cuda:0 --preset "${shape%%:*}" --weights e4m3 \
                --intermediate "${shape##*:}" --tokens "${SPLIT_TOKENS:-777,1024,4096,5000,8192}" --json "$out/split-${shape%%:*}.json"
            grep -E "layer|tokens:|gemm" "$out/split-${shape%%:*}.log" | tr -d '│┆' | tr -s ' '
        done ;;
    rivals)
        part rivals 400 python3 "$python/compare_rivals.py" --out "$out" ${RIVALS:-}
        tail -n 230 "$out/rivals.log" ;;
    invariant)
        part invariant 300 python3 "$python/compare_rivals.py" --out "$out" --batch-invariant ${INVARIANT:-}
        tail -n 100 "$out/invariant.log" ;;
    alone)
        part alone 240 python3 "$python/compare.py" --alone --out "$out" ${ALONE:-}
        tail -n 40 "$out/alone.log" ;;
    compare)
        part compare 500 python3 "$python/compare.py" --out "$out" ${COMPARE:-}
        tail -n 40 "$out/compare.log" ;;
    sweep | layer)
        part compile 160 python3 "$python/compare_layer.py" --compile ${LAYER:-}
        [ "$name" = sweep ] && options=--quick || options=
        part "$name" 300 python3 "$python/compare_layer.py" --out "$out" --name "$name" ${LAYER:-} $options
        tail -n 100 "$out/$name.log" ;;
    esac
done
