"""`python -m seqwise.testing`: runs the whole contract and records it in lab/results/contract.json."""

from seqwise.testing.contract import record


def main() -> None:
    """Exits with the failures, one a line, or with 0."""
    failed = []
    for name, entry in record().items():
        cells = {entry["family"]: entry.get("failed", "")} | entry["matrix"]
        failed += [f"{name} on {family}: {text}" for family, text in cells.items() if text.startswith("failed")]
    raise SystemExit("\n".join(failed) or 0)


if __name__ == "__main__":
    main()
