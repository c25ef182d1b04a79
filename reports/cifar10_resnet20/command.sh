#!/usr/bin/env bash
# Makes this folder's report, from the root of the repository: bash reports/cifar10_resnet20/command.sh
# EBM_GUARD_DATA names the folder with the data sets and the published weights.
# About three minutes on two cores. The fit data is a part of this net's training data: right for the
# statistics of feature scores, never for evaluation. No thumbnails: these data sets have no free licence.
set -euo pipefail
: "${EBM_GUARD_DATA:?set it to the folder with cifar10_test.npz and the weights}"
ebm-guard report \
  --model examples/published_nets.py:cifar10_resnet20 \
  --checkpoint '$EBM_GUARD_DATA/cifar10_resnet20.safetensors' \
  --data 'npz:$EBM_GUARD_DATA/cifar10_test.npz' \
  --fit-data 'npz:$EBM_GUARD_DATA/cifar10_train10k.npz' \
  --ood 'near_cifar100=npz:$EBM_GUARD_DATA/cifar100_test3k.npz' \
  --ood 'far_textures=npz:$EBM_GUARD_DATA/dtd_1200_32x32.npz' \
  --seed 0 --no-images --quiet \
  --title 'CIFAR-10 ResNet-20' \
  --output reports/cifar10_resnet20
