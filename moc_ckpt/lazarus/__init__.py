"""Experts with replicas (Lazarus, arXiv 2407.04656): how many, where, and how tokens reach them."""
