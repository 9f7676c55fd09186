"""Names of JAX operations, in the groups that every interpretation shares.

Rule tables register these groups by name, so that an operation added here is read alike by
all of them. Operations are named as `Node.key` names them.
"""

# The output is the input, in another place or copied.
IDENTITY = frozenset({
    "convert_element_type", "copy", "copy_p", "device_put", "optimization_barrier",
    "reduce_precision", "reshard", "sharding_constraint", "stop_gradient",
})  # fmt: skip
REARRANGE = frozenset({
    "broadcast_in_dim", "concatenate", "dynamic_slice", "dynamic_update_slice", "expand_dims",
    "gather", "pad", "reshape", "rev", "select_n", "slice", "split", "squeeze", "stack", "tile",
    "transpose", "unstack",
})  # fmt: skip
# Moves to where the values themselves say.
ORDER = frozenset({"sort", "top_k"})
# What a custom derivative rule was attached to: see `graph.Node`.
CUSTOM_DERIVATIVE = "custom_derivative"
# Activation functions: calls kept whole. The body of any other call is spliced in, so that
# wrapping part of a model in `jit` or `checkpoint` changes nothing.
NAMED_CALLS = frozenset({
    "celu", "clip", "elu", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu", "log_sigmoid",
    "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "squareplus",
})  # fmt: skip
# Operands that are moved, where the others say where to.
MOVED_OPERANDS = {
    "dynamic_slice": slice(1), "dynamic_update_slice": slice(2), "gather": slice(1),
    "select_n": slice(1, None),
}  # fmt: skip
MOVEMENT = IDENTITY | REARRANGE | ORDER | {CUSTOM_DERIVATIVE}

# Functions of one array, element by element.
UNARY = frozenset({
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt",
    "ceil", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "integer_pow", "is_finite", "lgamma", "log", "log1p", "logistic", "neg", "not", "round",
    "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh",
})  # fmt: skip
# Functions of several arrays of one shape (or scalars), element by element.
NARY = frozenset({
    "add", "add_any", "and", "atan2", "clamp", "div", "eq", "ge", "gt", "le", "lt", "max", "min",
    "mul", "ne", "nextafter", "or", "pow", "rem", "select_n", "sub", "xor",
})  # fmt: skip
ELEMENTWISE = UNARY | NARY
# What decides: it counts through what it selects, not by itself.
DECISIONS = frozenset({
    "and", "argmax", "argmin", "eq", "ge", "gt", "is_finite", "le", "lt", "ne", "not", "or", "xor",
})  # fmt: skip
# Sums of products of two arrays, along some of their axes.
PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})
# Element by element too, but they compute nothing of their own.
ELEMENTWISE_MOVEMENT = IDENTITY | {"broadcast_in_dim"}
