"""``python -m kvgauge``: the `kvgauge` command, for launchers that want a module."""

from kvgauge.cli.main import main

if __name__ == "__main__":
    main()
