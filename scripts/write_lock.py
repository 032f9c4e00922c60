"""Write requirements.lock: the versions of all packages in this environment, which CI installs (`make lock`)."""

from importlib.metadata import distributions

import setup_plan as plan

HEAD = (
    "# The versions that the tests last passed with, on the CPU engine. Made by `make lock`; `.ci/run` installs them.\n"
)


def main() -> None:
    lines = plan.lock_lines((found.name, found.version) for found in distributions())
    plan.LOCK.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} packages in {plan.LOCK.name}")


if __name__ == "__main__":
    main()
