"""LAPACK on a CPU, from XLA's threads."""

import contextlib

import scipy.linalg.cython_lapack  # noqa: F401  # JAX loads it, and its BLAS, at the first factorization: too late to limit
from threadpoolctl import threadpool_limits


def one_blas_thread() -> contextlib.AbstractContextManager:
    """While it lasts, BLAS does not thread the calls that it gets.

    On a CPU factorizations are LAPACK's, called from XLA's own threads: a BLAS that threads each call once more has
    them wait for one another, from seconds to forever. Wait for the results inside of it.
    """
    return threadpool_limits(limits=1, user_api="blas")
