#!/usr/bin/env bash
# Makes the reports before and after outlier exposure, from the root of the repository: bash reports/mnist_convnet/command.sh
# EBM_GUARD_DATA names the folder with the data sets and the published weights.
# Half a minute on two cores. No thumbnails: MNIST states no licence.
set -euo pipefail
: "${EBM_GUARD_DATA:?set it to the folder with the data sets and the published weights}"
for weights in baseline tune; do
  compare=()
  if [ "$weights" = tune ]; then compare=(--baseline reports/mnist_convnet/baseline/report.json); fi
  ebm-guard report \
    --model examples/published_nets.py:mnist_convnet_oe \
    --checkpoint "\$EBM_GUARD_DATA/mnist_convnet_oe_$weights.safetensors" \
    --data 'npz:$EBM_GUARD_DATA/mnist.npz#test' \
    --fit-data 'npz:$EBM_GUARD_DATA/mnist.npz#train[:10000]' \
    --ood 'far_fashion=npz:$EBM_GUARD_DATA/fashion_mnist_test.npz' \
    "${compare[@]}" --seed 0 --no-images --quiet \
    --title "MNIST ConvNet, outlier exposure: $weights" \
    --output "reports/mnist_convnet/$weights"
done
