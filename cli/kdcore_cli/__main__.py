"""``python -m kdcore_cli``, which launchers of several processes need."""

from kdcore_cli.main import main

if __name__ == "__main__":
    main()
