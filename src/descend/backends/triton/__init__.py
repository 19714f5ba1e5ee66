"""Rules compiled by Triton, for CUDA and ROCm."""
