#!/bin/sh
# auto-round's data-free path: int4, symmetric, groups of 64; head and embeddings are kept by default.
# usage: autoround.sh PYTHON MODEL OUT [--disable_torch_compile] [--disable_opt_rtn], with a Python that has auto-round
set -eu
python=$1 model=$2 out=$3
shift 3
exec "$python" -m auto_round --model "$model" --output_dir "$out" \
  --model_free --scheme W4A16 --group_size 64 --device_map cpu "$@"
