#!/usr/bin/env bash
# Build, test and measure on a machine with an NVIDIA GPU, without a network: scripts/gpu_check.sh OUT [stage ...].
# gpu_check.py describes the stages.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
