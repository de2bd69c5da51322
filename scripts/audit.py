"""Look up known vulnerabilities of the installed packages with pip-audit; part of `make lint`.

Fails if another version fixes one; only prints a line if the advisories cannot be reached.
"""

import json
import subprocess
import sys
from importlib.metadata import version

MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}  # GHSA-w37p-236h-pfx3
TIMEOUT = 120  # seconds


def main() -> None:
    """Print the vulnerabilities; raises SystemExit if a package must be replaced."""
    for name, bad in MALICIOUS.items():
        if version(name) in bad:
            sys.exit(f"{name} {version(name)} is malicious: uninstall it, and change this machine's passwords.")
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        print(f"pip-audit: skipped, no answer in {TIMEOUT} s")
        return
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"pip-audit: skipped, {(result.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return
    known = [package for package in packages if "vulns" in package]
    if not known:
        print("pip-audit: skipped, the advisories of the package index cannot be reached")
        return
    found = [(package, fault) for package in known for fault in package["vulns"]]
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"pip-audit: {package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    print(f"pip-audit: {len(known)} packages looked up, {len(found)} vulnerabilities")
    if any(fault["fix_versions"] for _, fault in found):
        sys.exit("Raise the versions in constraints.txt to ones without known vulnerabilities.")


if __name__ == "__main__":
    main()
