"""Baselines: other ways to learn tasks one after another, by the same tasks, nets and measures."""
