"""A compiler for functions of tensors: runs of a model/guide pair become graphs that read every tensor as an input.

`CompiledFunction` captures a function, compiles it with inductor, compares it with eager runs, and leaves the calls to
the function where that fails. The other modules are its parts. The room depends on torch alone: it serves training
steps, log-weights, potentials and validation alike, and imports none of them.
"""
