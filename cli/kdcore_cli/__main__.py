"""``python -m kdcore_cli``, for launchers that start several processes."""

from kdcore_cli.console_script import main

if __name__ == "__main__":
    main()
