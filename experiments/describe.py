"""Says what files and folders are: models, adapters, provider's folders, runs; from their headers and configs.

python experiments/describe.py PATH... [--provider=W/provider] [--json=F] [--plot=F.png]

An adapter is told without its base: ranks, roles, how large its change is and where; and, with a provider's folder,
whether its Buffer is in it.
"""

from absl import flags

from br_jax.core.cli import run_with_flags
from br_jax.core.errors import UserError

JSON = flags.DEFINE_string("json", None, "File for every figure, singular values included.")
PROVIDER = flags.DEFINE_string("provider", None, "Provider's folder, with whose Buffer adapters are compared.")
PLOT = flags.DEFINE_string("plot", None, "Picture of one adapter's singular values, F.png; a PDF is put beside it.")


def main(argv: list[str]) -> None:
    """Paths and one call for each."""
    from br_jax.core.io import write_json
    from br_jax.report.describe import describe, plot_spectra, render

    if len(argv) < 2:
        raise UserError("a path is missing: give a model, an adapter, a provider's folder, a run, or several")
    if PLOT.value and len(argv) > 2:
        raise UserError("--plot is of one adapter: give one path")
    found = []
    for path in argv[1:]:
        found.append(describe(path, PROVIDER.value))
        print(render(found[-1]) + "\n")
    if JSON.value:
        write_json(JSON.value, found)
    if PLOT.value:
        print(*plot_spectra(found[0], PLOT.value))


if __name__ == "__main__":
    run_with_flags(main)
