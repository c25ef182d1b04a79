#!/usr/bin/env bash
# Makes the reports before and after energy fine-tuning, from the root of the repository: bash reports/mnist0to7_densenet/command.sh
# EBM_GUARD_DATA names the folder with the data sets and the published weights.
# Some minutes on two cores: a DenseNet runs 20 to 40 images a second, so the first 2,000 test
# images are a fixed subset: 1,614 digits 0..7, and 386 digits 8 and 9 as near OOD.
# No thumbnails: MNIST states no licence.
set -euo pipefail
: "${EBM_GUARD_DATA:?set it to the folder with the data sets and the published weights}"
for weights in pretrained energy_ft; do
  compare=()
  if [ "$weights" = energy_ft ]; then
    compare=(--baseline reports/mnist0to7_densenet/pretrained/report.json)
  fi
  ebm-guard report \
    --model examples/published_nets.py:mnist0to7_densenet_bc100_k12 \
    --checkpoint "\$EBM_GUARD_DATA/mnist0to7_densenet_bc100_k12_$weights.safetensors" \
    --data 'npz:$EBM_GUARD_DATA/mnist.npz#test[:2000]?classes=0-7' \
    --ood 'near_digits_8_9=npz:$EBM_GUARD_DATA/mnist.npz#test[:2000]?classes=8,9' \
    "${compare[@]}" --seed 0 --no-images --quiet \
    --title "MNIST 0..7 DenseNet: $weights (first 2,000 test images)" \
    --output "reports/mnist0to7_densenet/$weights"
done
