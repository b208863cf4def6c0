"""Structural patches of source trees that are not ours: found by name and shape, marked line by line, taken out again.

`marks` is the text, `source` finds places with libcst, `patch` says what a patch is, `tree` and `files` bring it into a
tree. Nothing of a patched tree is imported, and neither torch nor DeepSpeed.
"""
