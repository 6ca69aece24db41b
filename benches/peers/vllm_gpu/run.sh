#!/usr/bin/env bash
# Everything there is to run on a machine with a GPU: tests, sanitizers, timings; each part under its own time limit, logs
# under $OUT.
#
#   run.sh FOLDER PART...
#
# FOLDER holds the test binaries (unit, cuda_kernels, cuda_gemm, cuda_layer), libexpertile_vllm_gpu.so and the Python files
# of benches/peers/vllm_gpu; a part is one of: arithmetic, kernels, sanitize, alone, compare, sweep, layer. PEER_DIR names vLLM's
# pieces. LAYER gives the last two their options (--shapes, --tokens), DG_JIT_CACHE_DIR where DeepGEMM keeps what it compiles.
set -uo pipefail
folder=$(cd "$1" && pwd)
shift
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
        for tests in cuda_kernels cuda_gemm cuda_layer; do
            part "$tests" 120 "$folder/$tests" --nocapture --test-threads 6
            grep -E "^test |panicked|skipped| is .*, expected|Resources" "$out/$tests.log" | cut -c1-400
        done ;;
    sanitize)
        # racecheck does not follow an mbarrier at which one lane arrives for its warp, which is how the GEMM's warps meet.
        for check in cuda_kernels:{memcheck,racecheck,initcheck,synccheck} cuda_gemm:{memcheck,initcheck,synccheck}; do
            tests=${check%%:*} tool=${check##*:}
            part "$tests-$tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$folder/$tests" --test-threads 1 sanitizer
            tail -n 3 "$out/$tests-$tool.log"
        done ;;
    alone)
        part alone 240 python3 "$folder/compare.py" --alone --out "$out" ${ALONE:-}
        tail -n 40 "$out/alone.log" ;;
    compare)
        part compare 500 python3 "$folder/compare.py" --out "$out" ${COMPARE:-}
        tail -n 40 "$out/compare.log" ;;
    sweep | layer)
        part compile 160 python3 "$folder/compare_layer.py" --compile ${LAYER:-}
        [ "$name" = sweep ] && options=--quick || options=
        part "$name" 300 python3 "$folder/compare_layer.py" --out "$out" --name "$name" ${LAYER:-} $options
        tail -n 100 "$out/$name.log" ;;
    esac
done
