"""Kernels for Hopper GPUs, by the recurrence that they compute.

linear_attention    which of these serves which arguments
scalar_decay        one decay per head, or none: ssd, retention
vector_decay        one decay per row of the state: gla
delta_rule          delta_rule, gated_delta_rule
kda                 the delta rule with one decay per row of the state
decode_step         one token of any of them
linear_scan, selective_scan, newton
heuristics          how they cut their work on each kind of GPU
mosaic, threads     what they are written with
"""
