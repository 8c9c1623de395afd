#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call under ten minutes: build, tests, benchmarks, compute-sanitizer, picture.
#
#   benchmarks/gpu.sh [--wheels DIR] [FOLDER]
#   benchmarks/gpu.sh --networks [--data PATH] [--inception-weights FILE] [--wheels DIR] [FOLDER]
#
# The second form, in ten minutes too: images/s of EDM2's network and the classic one, and with --data a short run on
# CIFAR-10 with the curve of held-out loss over the width of the average (of FID too, with --inception-weights).
#
# All output goes to FOLDER (default: $OUT, or runs/gpu): log.txt, summary.txt, the result file and roofline.png.
# A failed stage does not stop the next; the exit status is 0 only if none failed. Installs into the current environment,
# from the network or, with --wheels, from the wheels in DIR alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,12s/^# \{0,1\}//p' "benchmarks/gpu.sh"; }

wheels='' folder="${OUT:-runs/gpu}" networks='' data='' inception=''
while (($#)); do
    case $1 in
        --wheels)
            wheels="${2:?--wheels needs a folder of wheel files}"
            [[ -d $wheels ]] || { echo "--wheels $wheels: no such folder" >&2; exit 2; }
            shift 2 ;;
        --networks) networks=1; shift ;;
        --data) data="${2:?--data needs a folder or a tar.gz}"; shift 2 ;;
        --inception-weights) inception="${2:?--inception-weights needs a file}"; shift 2 ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
        *) folder=$1; shift ;;
    esac
done
for given in "$data" "$inception"; do
    [[ -z $given || -e $given ]] || { echo "$given: no such file or folder" >&2; exit 2; }
    [[ -z $given || -n $networks ]] || { echo "--data and --inception-weights are for --networks" >&2; exit 2; }
done
[[ -z $data ]] || data=$(realpath "$data")
[[ -z $inception ]] || inception=$(realpath "$inception")
mkdir -p "$folder" || exit 2
python="${PYTHON:-python}"
export PYTHONUNBUFFERED=1 PYTHONPATH="benchmarks${PYTHONPATH:+:$PYTHONPATH}"
summary="$folder/summary.txt" log="$folder/log.txt"
: >"$summary"
: >"$log"
begun=$(mktemp)
trap 'rm -f "$begun"' EXIT
failed=0
deadline=$((SECONDS + 575)) # ten minutes, less what it takes to stop

# stage NAME SECONDS COMMAND...: run it for at most so long, and what is left of the ten minutes
stage() {
    local name=$1 limit=$2 begin=$SECONDS status first
    shift 2
    ((limit <= deadline - SECONDS)) || limit=$((deadline - SECONDS))
    if ((limit < 5)); then
        skip "$name" "the ten minutes are over"
        return 1
    fi
    echo "== $name (at most $limit s)" | tee -a "$log"
    first=$(wc -l <"$log")
    # An interrupt first: on it, pytest still prints the results that it has.
    timeout --signal=INT --kill-after=20 "$limit" "$@" >>"$log" 2>&1 </dev/null
    status=$?
    local verdict="ok"
    if ((status == 124 || status == 137)); then
        verdict="STOPPED after $limit s"
    elif ((status != 0)); then
        verdict="FAILED, exit status $status"
    fi
    ((status == 0)) || { failed=1; tail -n +$((first + 1)) "$log" | tail -n 15; }
    printf '%-12s %4d s  %s\n' "$name" $((SECONDS - begin)) "$verdict" | tee -a "$summary"
    return $status
}

skip() {
    failed=1
    printf '%-12s    - s  NOT RUN: %s\n' "$1" "$2" | tee -a "$summary"
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if [[ -n $wheels ]]; then
    stage wheels 60 "$python" -m pip install --no-index --no-deps "$wheels"/*.whl
fi

# Without build isolation: torch and the build tools are those of this environment, and no network is needed.
stage build 150 env VADIFF_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps --editable .
stage machine 60 bash -c "nvidia-smi; nvcc --version; '$python' -m vadiff doctor"

if [[ -n $networks ]]; then
    stage networks 240 "$python" benchmarks/networks.py --out "$folder/networks.json"
    if [[ -n $data ]]; then
        # A network of an eighth of the preset's: what fits is a curve, not a record.
        run="$folder/cifar10-edm2"
        metrics=()
        [[ -z $inception ]] || metrics=(--metrics fid --layer 768 --images 2000 --inception-weights "$inception" \
            --cache "$folder/features")
        stage train 200 "$python" -m vadiff train --preset cifar10-edm2 --data "$data" --out "$run" --resume --compile \
            --channels 128 128 128 --layers-per-block 2 --batch-size 256 --steps 3000 --warmup 200 --schedule-steps 500 \
            --snapshot-every 47 --held-out-every 0 --held-out-images 1000 --samples-every 0 --checkpoint-every 3000
        stage sweep 200 "$python" -m vadiff ema "$run" --sweep --sigma-rel 0.03,0.05,0.07,0.10,0.13,0.16,0.20,0.25 \
            "${metrics[@]}"
        for file in "$run"/ema/step-*/sweep.*; do [[ -e $file ]] && cp "$file" "$folder/"; done
    else
        skip sweep "no --data: give the folder or archive of CIFAR-10"
    fi
    echo "== summary ($folder)"
    cat "$summary"
    exit $failed
fi

if has pytest; then
    stage tests 100 "$python" -m pytest -q tests/gpu -p no:cacheprovider
    workers=()
    has xdist && workers=(-n 4)
    stage core 110 "$python" -m pytest -q "${workers[@]}" -p no:cacheprovider -k "native-cuda or triton" \
        tests/test_{loss,backward,statistics,weight_table,determinism,compile}.py
else
    skip tests "pytest is not installed: pip install pytest, or --wheels with a folder that holds it"
fi

if has pytest && has pytest_benchmark; then
    # What the design has figures for runs first, and the result file is written after each contest.
    stage benchmarks 240 "$python" -m pytest -q benchmarks -p no:cacheprovider -p no:xdist --benchmark-quiet \
        --device cuda --results "$folder"
else
    skip benchmarks "pytest-benchmark is not installed: pip install pytest-benchmark, or --wheels with a folder that holds it"
fi

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        stage "$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" benchmarks/sanitize.py
    done
else
    skip sanitizer "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
fi

results=$(find "$folder" -maxdepth 1 -name '*.json' -newer "$begun" | head -n 1)
if [[ -n $results ]]; then
    stage roofline 30 "$python" benchmarks/roofline.py "$results" "$folder/roofline.png"
else
    skip roofline "the benchmarks left no result file"
fi

echo "== summary ($folder)"
cat "$summary"
exit $failed
