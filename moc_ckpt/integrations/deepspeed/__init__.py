"""The plugin for DeepSpeed engines."""
