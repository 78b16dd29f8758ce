"""Loading small harmless files of the public layouts, and a server of them on this machine."""

import contextlib
import http.server
import resource
import threading

import pytest

from br_jax.datasets.load import load_dataset


@pytest.fixture
def load(tmp_path):
    """load(name, split, file name, content) writes the file and loads it."""

    def write_and_load(name, split, file, content):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return load_dataset(name, split=split, path=path, folder=tmp_path / "tfds")

    return write_and_load


@pytest.fixture
def small_disk():
    """small_disk(size): within it, no file may grow beyond so many bytes."""

    @contextlib.contextmanager
    def limit(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limit


@pytest.fixture
def serve(monkeypatch):
    """serve({"/path": (status, content)}) -> a server's address; (status, content, length) states another length."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with contextlib.ExitStack() as stack:

        def start(answers):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    status, content, *length = answers.get(self.path, (404, b"nothing"))
                    self.send_response(status)
                    self.send_header("Content-Length", str(length[0] if length else len(content)))
                    self.end_headers()
                    with contextlib.suppress(ConnectionError):  # who only asks hangs up
                        self.wfile.write(content)

                def log_message(self, *arguments):
                    pass

            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_port}"

        yield start
