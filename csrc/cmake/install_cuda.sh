#!/usr/bin/env bash
# Puts nvcc and the static runtime into a manylinux container (RHEL 8's packages), for wheels with CUDA kernels.
# GHOSTGRAM_CUDA=on asks for them; GHOSTGRAM_CUDA_VERSION names the toolkit, as NVIDIA's packages write it: 12-9, 13-0.
set -euo pipefail
if [[ ${GHOSTGRAM_CUDA:-off} != on ]]; then
  echo "no CUDA: GHOSTGRAM_CUDA=${GHOSTGRAM_CUDA:-} is not on"
  exit 0
fi
version=${GHOSTGRAM_CUDA_VERSION:-13-0}
architecture=$(uname -m)
[[ $architecture == aarch64 ]] && architecture=sbsa
dnf config-manager --add-repo \
  "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$architecture/cuda-rhel8.repo"
dnf install -y "cuda-nvcc-$version" "cuda-cudart-devel-$version" "cuda-crt-$version" || \
  dnf install -y "cuda-nvcc-$version" "cuda-cudart-devel-$version" # the crt has no package of its own before 13
