"""Known vulnerabilities among the installed packages, by pip-audit; part of `make lint`.

It fails for those that another version mends, and says so where the advisories cannot be reached.
"""

import json
import subprocess
import sys
from importlib.metadata import version

MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}  # GHSA-w37p-236h-pfx3
TIMEOUT = 120  # seconds


def main() -> None:
    """Raises SystemExit, with what to install, where a package must not stay as it is."""
    for name, bad in MALICIOUS.items():
        if version(name) in bad:
            sys.exit(f"{name} {version(name)} is malicious: take it off this machine, and change its passwords.")
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        print(f"pip-audit: not done, no answer in {TIMEOUT} s")
        return
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"pip-audit: not done, {(result.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return
    known = [package for package in packages if "vulns" in package]
    if not known:
        print("pip-audit: not done, the advisories of the package index cannot be reached")
        return
    found = [(package, fault) for package in known for fault in package["vulns"]]
    for package, fault in found:
        mended = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"pip-audit: {package['name']} {package['version']}: {fault['id']}, mended in {mended}")
    print(f"pip-audit: {len(known)} packages looked up, {len(found)} vulnerabilities")
    if any(fault["fix_versions"] for _, fault in found):
        sys.exit("Raise the versions in constraints.txt to ones without known vulnerabilities.")


if __name__ == "__main__":
    main()
