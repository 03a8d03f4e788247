"""Loads every hand-written layer; importing a layer's module is what registers its pair of classes."""

from fastforward.nn import activation, conv, embedding, linear, norm, pooling, recurrent

__all__ = ["activation", "conv", "embedding", "linear", "norm", "pooling", "recurrent"]
