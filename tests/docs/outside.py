"""Ask every address that the documentation names; needs the network, so CI does it once a week.

python -m tests.docs.outside
"""

import re
import sys
import urllib.error
import urllib.request

from tests.docs.pages import ROOT, pages, text_of


def answer(address: str) -> str:
    """Empty if there is something; else what was said."""
    request = urllib.request.Request(address, headers={"User-Agent": "link check"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return ""
    except (urllib.error.URLError, TimeoutError) as error:
        return str(error)


def main() -> None:
    """Print the addresses that do not answer, and end with 1 if there are any."""
    others = [ROOT / name for name in ("CHANGELOG.md", "CITATION.cff")]
    texts = [text_of(page) for page in (*pages(), *others)]
    found = {a.rstrip(".,") for text in texts for a in re.findall(r"https://[^\s)\"'>`]+", text)}
    asked = {address: answer(address) for address in sorted(found)}
    for address, said in asked.items():
        sys.stdout.write(f"{said or 'ok':40} {address}\n")
    sys.exit(any(asked.values()))


if __name__ == "__main__":
    main()
