"""``python -m kdcore_cli``, which launchers of several processes need."""

from kdcore_cli.console_script import main

if __name__ == "__main__":
    main()
