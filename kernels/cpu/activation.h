// Activations of gated products.

#pragma once
#include "vectors.h"

static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp2_of(x * -1.44269504f)); }
// (1 + tanh(y)) / 2 is the sigmoid of 2 y.
static inline vf gelu_argument(vf x) { return 1.59576912f * (x + 0.044715f * x * x * x); }

// silu(gate) * up, or gelu(gate) * up.
static inline vf gated_of(vf gate, vf up, int gelu) { return gate * sigmoid(gelu ? gelu_argument(gate) : gate) * up; }
