"""`python -m seqwise.testing`: runs the whole contract and records it in lab/results/contract.json."""

from seqwise.testing.contract import record

if __name__ == "__main__":
    failed = [f"{name}: {entry['failed']}" for name, entry in record().items() if not entry["passed"]]
    raise SystemExit("\n".join(failed))
