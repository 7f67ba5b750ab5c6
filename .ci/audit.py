"""Look up every package of a lock file in the database of known vulnerabilities.

``python .ci/audit.py PIP_AUDIT LOCK``: exit code 1 if a package has one. Where the database cannot
be reached, or does not know the packages, the last line says that nothing was audited.
"""

from __future__ import annotations

import json
import subprocess
import sys

LONGEST = 300
"""Seconds to wait for the database."""


def judged(said: str, complaint: str) -> tuple[int, list[str]]:
    """The exit code and the lines to print for what pip-audit said on both streams."""
    try:
        packages = json.loads(said)["dependencies"]
    except (KeyError, TypeError, ValueError):
        reason = (complaint.strip().splitlines() or ["no answer"])[-1]
        return 0, [f"NOT AUDITED: the database is not reachable: {reason}"]
    known = [package for package in packages if "skip_reason" not in package]
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for package in known
        for found in package["vulns"]
    ]
    if lines:
        return 1, lines
    if not known:
        return 0, [f"NOT AUDITED: the database knows none of the {len(packages)} packages"]
    rest = len(packages) - len(known)
    unknown = f"; the database does not know {rest} others" if rest else ""
    return 0, [f"no known vulnerability in {len(known)} packages{unknown}"]


def main(program: str, lock: str) -> int:
    """Run pip-audit on a lock file and print what it found."""
    words = ["--requirement", lock, "--no-deps", "--disable-pip", "--format", "json"]
    command = [program, *words, "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
        code, lines = judged(done.stdout, done.stderr)
    except subprocess.TimeoutExpired:
        code, lines = judged("", f"no answer within {LONGEST} seconds")
    print(*(f"{lock}: {line}" for line in lines), sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
