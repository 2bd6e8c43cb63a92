"""The `kvgauge` command: every stage and every listing behind one name."""
