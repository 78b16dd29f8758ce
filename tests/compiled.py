"""Which programs were traced and compiled: what a warm process should not be doing."""

import contextlib

import jax


class Compiles(contextlib.AbstractContextManager):
    """While it lasts, `names` gets the name of every program that is compiled, e.g. "jit(train_step)".

    `traced` gets those of functions that are traced, e.g. "train_step".
    """

    def __enter__(self):
        self.names: list[str] = []
        self.traced: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event: str, seconds: float, fun_name: str = "", **kwargs) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(fun_name)
        elif event == "/jax/core/compile/jaxpr_trace_duration":
            self.traced.append(fun_name)

    def __exit__(self, kind, error, traceback) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
