#!/usr/bin/env bash
# The whole pipeline on a set of images, from raw files to a measured backbone, one command per step.
#
#   recipes/quickstart.sh                                  tiles of real photographs that come with the program
#   recipes/quickstart.sh photos/ out 2000                 your own images, keeping 2,000 of them
#   RECIPE=vits14-short recipes/quickstart.sh photos/ out  on a GPU
#
# The same line again continues where it stopped: every step finds its work done, or goes on with it.
set -euo pipefail

DATA=${1:-demo:photos}
OUT=${2:-quickstart-out}
KEEP=${3:-1500}
RECIPE=${RECIPE:-tiny-cpu}
# Labelled images to judge the features on; the built-in sets have labels, a folder's are asked for by ?label=folder.
TRAIN=${TRAIN:-demo:photos}
TEST=${TEST:-demo:photos?split=test}

# Further options for pretrain, as PRETRAIN_OPTIONS='--set train.steps=300'.
read -r -a extra <<<"${PRETRAIN_OPTIONS:-}"

mkdir -p "$OUT"

# One image of every group of copies. Images in, so the copies are found by bytes, pixels and perceptual hash.
unique=$(dinov2 dedup "$DATA" -o "$OUT/unique")

# Embed what is left with an untrained model (its features follow colour and texture) and choose evenly over clusters.
embeddings=$(dinov2 embed "$unique" -m tiny --pool mean -o "$OUT/embeddings")
curated=$(dinov2 curate "$embeddings" --target-size "$KEEP" -o "$OUT/curated")

# Train without labels.
run=$(dinov2 pretrain "$curated" --config "$RECIPE" -o "$OUT/run" ${extra[@]+"${extra[@]}"})

# Measure the frozen features.
dinov2 eval knn "$run" --train "$TRAIN" --test "$TEST" -o "$OUT/knn"
dinov2 eval linear "$run" --train "$TRAIN" --test "$TEST" -o "$OUT/linear"
