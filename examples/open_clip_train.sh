#!/bin/sh
# Trains on the shards of a run with open_clip's own trainer: `sh examples/open_clip_train.sh runs/demo [OPTION …]`.
#
# open_clip_train 3.3 needs webdataset 0.2.86 or older, so give it an environment of its own:
#   python -m venv peer && peer/bin/pip install open_clip_torch==3.3.0 'webdataset<=0.2.86' pandas
set -eu
python=${PYTHON:-peer/bin/python}
shards=$1/shards
shift
samples=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["samples"])' "$shards/manifest.json")
last=$(ls "$shards" | grep '\.tar$' | tail -n 1 | cut -d. -f1)
exec "$python" -m open_clip_train.main \
    --train-data "$shards/{00000..$last}.tar" --train-num-samples "$samples" --dataset-type webdataset \
    --model ViT-B-32 --batch-size 64 --epochs 1 --workers 1 --logs runs/open_clip "$@"
