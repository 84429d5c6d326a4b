"""The tools that come with the package: `megatron-oreal convert`, `export`, `prepare-data` and others; see tools.py."""
