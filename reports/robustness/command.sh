#!/usr/bin/env bash
# Makes the robustness reports, from the root of the repository: bash reports/robustness/command.sh [NAME ...]
# NAME: cifar10_resnet20, mnist_lenet5_clean, mnist_lenet5_pgd_eps03, imagenet_efficientnet_lite0; default: all.
# EBM_GUARD_DATA names the folder with the data sets and the published weights. Under 20 minutes each on one core.
set -euo pipefail
: "${EBM_GUARD_DATA:?set it to the folder with the data sets and the published weights}"
nets=examples/published_nets.py

attack() {
  name=$1
  factory=$2
  weights=$3
  shift 3
  ebm-guard attack --model "$nets:$factory" --checkpoint "\$EBM_GUARD_DATA/$weights.safetensors" \
    --seed 0 --quiet --output "reports/robustness/$name" "$@"
}

cifar10_resnet20() {
  attack cifar10_resnet20 cifar10_resnet20 cifar10_resnet20 \
    --data 'npz:$EBM_GUARD_DATA/cifar10_test.npz' \
    --ood 'near_cifar100=npz:$EBM_GUARD_DATA/cifar100_test3k.npz' \
    --ood 'far_textures=npz:$EBM_GUARD_DATA/dtd_1200_32x32.npz' \
    --attacks standard --attack-images 128 --title 'CIFAR-10 ResNet-20 under attack'
}

lenet5() {
  attack "mnist_lenet5_$1" mnist_lenet5 "mnist_lenet5_$1" \
    --data 'npz:$EBM_GUARD_DATA/mnist.npz#test' \
    --epsilon 0.05 --epsilon 0.1 --epsilon 0.2 --epsilon 0.3 \
    --attacks standard --attack-images 150 --title "$2"
}

mnist_lenet5_clean() {
  lenet5 clean 'MNIST LeNet-5 under attack'
}

mnist_lenet5_pgd_eps03() {
  lenet5 pgd_eps03 'MNIST LeNet-5, adversarially trained, under attack'
}

imagenet_efficientnet_lite0() {
  attack imagenet_efficientnet_lite0 imagenet_tf_efficientnet_lite0 \
    imagenet_tf_efficientnet_lite0_fp16 \
    --data '$EBM_GUARD_DATA/imagenet_sample' \
    --attacks quick --attack-images 64 --attack-batch-size 32 \
    --title 'EfficientNet-Lite0 under attack'
}

if [ $# -eq 0 ]; then
  set -- cifar10_resnet20 mnist_lenet5_clean mnist_lenet5_pgd_eps03 imagenet_efficientnet_lite0
fi
for name in "$@"; do
  "$name"
done
