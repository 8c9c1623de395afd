#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in three parts of less than ten minutes: `benchmarks/gpu.sh --help`.
exec "${PYTHON:-$(command -v python || command -v python3)}" "$(dirname "${BASH_SOURCE[0]}")/gpu_run.py" "$@"
