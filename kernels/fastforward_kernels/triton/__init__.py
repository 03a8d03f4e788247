"""Triton implementations, one file per family. Importing this package does not import Triton; its modules do.

What keeps the integers exact: a product is clamped before it is rounded by adding and subtracting 1.5 * 2**23, so that
no compiler can contract the two into a fused multiply-add, and every kernel that produces integers is compiled with
``enable_fp_fusion=False`` besides.
"""
