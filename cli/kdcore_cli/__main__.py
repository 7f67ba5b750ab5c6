"""``python -m kdcore_cli``, which launchers of several processes need."""

from kdcore_cli.main import main

main()
