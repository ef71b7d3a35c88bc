#!/usr/bin/env bash
# What a machine with an NVIDIA GPU has to show, without a network: scripts/gpu_check.sh OUT [stage ...]; see gpu_check.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
