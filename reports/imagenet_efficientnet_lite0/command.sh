#!/usr/bin/env bash
# Makes the report, from the root of the repository: bash reports/imagenet_efficientnet_lite0/command.sh
# EBM_GUARD_DATA names the folder with the data sets and the published weights.
# About two minutes on two cores. The images are re-encoded as JPEG q80, one per class.
# No thumbnails: these data sets have no free licence.
set -euo pipefail
: "${EBM_GUARD_DATA:?set it to the folder with the data sets and the published weights}"
ebm-guard report \
  --model tf_efficientnet_lite0 \
  --checkpoint '$EBM_GUARD_DATA/imagenet_tf_efficientnet_lite0_fp16.safetensors' \
  --data 'folder:$EBM_GUARD_DATA/imagenet_sample' \
  --ood 'far_textures=folder:$EBM_GUARD_DATA/dtd_sample' \
  --seed 0 --no-images --quiet --batch-size 50 \
  --title 'ImageNet sample, EfficientNet-Lite0 (JPEG q80, one image per class)' \
  --output reports/imagenet_efficientnet_lite0
