"""The command line `moc-ckpt`: one module per verb. Imports neither torch nor DeepSpeed."""
