#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in calls under ten minutes: build, tests, benchmarks, picture, compute-sanitizer.
#
#   benchmarks/gpu.sh [--commit REV] [--wheels DIR] [FOLDER]
#   benchmarks/gpu.sh --sanitize [--wheels DIR] [FOLDER]
#   benchmarks/gpu.sh --networks [--data PATH] [--inception-weights FILE] [--commit REV] [--wheels DIR] [FOLDER]
#
# The first form gives compute-sanitizer what is left of the time, the second all of it. The third: images/s of EDM2's
# network and the classic one, and with --data a short run on CIFAR-10 with the curve of held-out loss over the width of
# the average (of FID too, with --inception-weights).
#
# All output goes to FOLDER (default: $OUT, or runs/gpu): log.txt, summary.txt, the result file <device>-<date>.json,
# table.txt and roofline.png. The result file is whole after each contest, whoever ends the run. To commit it:
#
#   python benchmarks/readme_table.py --add FOLDER/<device>-<date>.json    # renews README.md and docs/performance.md too
#
# A result file says of which commit it is. A copy of the tree without .git has to be told, by --commit or
# VADIFF_COMMIT, what this prints where it was copied from: git describe --always --dirty --abbrev=40 --exclude='*'
#
# A failed stage does not stop the next; the exit status is 0 only if none failed. Installs into the current environment
# ($PYTHON, python or python3), from the network or, with --wheels, from the wheels in DIR alone.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "benchmarks/gpu.sh"; }

wheels='' folder="${OUT:-runs/gpu}" sanitize='' networks='' data='' inception=''
while (($#)); do
    case $1 in
        --wheels)
            wheels="${2:?--wheels needs a folder of wheel files}"
            [[ -d $wheels ]] || { echo "--wheels $wheels: no such folder" >&2; exit 2; }
            shift 2 ;;
        --commit)
            export VADIFF_COMMIT="${2:?--commit needs what git describe prints}"
            shift 2 ;;
        --sanitize) sanitize=1; shift ;;
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
if [[ -n ${VADIFF_COMMIT:-} && ! $VADIFF_COMMIT =~ ^[0-9a-f]{7,40}(-dirty)?$ ]]; then
    echo "--commit $VADIFF_COMMIT: expected a hash of 7 to 40 digits, or one with -dirty after it" >&2
    exit 2
fi
python="${PYTHON:-$(command -v python || command -v python3)}"
mkdir -p "$folder" || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH="benchmarks${PYTHONPATH:+:$PYTHONPATH}"
summary="$folder/summary.txt" log="$folder/log.txt"
: >"$summary"
: >"$log"
begun=$(mktemp)
trap 'rm -f "$begun"' EXIT
failed=0
deadline=$((SECONDS + 570)) # ten minutes, less what it takes to stop

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
    # An interrupt first: on it, pytest still prints the results that it has. (Where the shell ignores interrupts, as one
    # in the background, timeout's children hear them all the same.)
    timeout --signal=INT --kill-after=15 "$limit" "$@" >>"$log" 2>&1 </dev/null
    status=$?
    local verdict="ok"
    if ((status == 124 || status == 137)); then
        verdict="STOPPED after $limit s"
    elif ((status != 0)); then
        verdict="FAILED, exit status $status"
    fi
    ((status == 0)) || { failed=1; tail -n +$((first + 1)) "$log" | tail -n 15; }
    printf '%-16s %4d s  %s\n' "$name" $((SECONDS - begin)) "$verdict" | tee -a "$summary"
    return $status
}

skip() {
    failed=1
    printf '%-16s    - s  NOT RUN: %s\n' "$1" "$2" | tee -a "$summary"
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if [[ -n $wheels ]]; then
    stage wheels 60 "$python" -m pip install --no-index --no-deps "$wheels"/*.whl
fi

# After whatever ends the run: what there is.
finish() {
    [[ ! $folder/table.txt -nt $begun ]] || sed -n '/^the design/,$p' "$folder/table.txt"
    echo "== summary ($folder)"
    cat "$summary"
    exit $failed
}

# The kernels written in C++ first. Triton compiles in a run before, as under the sanitizer that would take minutes.
sanitizers() {
    local backend tool
    if ! command -v compute-sanitizer >/dev/null; then
        skip sanitizers "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
        return
    fi
    for backend in native triton; do
        [[ $backend == native ]] || stage compile-triton 60 "$python" benchmarks/sanitize.py triton
        for tool in memcheck racecheck; do
            # At most half of what is left, so that something is left for the next.
            stage "$tool-$backend" $(((deadline - SECONDS) / 2)) compute-sanitizer --tool "$tool" --report-api-errors no \
                --error-exitcode 9 "$python" benchmarks/sanitize.py "$backend"
        done
    done
}

# Without build isolation: torch and the build tools are those of this environment, and no network is needed.
stage build 80 env VADIFF_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps --editable .
stage machine 40 bash -c "nvidia-smi; nvcc --version; '$python' -m vadiff doctor"

if [[ -n $sanitize ]]; then
    sanitizers
    finish
fi

if [[ -n $networks ]]; then
    presets=()
    has diffusers || { presets=(--presets cifar10-edm2); skip classic "the classic network needs: pip install diffusers"; }
    stage networks 240 "$python" benchmarks/networks.py "${presets[@]}" --out "$folder/networks.json"
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
    finish
fi

# Dearest first. The limits up to the picture are 440 of 570 s. The suite takes what is left but 80 s, which are for
# the sanitizers.
[[ -n ${VADIFF_COMMIT:-} ]] || git rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
    echo "no --commit: the results will not say of which commit they are" | tee -a "$summary"
if has pytest; then
    stage tests 100 "$python" -m pytest -q tests/gpu -p no:cacheprovider
else
    skip tests "pytest is not installed: pip install pytest, or --wheels with a folder that holds it"
fi

if has pytest && has pytest_benchmark; then
    # What the design has figures for runs first, and the result file is written after each contest.
    stage benchmarks 180 "$python" -m pytest -q benchmarks -p no:cacheprovider -p no:xdist --benchmark-quiet \
        --device cuda --results "$folder"
else
    skip benchmarks "pytest-benchmark is not installed: pip install pytest-benchmark, or --wheels with a folder that holds it"
fi

results=$(find "$folder" -maxdepth 1 -name '*.json' -newer "$begun" | head -n 1)
if [[ -n $results ]]; then
    # Once more, as a run that was killed has printed none.
    stage table 20 "$python" benchmarks/result_table.py "$results" --out "$folder/table.txt"
    [[ ! $folder/table.txt -nt $begun ]] || sed -n '/^left out/p' "$folder/table.txt" >>"$summary"
    stage roofline 20 "$python" benchmarks/roofline.py "$results" "$folder/roofline.png"
else
    skip table "the benchmarks left no result file"
    skip roofline "the benchmarks left no result file"
fi

if has pytest; then
    workers=()
    has xdist && workers=(-n "$(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2))")
    stage core $((deadline - SECONDS - 80)) "$python" -m pytest -q "${workers[@]}" -p no:cacheprovider \
        -k "native-cuda or triton" tests/test_{loss,backward,statistics,weight_table,determinism,compile}.py
else
    skip core "pytest is not installed"
fi

sanitizers
finish
