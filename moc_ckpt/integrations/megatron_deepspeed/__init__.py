"""Megatron-DeepSpeed: what its training scripts need to run and to be checkpointed, with none of its files touched.

`checkout` reads the tree, `concern` says what a shim or a hook is, `shims/` clears obstacles one by one, `hooks` brings
the plugin in, `launcher` decides what applies. Importing this imports neither torch, nor DeepSpeed, nor Megatron.
"""
