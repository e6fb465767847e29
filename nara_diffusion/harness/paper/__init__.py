"""The paper's experiments (arXiv 2605.29716), which train_scripts/paper_tables.py runs: plan, settings, tables."""
